//! The publisher's copy of a version, and the delta from one version to the next.

use super::inventory::{Holding, Inventory};
use super::reading::aligned;
use super::weights::{Weights, in_parallel};
use crate::checkpoint::Checkpoint;
use crate::delta::{self, Base, Column, Entry, FILE, Form, Manifest, Numbers, Patch};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::entries::MANIFEST;
use crate::format::shard::Stamp;
use crate::memory::AlignedBuffer;
use crate::storage::memory::Files;
use crate::storage::{Memory, Storage, Writing};
use crate::sync::{Mutex, lock};
use std::ops::Range;
use std::sync::Arc;

/// A version in host memory.
pub(super) struct Held {
    pub holding: Holding,
    pub inventory: Inventory,
    /// By the number of the tensor. The entries of aliases are empty.
    parts: Vec<(Arc<Vec<u8>>, Range<usize>)>,
    /// The files of the step, if it was staged by this publisher.
    pub files: Option<Arc<Files>>,
    /// The length of those files.
    pub bytes: u64,
}

impl Held {
    /// Reads the step `name` that was staged in `memory`, and removes it from there.
    ///
    /// # Errors
    /// `Invalid` when a tensor lies in several boxes.
    pub fn staged(memory: &Memory, name: &str) -> Result<(Self, Checkpoint)> {
        let step = Checkpoint::from_storage(Arc::new(memory.clone()), name)?;
        let files = memory.files(name).ok_or_else(|| Error::internal("a staged version was lost"))?;
        memory.remove(name)?;
        let (inventory, places) = Inventory::of(&step)?;
        let entries = step.contents()?.files;
        let mut parts = Vec::with_capacity(inventory.tensors.len());
        for (number, (tensor, (file, offset))) in inventory.tensors.iter().zip(places).enumerate() {
            let lost = || Error::internal(format!("a staged tensor was lost tensor={:?}", tensor.name));
            let bytes = entries.get(file).and_then(|entry| files.get(&entry.name)).ok_or_else(lost)?;
            let begin = usize::try_from(offset).map_err(|_| lost())?;
            let length = if tensor.holder == number { tensor.len() } else { 0 };
            let range = begin..begin + length;
            bytes.get(range.clone()).ok_or_else(lost)?;
            parts.push((bytes.clone(), range));
        }
        let holding = super::listing::holding(&step, &inventory);
        let bytes = step.bytes();
        Ok((Self { holding, inventory, parts, files: Some(files), bytes }, step))
    }

    /// A version that was read from a chain.
    pub fn read(weights: Weights<'static>, holding: Holding, bytes: u64) -> Self {
        let (inventory, memory) = weights.into_memory();
        let parts = memory.into_iter().map(|bytes| {
            let range = 0..bytes.len();
            (Arc::new(bytes), range)
        });
        Self { holding, inventory, parts: parts.collect(), files: None, bytes }
    }

    fn of(&self, number: usize) -> &[u8] {
        self.parts.get(number).map_or(&[], |(bytes, range)| bytes.get(range.clone()).unwrap_or_default())
    }
}

/// A delta that is ready to be written.
pub(super) struct Encoded {
    pub manifest: Manifest,
    file: AlignedBuffer,
    text: Vec<u8>,
}

impl Encoded {
    /// The length of its files.
    pub fn bytes(&self) -> u64 {
        self.manifest.bytes + self.text.len() as u64
    }

    /// The number of elements that changed.
    pub fn changed(&self) -> u64 {
        self.manifest.tensors.iter().map(|entry| entry.changed).sum()
    }

    /// Writes its files.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn write(&self, to: &dyn Writing) -> Result<()> {
        to.put(FILE, &self.file)?;
        to.put(MANIFEST, &self.text)
    }
}

/// A patch, with the positions that it changes. None until a thread has made the patch.
type Made = Mutex<Option<(Patch, Vec<u64>)>>;

/// Returns the delta from `base` to `new`, which has the same names, dtypes and shapes, with the values and
/// metadata of `step`. Every patch is checked against the digest that the save computed, as a follower would
/// check it.
///
/// # Errors
/// `Internal` when a patch would not result in `new`: nothing must be published then.
pub(super) fn encode(base: &Held, new: &Held, step: &Checkpoint, form: Form) -> Result<Encoded> {
    let patches: Vec<Made> = new.inventory.tensors.iter().map(|_| Mutex::new(None)).collect();
    in_parallel(patches.len(), |number| {
        let (old, tensor) = (&base.inventory.tensors[number], &new.inventory.tensors[number]);
        // A digest of 64 bits stands for the bytes, as in the files on disk.
        if tensor.holder != number || old.digest == tensor.digest {
            return Ok(());
        }
        let (before, after) = (base.of(number), new.of(number));
        let numbers = Numbers::of(tensor.dtype);
        let patch = delta::encode(before, after, numbers, form)?;
        let found = patch.as_ref().map(|patch| delta::check(before, old.digest, numbers, patch)).transpose()?;
        if found != Some(tensor.digest) {
            let what = format!("a patch would not give the tensor that was saved tensor={:?}", tensor.name);
            return Err(Error::internal(what));
        }
        *lock(&patches[number]) = patch.map(|patch| packed(patch, form)).transpose()?;
        Ok(())
    })?;
    let Holding { version, attempt, state } = base.holding;
    let of_base = Base { version, attempt, state };
    let mut manifest = Manifest::new(new.holding.version, new.holding.attempt, of_base, new.holding.state, form);
    (manifest.metadata, manifest.values) = (step.manifest().metadata.clone(), step.manifest().values.clone());
    let mut columns = Vec::new();
    for (number, patch) in patches.into_iter().enumerate() {
        let Some(patch) = patch.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) else { continue };
        let tensor = &new.inventory.tensors[number];
        manifest.tensors.push(Entry {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.clone(),
            how: patch.0.how,
            changed: patch.0.changed,
            base: base.inventory.tensors[number].digest,
            result: tensor.digest,
            columns: patch.0.columns.iter().zip(patch.1).map(|(bytes, plain)| column(bytes, plain)).collect(),
        });
        columns.extend(patch.0.columns);
    }
    let header = manifest.lay_out()?;
    let mut file = aligned(manifest.bytes)?;
    let stamp = Stamp::new(manifest.number, manifest.attempt);
    let (head, mut rest) = file.split_at_mut(header.len() as usize);
    header.copy(&stamp, 0, head);
    for column in columns {
        let (to, after) = rest.split_at_mut(column.len());
        to.copy_from_slice(&column);
        rest = after;
    }
    let text = manifest.to_bytes()?;
    Ok(Encoded { manifest, file, text })
}

fn column(bytes: &[u8], plain: u64) -> Column {
    Column { name: String::new(), begin: 0, length: bytes.len() as u64, plain, digest: Digest::of(bytes) }
}

/// Returns the patch as it is written, and the lengths of its columns before compression.
fn packed(mut patch: Patch, form: Form) -> Result<(Patch, Vec<u64>)> {
    let plain = patch.columns.iter().map(|column| column.len() as u64).collect();
    if form == Form::Zstd {
        patch.columns = patch.columns.iter().map(|column| delta::pack(column)).collect::<Result<_>>()?;
    }
    Ok((patch, plain))
}
