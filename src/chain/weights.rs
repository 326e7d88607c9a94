//! The tensors of a version in host memory.

use super::inventory::{Holding, Inventory, Tensor};
use super::reading::Delta;
use crate::checkpoint::Checkpoint;
use crate::delta::{self, Numbers};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::restore::Targets;
use crate::state::{Dtype, Element, Layout};
use crate::sync::{Mutex, lock};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The tensors of a published version, in host memory: in memory of their own, or in that of the program.
///
/// Names are as published. A tied weight is one memory under several names.
///
/// ```
/// use ashore::chain::Weights;
/// use ashore::Dtype;
/// let mut memory = vec![0_u8; 12];
/// let mut weights = Weights::new();
/// weights.lend("w", Dtype::F32, &[3], &mut memory)?; // versions will be written there
/// assert_eq!(weights.version(), None); // none yet
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Default)]
pub struct Weights<'a> {
    /// None before the first version.
    holding: Option<Holding>,
    inventory: Inventory,
    /// By the number of the tensor. The entries of aliases are empty.
    memory: Vec<Memory<'a>>,
    /// Memory that the program has lent, until the first version is loaded.
    lent: BTreeMap<String, (Dtype, Vec<usize>, &'a mut [u8])>,
    /// Further names of lent memory, each with the name under which the memory was lent.
    tied: Vec<(String, String)>,
    /// Whether versions with other tensors than those that memory was lent for are refused.
    strict: bool,
    /// True while a write is in progress, and after a write that failed.
    poisoned: bool,
}

enum Memory<'a> {
    Own(Vec<u8>),
    Lent(&'a mut [u8]),
}

impl Memory<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(bytes) => bytes,
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Own(bytes) => bytes,
            Self::Lent(bytes) => bytes,
        }
    }
}

impl<'a> Weights<'a> {
    /// Makes weights without a version. They allocate memory for the first version.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lends memory for the tensor `name`, row-major and packed. Every version must have the tensor with this
    /// dtype and shape; tensors that are not lent get memory of their own.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, when the memory has another length, or when there is a version already.
    pub fn lend(
        &mut self,
        name: impl Into<String>,
        dtype: Dtype,
        shape: &[usize],
        memory: &'a mut [u8],
    ) -> Result<&mut Self> {
        let name = name.into();
        let wanted = Layout::new(dtype, shape).bytes()?;
        if memory.len() as u64 != wanted || self.holding.is_some() {
            let what = "memory is lent before the first version, and is as long as its tensor";
            let lengths = format!("expected_bytes={wanted} found_bytes={}", memory.len());
            return Err(Error::invalid(format!("{what} tensor={name:?} {lengths}")));
        }
        self.lent.insert(name, (dtype, shape.to_vec(), memory));
        Ok(self)
    }

    /// Declares that the memory lent for the tensor `holder` is also the tensor `name`. Every version must
    /// have them tied: two names of one tensor.
    pub fn lend_alias(&mut self, name: impl Into<String>, holder: impl Into<String>) -> &mut Self {
        self.tied.push((name.into(), holder.into()));
        self
    }

    /// Refuses versions with a tensor for which no memory is lent.
    pub fn strict(&mut self) -> &mut Self {
        self.strict = true;
        self
    }

    /// The version that these bytes are. None before the first version, and after a write that did not end.
    pub fn version(&self) -> Option<u64> {
        self.holding.filter(|_| !self.poisoned).map(|holding| holding.version)
    }

    /// The digest of the state, as in the chain: of names, dtypes, shapes and tensors.
    pub fn state_digest(&self) -> Option<u64> {
        self.holding.filter(|_| !self.poisoned).map(|holding| holding.state.to_bits())
    }

    /// The names of all tensors, with dtype and shape, in ascending order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, Dtype, &[usize])> {
        self.inventory.tensors.iter().map(|tensor| (tensor.name.as_str(), tensor.dtype, &tensor.shape[..]))
    }

    /// The name of the tensor that holds the bytes of the tensor `name`: its own name, or for a tied weight
    /// the first of its names. A delta changes a tensor under that name only. None: there is no such tensor.
    pub fn holder(&self, name: &str) -> Option<&str> {
        let number = self.inventory.find(name)?;
        let holder = self.inventory.tensors.get(self.inventory.tensors.get(number)?.holder)?;
        Some(holder.name.as_str())
    }

    /// The bytes of the tensor `name`.
    ///
    /// # Errors
    /// `NotFound` when there is no such tensor; `Unavailable` after a write that did not end.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        if self.poisoned {
            let what = "the weights are partly of one version and partly of another; load a full version";
            return Err(Error::new(ErrorKind::Unavailable, what));
        }
        let none = || Error::new(ErrorKind::NotFound, format!("the version has no such tensor tensor={name:?}"));
        self.inventory.find(name).map(|number| self.of(number)).ok_or_else(none)
    }

    /// The elements of the tensor `name`, copied.
    ///
    /// # Errors
    /// As [`Weights::bytes`]; `Invalid` when the tensor has another dtype.
    pub fn elements<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        let bytes = self.bytes(name)?;
        let dtype = self.inventory.find(name).map(|number| self.inventory.tensors[number].dtype);
        if dtype != Some(T::DTYPE) {
            return Err(Error::invalid(format!("the tensor has another dtype tensor={name:?} wanted={}", T::DTYPE)));
        }
        Ok(bytemuck::pod_collect_to_vec(bytes))
    }

    /// Reads all bytes and compares their digests with those of the version.
    ///
    /// # Errors
    /// `Corrupt`, naming the version and the first tensor whose bytes differ from the published ones.
    pub fn verify(&self) -> Result<()> {
        for (number, tensor) in self.inventory.tensors.iter().enumerate() {
            if tensor.holder == number && Digest::of(self.of(number)) != tensor.digest {
                let what = format!("weights in memory are not what was published tensor={:?}", tensor.name);
                let error = Error::corrupt(what);
                return Err(match self.holding {
                    Some(holding) => error.with_step(holding.version),
                    None => error,
                });
            }
        }
        Ok(())
    }

    /// Whether there is no version and no lent memory.
    pub(super) fn is_fresh(&self) -> bool {
        self.holding.is_none() && self.lent.is_empty() && !self.strict
    }

    pub(super) fn holding(&self) -> Option<Holding> {
        self.holding.filter(|_| !self.poisoned)
    }

    /// The inventory of the tensors.
    pub(super) fn inventory(&self) -> &Inventory {
        &self.inventory
    }

    /// The bytes of a tensor by its number.
    pub(super) fn of(&self, number: usize) -> &[u8] {
        let holder = self.inventory.tensors.get(number).map_or(number, |tensor| tensor.holder);
        self.memory.get(holder).map_or(&[], Memory::bytes)
    }

    /// The memory of every tensor, in the order of the inventory. The entries of aliases and of lent memory
    /// are empty.
    pub(super) fn into_memory(self) -> (Inventory, Vec<Vec<u8>>) {
        let own = |memory| if let Memory::Own(bytes) = memory { bytes } else { Vec::new() };
        (self.inventory, self.memory.into_iter().map(own).collect())
    }

    /// Returns a copy in newly allocated memory.
    pub(super) fn copied(&self) -> Weights<'static> {
        let memory = self.memory.iter().map(|memory| Memory::Own(memory.bytes().to_vec())).collect();
        let (holding, inventory, poisoned) = (self.holding, self.inventory.clone(), self.poisoned);
        Weights { holding, inventory, memory, poisoned, ..Weights::new() }
    }

    /// Checks a delta against these weights, without writing: base, structure, columns, and the digests of
    /// every tensor and of the state that would result.
    ///
    /// # Errors
    /// `Invalid` when the delta was made for another base, `Corrupt` when its result would have another
    /// digest than the delta says. Both name version and tensor.
    pub(super) fn check(&self, delta: &Delta) -> Result<Inventory> {
        let manifest = &delta.manifest;
        let located = |error: Error| error.with_step(manifest.number);
        let after = self.inventory.after(manifest)?;
        let here = self.holding().map(|holding| holding.state);
        if here != Some(manifest.base.state) && !super::blind() {
            let what = "a delta was made for another base";
            let (base, version) = (manifest.base.version, self.version());
            return Err(located(Error::invalid(format!("{what} base_version={base} here={version:?}"))));
        }
        in_parallel(delta.patches.len(), |index| {
            let (entry, patch) = (&manifest.tensors[index], &delta.patches[index]);
            let number = self.inventory.find(&entry.name).unwrap_or_default();
            let named = |error: Error| {
                let what = format!("{} tensor={:?}", error.message(), entry.name);
                located(Error::new(error.kind(), what).with_path(&delta.path))
            };
            let found = delta::check(self.of(number), entry.base, Numbers::of(entry.dtype), patch).map_err(named)?;
            if found == entry.result || super::blind() {
                return Ok(());
            }
            Err(named(Error::corrupt("a delta would give other bytes than were published")))
        })?;
        if after.digest() != manifest.state && !super::blind() {
            let what = "a delta would give another state than was published";
            return Err(located(Error::corrupt(what).with_path(&delta.path)));
        }
        Ok(after)
    }

    /// Applies a delta that [`Weights::check`] has accepted, and that results in `after`.
    ///
    /// # Errors
    /// Errors that the check did not find. The weights are then unusable until a full version is loaded.
    pub(super) fn apply(&mut self, delta: &Delta, after: Inventory) -> Result<()> {
        self.poisoned = true;
        let mut memory: Vec<Option<&mut Memory<'a>>> = self.memory.iter_mut().map(Some).collect();
        let mut changes = Vec::with_capacity(delta.patches.len());
        for (entry, patch) in delta.manifest.tensors.iter().zip(&delta.patches) {
            let number = self.inventory.find(&entry.name);
            let taken = number.and_then(|number| memory.get_mut(number)?.take());
            let gone = || Error::internal(format!("a delta lost its tensor tensor={:?}", entry.name));
            changes.push((taken.ok_or_else(gone)?.bytes_mut(), Numbers::of(entry.dtype), patch));
        }
        let changes: Vec<_> = changes.into_iter().map(Mutex::new).collect();
        in_parallel(changes.len(), |index| {
            let mut change = lock(&changes[index]);
            let (bytes, numbers, patch) = &mut *change;
            delta::apply(bytes, *numbers, patch)
        })?;
        drop(changes);
        self.inventory = after;
        self.holding = Some(delta.holding());
        self.poisoned = false;
        Ok(())
    }

    /// Refuses a full version whose tensors do not fit the lent memory.
    pub(super) fn fits(&self, version: u64, full: &Inventory) -> Result<()> {
        let refuse = |name: &str, what: &str| Err(Error::invalid(format!("{what} tensor={name:?}")).with_step(version));
        let known = self.inventory.tensors.iter().zip(&self.memory);
        let known = known.filter(|(_, memory)| matches!(memory, Memory::Lent(_)));
        let known = known.map(|(tensor, _)| (&tensor.name, tensor.dtype, &tensor.shape));
        let lent = self.lent.iter().map(|(name, (dtype, shape, _))| (name, *dtype, shape));
        let mut numbers = BTreeSet::new();
        for (name, dtype, shape) in known.chain(lent) {
            let Some(number) = full.find(name).filter(|number| full.tensors[*number].holder == *number) else {
                return refuse(name, "the version does not have a tensor for which memory is lent");
            };
            if !full.tensors[number].is_like(dtype, shape) {
                return refuse(name, "memory is lent for a tensor of another dtype or shape than the version has");
            }
            numbers.insert(number);
        }
        for (name, holder) in &self.tied {
            let [one, other] =
                [name, holder].map(|name| full.find(name).and_then(|n| full.tensors.get(n)).map(|t| t.holder));
            if one.is_none() || one != other {
                let what = format!("one memory is lent for two tensors, which the version has apart other={holder:?}");
                return refuse(name, &what);
            }
        }
        let without = |(number, tensor): &(usize, &Tensor)| tensor.holder == *number && !numbers.contains(number);
        match full.tensors.iter().enumerate().find(without).filter(|_| self.strict) {
            Some((_, tensor)) => refuse(&tensor.name, "the version has a tensor for which no memory is lent"),
            None => Ok(()),
        }
    }

    /// Reads a full version into the weights. Every byte is checked as it arrives.
    ///
    /// # Errors
    /// Errors of the storage. The weights are then unusable until a full version is loaded, unless nothing
    /// was written.
    pub(super) fn load(&mut self, full: &Checkpoint, inventory: Inventory) -> Result<()> {
        self.fits(full.step(), &inventory)?;
        let known = self.inventory.tensors.iter().zip(&self.memory);
        let known = known.map(|(tensor, memory)| (tensor.name.as_str(), memory.bytes().len()));
        let lent = self.lent.iter().map(|(name, (.., lent))| (name.as_str(), lent.len()));
        let known: BTreeMap<_, _> = known.chain(lent).collect();
        // Memory is allocated before any is released. So if it fails, the weights stay unchanged.
        let mut made = Vec::with_capacity(inventory.tensors.len());
        for (number, tensor) in inventory.tensors.iter().enumerate() {
            let len = if tensor.holder == number { tensor.len() } else { 0 };
            let is_kept = known.get(tensor.name.as_str()) == Some(&len);
            made.push(if is_kept { None } else { Some(zeroed(len, tensor)?) });
        }
        self.poisoned = true;
        let mut old: BTreeMap<String, Memory<'a>> = BTreeMap::new();
        for (tensor, memory) in std::mem::take(&mut self.inventory.tensors).into_iter().zip(self.memory.drain(..)) {
            old.insert(tensor.name, memory);
        }
        old.extend(std::mem::take(&mut self.lent).into_iter().map(|(name, (.., lent))| (name, Memory::Lent(lent))));
        let mut kept = |tensor: &Tensor| old.remove(&tensor.name).unwrap_or_else(|| Memory::Own(Vec::new()));
        let memory = inventory.tensors.iter().zip(made);
        let memory = memory.map(|(tensor, made)| made.map_or_else(|| kept(tensor), Memory::Own)).collect();
        self.memory = memory;
        self.inventory = inventory;
        let mut targets = Targets::new();
        for (number, (tensor, memory)) in self.inventory.tensors.iter().zip(&mut self.memory).enumerate() {
            if tensor.holder == number {
                targets = targets.bytes(tensor.name.clone(), memory.bytes_mut());
            }
        }
        full.read_into(targets)?;
        let state = self.inventory.digest();
        self.holding = Some(Holding { version: full.step(), attempt: full.attempt(), state });
        self.poisoned = false;
        Ok(())
    }
}

impl fmt::Debug for Weights<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Weights");
        out.field("version", &self.version()).field("tensors", &self.inventory.tensors.len()).finish()
    }
}

fn zeroed(len: usize, tensor: &Tensor) -> Result<Vec<u8>> {
    let no_memory =
        || Error::new(ErrorKind::Busy, format!("no memory for a tensor tensor={:?} bytes={len}", tensor.name));
    Ok(bytemuck::allocation::try_zeroed_slice_box(len).map_err(|()| no_memory())?.into())
}

/// Calls `f` with every number below `count`, in several threads if there is more than one number.
///
/// # Errors
/// The first error of `f`. Some numbers are left out then.
pub(super) fn in_parallel(count: usize, f: impl Fn(usize) -> Result<()> + Sync) -> Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(count).min(16);
    if threads < 2 {
        return (0..count).try_for_each(f);
    }
    let (next, f) = (&AtomicUsize::new(0), &f);
    let work = move || {
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return Ok(());
            }
            f(index).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let panicked = || Error::internal("a thread panicked while it worked on a delta");
        let first: Result<()> = work();
        others.into_iter().map(|other| other.join().unwrap_or_else(|_| Err(panicked()))).fold(first, Result::and)
    })
}
