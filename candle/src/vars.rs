//! Named Vars. A program saves them, and restores into them.

use crate::tensor::{CandleTensor, read_tensor};
use crate::{dtype, from_candle, invalid};
use ashore::{Checkpoint, Result, StateDict, TensorInfo};
use candle_core::{Device, Tensor, TensorId, Var};
use candle_nn::VarMap;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Vars by name, in the order of names: one list for saving and for restoring.
///
/// ```
/// use ashore::StateDict;
/// use ashore_candle::Vars;
/// use candle_core::{DType, Device, Var};
/// use candle_nn::{VarBuilder, VarMap, linear};
///
/// let map = VarMap::new();
/// linear(3, 2, VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu).pp("head"))?;
/// let mut vars = Vars::from(&map);
/// vars.add("scale", &Var::zeros((), DType::F64, &Device::Cpu)?)?;
/// assert_eq!(vars.names().collect::<Vec<_>>(), ["head.bias", "head.weight", "scale"]);
///
/// let mut state = StateDict::new();
/// vars.put(&mut state)?;
/// assert_eq!(state.len(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Vars {
    vars: BTreeMap<String, Var>,
}

/// The names that a restore did not match: see [`Vars::restore_matching`]. Both lists are sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Unmatched {
    /// Vars for which the checkpoint has no tensor. They are unchanged.
    pub missing: Vec<String>,
    /// Tensors of the checkpoint for which there is no Var.
    pub unexpected: Vec<String>,
}

impl Vars {
    /// Creates an empty list.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `var` as `name`.
    ///
    /// # Errors
    /// `Invalid`, naming the Var, when the name is taken.
    pub fn add(&mut self, name: impl Into<String>, var: &Var) -> Result<&mut Self> {
        let name = name.into();
        if self.vars.contains_key(&name) {
            return Err(invalid(format!("two Vars have the same name tensor={name:?}")));
        }
        self.vars.insert(name, var.clone());
        Ok(self)
    }

    /// Adds all Vars of `other`, with `prefix` before their names.
    ///
    /// # Errors
    /// As [`Vars::add`].
    pub fn add_all(&mut self, prefix: &str, other: &Self) -> Result<&mut Self> {
        for (name, var) in &other.vars {
            self.add(format!("{prefix}{name}"), var)?;
        }
        Ok(self)
    }

    /// The Var `name`.
    pub fn get(&self, name: &str) -> Option<&Var> {
        self.vars.get(name)
    }

    /// The names, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.vars.keys().map(String::as_str)
    }

    /// Names and Vars, sorted by name.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Var)> {
        self.vars.iter().map(|(name, var)| (name.as_str(), var))
    }

    /// The number of names.
    pub fn len(&self) -> usize {
        self.vars.len()
    }

    /// True when there are no Vars.
    pub fn is_empty(&self) -> bool {
        self.vars.is_empty()
    }

    /// Adds every Var to `state` as a [`CandleTensor`]. A Var with several names, such as tied weights, is
    /// written once, under the first name. The other names become [aliases](StateDict::alias).
    ///
    /// # Errors
    /// As [`CandleTensor::new`] and [`StateDict::tensor`]; both name the tensor.
    pub fn put(&self, state: &mut StateDict<'static>) -> Result<()> {
        let mut holders = HashMap::<TensorId, &str>::new();
        for (name, var) in &self.vars {
            if let Some(holder) = holders.get(&var.id()) {
                state.alias(name.as_str(), holder)?;
                continue;
            }
            state.tensor(name.as_str(), CandleTensor::new(var).map_err(|e| named(name, e))?)?;
            holders.insert(var.id(), name);
        }
        Ok(())
    }

    /// Sets every Var to the tensor of its name: on the host by `Var::set`, with a temporary copy of one
    /// tensor at a time; in GPU memory in place. Changes nothing unless every Var has a tensor of its dtype
    /// and shape, and every tensor has a Var.
    ///
    /// # Errors
    /// `Invalid`, naming all of them, for missing and unexpected tensors; otherwise as
    /// [`Vars::restore_matching`].
    pub fn restore(&self, checkpoint: &Checkpoint) -> Result<()> {
        let unmatched = self.unmatched(checkpoint)?;
        if unmatched != Unmatched::default() {
            let Unmatched { missing, unexpected } = unmatched;
            let what = "the checkpoint does not have the tensors that the Vars need";
            let wrong = invalid(format!("{what} missing={missing:?} unexpected={unexpected:?}"));
            return Err(located(checkpoint, wrong));
        }
        self.set_all(checkpoint)
    }

    /// Sets the Vars for which the checkpoint has a tensor, as [`Vars::restore`] does, and returns the names
    /// that did not match.
    ///
    /// # Errors
    /// `Invalid`, naming all of them and changing nothing, for tensors whose dtype or shape differs from
    /// their Vars; nothing is converted. `Invalid` when a Var has several names, and the checkpoint has
    /// different tensors under them. `Corrupt` when bytes are damaged: some Vars may then have been set, and
    /// their values are undefined.
    pub fn restore_matching(&self, checkpoint: &Checkpoint) -> Result<Unmatched> {
        let unmatched = self.unmatched(checkpoint)?;
        self.set_all(checkpoint)?;
        Ok(unmatched)
    }

    /// Compares names, dtypes and shapes.
    fn unmatched(&self, checkpoint: &Checkpoint) -> Result<Unmatched> {
        let stored: BTreeMap<&str, TensorInfo<'_>> = checkpoint.tensors()?.map(|info| (info.name, info)).collect();
        let (mut unmatched, mut different) = (Unmatched::default(), Vec::new());
        for (name, var) in &self.vars {
            let Some(info) = stored.get(name.as_str()) else {
                unmatched.missing.push(name.clone());
                continue;
            };
            let dtype = dtype::stored(var.dtype()).map_err(|e| named(name, e))?;
            if (info.dtype, info.shape) != (dtype, var.dims()) {
                let (found, shape) = (info.dtype, info.shape);
                different.push(format!("{name:?}: stored {found} {shape:?}, the Var is {dtype} {:?}", var.dims()));
            }
        }
        let unexpected = stored.keys().filter(|name| !self.vars.contains_key(**name));
        unmatched.unexpected = unexpected.map(|name| (*name).to_owned()).collect();
        if different.is_empty() {
            return Ok(unmatched);
        }
        let wrong = format!("tensors have another dtype or shape than their Vars: {}", different.join("; "));
        Err(located(checkpoint, invalid(wrong)))
    }

    /// Sets the Vars whose names are in the checkpoint.
    fn set_all(&self, checkpoint: &Checkpoint) -> Result<()> {
        let stored: HashSet<&str> = checkpoint.tensors()?.map(|info| info.name).collect();
        let mut set = HashMap::<TensorId, &str>::new();
        let mut matched: Vec<_> = self.iter().filter(|(name, _)| stored.contains(name)).collect();
        for (name, var) in &matched {
            if let Some(first) = set.insert(var.id(), name)
                && checkpoint.read(first)? != checkpoint.read(name)?
            {
                let what = "a Var has two names, and the checkpoint different tensors under them";
                return Err(located(checkpoint, invalid(format!("{what} tensors={:?}", [first, name]))));
            }
        }
        let mut done = HashSet::new();
        matched.retain(|(_, var)| done.insert(var.id()));
        #[cfg(feature = "cuda")]
        {
            let on_device: Vec<_> = matched.extract_if(.., |(_, var)| var.device().is_cuda()).collect();
            crate::cuda::load(checkpoint, &on_device)?;
        }
        for (name, var) in matched {
            let tensor = read_tensor(checkpoint, name, &Device::Cpu)?;
            set_var(name, var, &tensor)?;
        }
        Ok(())
    }
}

fn set_var(name: &str, var: &Var, tensor: &Tensor) -> Result<()> {
    let failed = |e| from_candle(format!("cannot set a Var tensor={name:?}"), e);
    var.set(&tensor.to_device(var.device()).map_err(failed)?).map_err(failed)
}

/// All Vars of the map, under the map's names.
impl From<&VarMap> for Vars {
    fn from(map: &VarMap) -> Self {
        // A poisoned map is still complete, because candle changes it by single inserts.
        let vars = map.data().lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        Self { vars: vars.iter().map(|(name, var)| (name.clone(), var.clone())).collect() }
    }
}

pub(crate) fn named(name: &str, error: ashore::Error) -> ashore::Error {
    invalid(format!("{} tensor={name:?}", error.message())).with_kind(error.kind()).with_source(error)
}

fn located(checkpoint: &Checkpoint, error: ashore::Error) -> ashore::Error {
    error.with_step(checkpoint.step()).with_path(checkpoint.path())
}
