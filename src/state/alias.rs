//! Aliases: names that share the bytes of a tensor, as tied weights do.

use super::dict::{StateDict, Tensor};
use crate::error::{Error, Result};
use foldhash::fast::FixedState;
use std::collections::BTreeMap;
use std::hash::BuildHasher;

impl<'a> StateDict<'a> {
    /// Adds `name` as another name of the tensor `holder`, for tied weights. The bytes are written once, and
    /// a [`Checkpoint`](crate::Checkpoint) restores them under both names. The alias has the dtype, shape and
    /// boxes of its holder. An alias of an alias becomes an alias of the same holder.
    ///
    /// Other readers of safetensors find only the holder. `ashore convert --aliases copy` writes both
    /// tensors.
    ///
    /// ```
    /// use ashore::{HostTensor, StateDict};
    /// let mut state = StateDict::new();
    /// state
    ///     .tensor("embedding.weight", HostTensor::new(vec![0.0_f32; 8], [4, 2]))?
    ///     .alias("head.weight", "embedding.weight")?;
    /// assert_eq!(state.bytes(), 32);
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Invalid`, naming both tensors, when there is no tensor `holder` yet, or `name` is empty, reserved or
    /// taken.
    pub fn alias(&mut self, name: impl Into<String>, holder: &str) -> Result<&mut Self> {
        let name = name.into();
        let holder = self.aliases.get(holder).map_or(holder, String::as_str).to_owned();
        let refuse = |why: &str| Err(Error::invalid(format!("{why} tensor={name:?} alias_of={holder:?}")));
        if name.is_empty() || name == "__metadata__" {
            return refuse("a tensor cannot have this name");
        }
        if self.tensor_named(&name).is_some() || self.aliases.contains_key(&name) {
            return refuse("two tensors have the same name");
        }
        if self.tensor_named(&holder).is_none() {
            return refuse("an alias needs the tensor that holds its bytes: add that first");
        }
        self.fingerprint = FixedState::with_seed(self.fingerprint).hash_one((&name, &holder, "alias"));
        self.aliases.insert(name, holder);
        Ok(self)
    }

    /// The aliases with their holders, sorted by name.
    pub fn aliases(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.aliases.iter().map(|(name, holder)| (name.as_str(), holder.as_str()))
    }

    /// Renames each tensor and value with the function `name`, and removes each one for which it returns
    /// None. If a tensor is removed and an alias of it stays, the alias becomes the tensor.
    ///
    /// # Errors
    /// `Invalid` when two tensors or values get the same name.
    pub fn renamed(self, name: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let mut renamed = Self { metadata: self.metadata, ..Self::default() };
        let values = self.values.into_iter().map(|(old, value)| (old, value, false));
        for (old, value, of_rank) in values.chain(self.rank_values.into_iter().map(|(old, value)| (old, value, true))) {
            let Some(name) = name(&old) else { continue };
            if renamed.values.contains_key(&name) || renamed.rank_values.contains_key(&name) {
                return Err(Error::invalid(format!("two values have the same name value={name:?}")));
            }
            let to = if of_rank { &mut renamed.rank_values } else { &mut renamed.values };
            to.insert(name, value);
        }
        let mut heirs = BTreeMap::new();
        let mut aliases = Vec::new();
        for (alias, holder) in self.aliases {
            let Some(to) = name(&alias) else { continue };
            match name(&holder).or_else(|| heirs.get(&holder).cloned()) {
                Some(holder) => aliases.push((to, holder)),
                None => drop(heirs.insert(holder, to)),
            }
        }
        for (old, Tensor { capture, source, place, .. }) in self.tensors {
            if let Some(name) = name(&old).or_else(|| heirs.get(&*old).cloned()) {
                renamed.insert(name, source, capture, place)?;
            }
        }
        for (alias, holder) in aliases {
            renamed.alias(alias, &holder)?;
        }
        Ok(renamed)
    }
}
