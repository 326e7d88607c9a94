//! Groups of tensors: which tensors of a state dict share files.

use super::dict::{OPEN, STILL, StateDict};
use crate::error::{Error, Result};
use foldhash::fast::FixedState;
use std::hash::BuildHasher;

/// The group of the first key.
const FIRST_KEY: u32 = 2;

impl StateDict<'_> {
    /// Declares that the tensor `name` does not change from save to save, such as the base of a fine-tuning
    /// run. Frozen tensors get files of their own. From the second save on such a file is not written again:
    /// the new step clones the file of an older step, or links to it.
    ///
    /// The declaration is a prediction, not a promise. The bytes are read and digested like those of any
    /// tensor, and are written if they have changed.
    ///
    /// ```
    /// use std::sync::Arc;
    /// let (base, adapter) = (Arc::new(vec![0.5_f32; 1000]), Arc::new(vec![0.0_f32; 10]));
    /// let mut state = ashore::StateDict::new();
    /// state.tensor("base", base)?.tensor("adapter", adapter)?.frozen("base")?;
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// The name of an alias declares its holder. With several ranks, and for tensors in boxes, a declaration
    /// has no effect.
    ///
    /// # Errors
    /// `Invalid` when there is no tensor `name`, or when the tensor is in a group already.
    pub fn frozen(&mut self, name: &str) -> Result<&mut Self> {
        self.put_into(name, STILL)
    }

    /// Puts the tensor `name` into the files of the group `key`, which hold no tensor of another group. For
    /// tensors that change together in some saves and not in others: an expert, a language, a layer that is
    /// thawed later. A file that has not changed since the last save is not written again, as for
    /// [`StateDict::frozen`]. Each key makes at least one file.
    ///
    /// # Errors
    /// `Invalid` when there is no tensor `name`, or when the tensor was declared frozen or is in another
    /// group.
    pub fn group(&mut self, name: &str, key: &str) -> Result<&mut Self> {
        let known = self.groups.iter().position(|known| known == key);
        let number = known.unwrap_or(self.groups.len());
        self.put_into(name, u32::try_from(number).map_or(u32::MAX, |number| FIRST_KEY.saturating_add(number)))?;
        if known.is_none() {
            self.groups.push(key.into());
        }
        Ok(self)
    }

    fn put_into(&mut self, name: &str, group: u32) -> Result<&mut Self> {
        let holder = self.aliases.get(name).cloned();
        let name = holder.as_deref().unwrap_or(name);
        let boxes = self.boxes.get(name).copied().unwrap_or(1);
        for number in 0..boxes {
            let missing = || Error::invalid(format!("there is no tensor of this name to group tensor={name:?}"));
            let (index, _, tensor) = self.tensors.get_full(&(name, number)).ok_or_else(missing)?;
            if tensor.group != OPEN && tensor.group != group {
                let what = "a tensor is frozen or in one group, not in two groups";
                return Err(Error::invalid(format!("{what} tensor={name:?}")));
            }
            self.set_group(index, group);
        }
        Ok(self)
    }

    /// Gives the tensor at `index` the group that a tensor of `other` has.
    pub(super) fn inherit_group(&mut self, index: usize, group: u32, other: &[String]) {
        let Some(key) = group.checked_sub(FIRST_KEY).and_then(|number| other.get(number as usize)) else {
            return self.set_group(index, group);
        };
        let known = self.groups.iter().position(|known| known == key);
        let number = known.unwrap_or_else(|| {
            self.groups.push(key.clone());
            self.groups.len() - 1
        });
        self.set_group(index, FIRST_KEY + number as u32);
    }

    fn set_group(&mut self, index: usize, group: u32) {
        if let Some((_, tensor)) = self.tensors.get_index_mut(index).filter(|(_, tensor)| tensor.group != group) {
            tensor.group = group;
            self.fingerprint = FixedState::with_seed(self.fingerprint).hash_one(("group", index, group));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn state() -> StateDict<'static> {
        let mut state = StateDict::new();
        for name in ["a", "b", "c"] {
            state.tensor(name, vec![1.0_f32; 2]).unwrap();
        }
        state
    }

    #[test]
    fn a_tensor_is_in_one_group() {
        let mut grouped = state();
        grouped.frozen("a").unwrap().group("b", "expert 0").unwrap().group("c", "expert 1").unwrap();
        grouped.frozen("a").unwrap().group("b", "expert 0").unwrap();
        let groups: Vec<u32> = grouped.tensors.values().map(|tensor| tensor.group).collect();
        assert_eq!(groups, [STILL, FIRST_KEY, FIRST_KEY + 1]);
        for refused in
            [grouped.frozen("b").map(drop), grouped.group("b", "expert 1").map(drop), grouped.frozen("d").map(drop)]
        {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
        }
    }

    #[test]
    fn an_alias_stands_for_its_tensor() {
        let mut tied = state();
        tied.alias("tied", "a").unwrap().frozen("tied").unwrap();
        assert_eq!(tied.tensor_named("a").unwrap().group, STILL);
    }

    #[test]
    fn groups_are_part_of_the_structure() {
        let (plain, mut frozen, mut other) = (state(), state(), state());
        frozen.frozen("a").unwrap();
        other.frozen("b").unwrap();
        assert_ne!(plain.fingerprint(), frozen.fingerprint());
        assert_ne!(frozen.fingerprint(), other.fingerprint());
    }

    #[test]
    fn groups_survive_a_split_and_a_prefix() {
        let mut grouped = state();
        grouped.frozen("a").unwrap().group("b", "expert").unwrap();
        let mut whole = StateDict::new();
        whole.absorb("model.", grouped).unwrap();
        let (first, second) = whole.split().unwrap();
        for state in [first, second] {
            let groups: Vec<u32> = state.tensors.values().map(|tensor| tensor.group).collect();
            assert_eq!(groups, [STILL, FIRST_KEY, OPEN]);
        }
    }
}
