//! Reads a version from its directory: its manifest, and its changes.

use super::inventory::{Holding, Inventory};
use crate::delta::{self, Entry, FILE, Form, Manifest, Patch};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::MANIFEST;
use crate::memory::AlignedBuffer;
use crate::storage::{FileReading, Reading};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The longest manifest of a delta that is read. A delta of some million tensors has one.
const MANIFEST_MAX: u64 = 1 << 30;

/// A delta whose files were read and checked.
#[derive(Clone, Debug)]
pub(super) struct Delta {
    pub manifest: Manifest,
    /// One patch for each tensor in the manifest.
    pub patches: Vec<Patch>,
    pub path: PathBuf,
}

impl Delta {
    /// Returns the version that results.
    pub fn holding(&self) -> Holding {
        let Manifest { number, attempt, state, .. } = self.manifest;
        Holding { version: number, attempt, state }
    }

    /// Reads the delta of an open version, for tensors like those of `base`. The manifest is compared with
    /// them before its columns are read: the shapes of the base bound the length of the columns.
    ///
    /// # Errors
    /// `NotFound` when a file is gone; `Invalid` when the delta was made for other tensors; `Corrupt`, naming
    /// version and tensor, when a byte differs from what was written.
    pub fn read(reading: &dyn Reading, path: &Path, base: &Inventory) -> Result<Self> {
        let manifest = Manifest::parse(&manifest_bytes(reading, path)?).map_err(|e| e.with_path(path))?;
        base.after(&manifest).map_err(|e| e.with_path(path))?;
        let located = |error: Error| error.with_step(manifest.number).with_path(path.join(FILE));
        let file = reading.open(FILE).map_err(located)?;
        if file.len() != manifest.bytes {
            let (expected, found) = (manifest.bytes, file.len());
            let what = format!("a delta has the wrong length expected_bytes={expected} found_bytes={found}");
            return Err(located(Error::corrupt(what)));
        }
        let patch = |entry: &Entry| patch(file.as_ref(), entry, manifest.form).map_err(located);
        let patches = manifest.tensors.iter().map(patch).collect::<Result<_>>()?;
        Ok(Self { manifest, patches, path: path.into() })
    }
}

fn patch(file: &dyn FileReading, entry: &Entry, form: Form) -> Result<Patch> {
    let mut columns = Vec::with_capacity(entry.columns.len());
    for column in &entry.columns {
        let named = |error: Error| {
            let what = format!("{} tensor={:?} column={:?}", error.message(), entry.name, column.name);
            Error::new(error.kind(), what).with_source_of(&error)
        };
        let mut bytes = memory(column.length).map_err(named)?;
        file.read_at(column.begin, &mut bytes).map_err(named)?;
        if Digest::of(&bytes) != column.digest {
            return Err(named(Error::corrupt("a column of a delta is not what was written")));
        }
        let plain = || usize::try_from(column.plain).map_err(|_| no_memory(column.plain));
        columns.push(match form {
            Form::Zstd => plain().and_then(|plain| delta::unpack(&bytes, plain)).map_err(named)?,
            _ => bytes,
        });
    }
    Ok(Patch { how: entry.how, changed: entry.changed, columns })
}

/// Returns the bytes of the manifest of an open version.
///
/// # Errors
/// `NotFound` when there is no manifest; `Corrupt` when it is longer than any valid one.
pub(super) fn manifest_bytes(reading: &dyn Reading, path: &Path) -> Result<Vec<u8>> {
    let located = |error: Error| error.with_path(path.join(MANIFEST));
    let file = reading.open(MANIFEST).map_err(located)?;
    if file.len() > MANIFEST_MAX {
        return Err(located(Error::corrupt(format!("a manifest cannot have this length bytes={}", file.len()))));
    }
    let mut bytes = memory(file.len()).map_err(located)?;
    file.read_at(0, &mut bytes).map_err(located)?;
    Ok(bytes)
}

/// Returns the first bytes of the manifest of an open version, at most 64.
pub(super) fn manifest_head(reading: &dyn Reading) -> Result<Vec<u8>> {
    let file: Arc<dyn FileReading> = reading.open(MANIFEST)?;
    let mut head = vec![0; file.len().min(64) as usize];
    file.read_at(0, &mut head)?;
    Ok(head)
}

/// Returns zeroed memory of this length, aligned as the storage requires to read whole files.
fn memory(length: u64) -> Result<Vec<u8>> {
    let length = usize::try_from(length).map_err(|_| no_memory(length))?;
    Ok(bytemuck::allocation::try_zeroed_slice_box(length).map_err(|()| no_memory(length as u64))?.into())
}

fn no_memory(bytes: u64) -> Error {
    Error::new(ErrorKind::Busy, format!("no memory for a part of a delta bytes={bytes}"))
}

/// Returns an aligned copy, which the storage can write without the page cache.
pub(super) fn aligned(length: u64) -> Result<AlignedBuffer> {
    let length = usize::try_from(length).map_err(|_| no_memory(length))?;
    AlignedBuffer::try_new(length).ok_or_else(|| no_memory(length as u64))
}
