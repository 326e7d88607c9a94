//! Opens a step: its manifest, its tables and its files. Says why an open failed.

use super::Checkpoint;
use super::tables::Directory;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::columns::FileRow;
use crate::format::entries::MANIFEST;
use crate::format::index::Index;
use crate::format::manifest::Sealed;
use crate::format::seal::{is_blank, is_ours};
use crate::format::shard;
use crate::format::unique;
use crate::id::{Attempt, parse_step_name, step_name};
use crate::memory::{ALIGNMENT, AlignedBuffer};
use crate::storage::{FileReading, Reading, Storage};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::SystemTime;

/// If a step has up to this many files, every file is opened and checked when the step is opened.
const CHECKED: usize = 1000;

pub(crate) struct Opened {
    pub name: String,
    pub path: PathBuf,
    pub bytes: u64,
    pub index: Arc<Index>,
    pub files: Files,
    /// The directory.
    pub reading: Arc<dyn Reading>,
    /// When the manifest was written, if the storage knows.
    pub modified: Option<SystemTime>,
}

impl Checkpoint {
    /// True if another tensor holds the bytes of the tensor with this number.
    #[doc(hidden)]
    pub fn is_alias(&self, number: usize) -> Result<bool> {
        self.opened.index.is_alias(number).map_err(|e| self.unlisted(e))
    }
}

/// Why an open failed. Listing, overwriting and pruning all use this.
pub(crate) enum Failure {
    /// Nothing exists under the name.
    Absent(Error),
    /// Another program made what is under the name.
    Foreign(Error),
    /// The storage does not answer, so the contents are unknown.
    Unknown(Error),
    /// This library made the step, and one of its files is missing.
    Gone(Error),
    /// This library made the step, but the step cannot be opened. The error is `Corrupt` when its bytes are
    /// not the bytes that were written.
    Broken(Error),
}

impl Failure {
    /// True for a step of this library whose bytes are not the bytes that were written.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Gone(_) => true,
            Self::Broken(error) => error.kind() == ErrorKind::Corrupt,
            Self::Absent(_) | Self::Foreign(_) | Self::Unknown(_) => false,
        }
    }

    pub fn into_error(self) -> Error {
        match self {
            Self::Absent(error) | Self::Foreign(error) | Self::Unknown(error) | Self::Broken(error) => error,
            Self::Gone(error) => {
                let (step, path) = (error.step(), error.path().map(Path::to_path_buf));
                let mut missing = Error::corrupt("a file of the checkpoint is missing").with_source(error);
                if let Some(step) = step {
                    missing = missing.with_step(step);
                }
                if let Some(path) = path { missing.with_path(path) } else { missing }
            }
        }
    }
}

impl Opened {
    pub fn new(storage: &dyn Storage, name: &str, path: &Path) -> Result<Self, Failure> {
        let missing = |error: &Error| error.kind() == ErrorKind::NotFound;
        let reading = storage.open(name).map_err(|error| {
            let failure = if missing(&error) { Failure::Absent } else { Failure::Unknown };
            failure(error.with_path(path))
        })?;
        Self::of(reading, name, path)
    }

    /// Opens the step whose directory is `reading`.
    pub fn of(reading: Arc<dyn Reading>, name: &str, path: &Path) -> Result<Self, Failure> {
        let missing = |error: &Error| error.kind() == ErrorKind::NotFound;
        let owned = || ours(reading.as_ref(), name).map_err(|error| Failure::Unknown(error.with_path(path)));
        let manifest_path = path.join(MANIFEST);
        let file = match reading.open(MANIFEST) {
            Err(error) if missing(&error) && owned()? => return Err(Failure::Gone(error.with_path(manifest_path))),
            Err(error) if missing(&error) => return Err(Failure::Foreign(error.with_path(path))),
            // The manifest's name is a link, or the storage does not answer.
            Err(error) => return Err(Failure::Unknown(error.with_path(path))),
            Ok(file) => file,
        };
        let read = || {
            let bytes = read_whole(file.as_ref()).map_err(|error| Failure::Unknown(error.with_path(&manifest_path)))?;
            Ok(Sealed::parse(&bytes))
        };
        let mut parsed = read()?;
        if parsed.is_err() && reading.access().again {
            parsed = read()?;
        }
        let manifest = match parsed {
            Ok(manifest) => manifest,
            Err(error) if owned()? => return Err(Failure::Broken(error.with_path(manifest_path))),
            Err(error) => return Err(Failure::Foreign(error.with_path(manifest_path))),
        };
        let (modified, length) = (file.modified(), file.len());
        let medium = Directory::new(reading.clone(), path);
        let step = manifest.step();
        let index = Index::new(manifest, Box::new(medium)).map_err(|error| {
            let gone = missing(&error);
            let error = error.with_step(step);
            if gone { Failure::Gone(error) } else { Failure::Broken(error) }
        })?;
        let bytes = index.manifest().bytes.saturating_add(length);
        let index = Arc::new(index);
        let files = Files::new(index.clone(), reading.clone(), path);
        if index.files() <= CHECKED || index.manifest().tables.is_empty() {
            files.check()?;
        }
        Ok(Self { name: name.into(), path: path.into(), bytes, index, files, reading, modified })
    }
}

impl Opened {
    /// Reads the values in the file of a rank that wrote no tensor.
    ///
    /// # Errors
    /// `Corrupt`, with the path, when the file differs from what was written, or is not JSON.
    pub fn values(&self, number: usize) -> Result<BTreeMap<String, serde_json::Value>> {
        let (file, entry) = (self.files.get(number)?, &self.index.file(number)?.entry);
        let locate = |error: Error| error.with_path(self.path.join(&entry.name));
        let mut bytes = read_whole(file).map_err(locate)?;
        if Digest::of(&bytes) != entry.digest && self.reading.access().again {
            bytes = read_whole(file).map_err(locate)?;
        }
        if Digest::of(&bytes) != entry.digest {
            return Err(locate(Error::corrupt("the values of a rank are not what was written")));
        }
        let read = unique::from_slice(&bytes);
        read.map_err(|e| locate(Error::corrupt("the values of a rank cannot be read").with_source(e)))
    }
}

/// The files of a step, each opened and checked when it is first used.
pub(crate) struct Files {
    index: Arc<Index>,
    reading: Arc<dyn Reading>,
    path: PathBuf,
    open: Vec<OnceLock<Arc<dyn FileReading>>>,
}

impl Files {
    fn new(index: Arc<Index>, reading: Arc<dyn Reading>, path: &Path) -> Self {
        let open = std::iter::repeat_with(OnceLock::new).take(index.files()).collect();
        Self { index, reading, path: path.into(), open }
    }

    /// Opens all files.
    fn check(&self) -> Result<(), Failure> {
        let broken = |error: Error| {
            let error = error.with_step(self.index.manifest().step);
            if error.kind() == ErrorKind::NotFound { Failure::Gone(error) } else { Failure::Broken(error) }
        };
        self.index.all_files().map_err(broken)?;
        let threads = self.reading.access().in_flight.unwrap_or(1).min(self.open.len());
        let (next, first) = (AtomicUsize::new(0), OnceLock::new());
        let open = || {
            while first.get().is_none() {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= self.open.len() {
                    return;
                }
                if let Err(error) = self.get(number) {
                    _ = first.set(error);
                }
            }
        };
        thread::scope(|scope| {
            for _ in 1..threads {
                // If no other thread can be started, this thread opens all files, only slower.
                if thread::Builder::new().name("ashore-open".into()).spawn_scoped(scope, open).is_err() {
                    break;
                }
            }
            open();
        });
        first.into_inner().map_or(Ok(()), |error| Err(broken(error)))
    }

    /// Returns the file with this number, opened.
    pub fn get(&self, number: usize) -> Result<&dyn FileReading> {
        let none = || Error::internal(format!("no such file index={number}"));
        let cell = self.open.get(number).ok_or_else(none)?;
        if let Some(file) = cell.get() {
            return Ok(file.as_ref());
        }
        let row = self.index.file(number)?;
        let mut opened = open_file(self.reading.as_ref(), row);
        if opened.as_ref().is_err_and(|e| e.kind() == ErrorKind::Corrupt) && self.reading.access().again {
            opened = open_file(self.reading.as_ref(), row);
        }
        let file = opened.map_err(|e| e.with_path(self.path.join(&row.entry.name)))?;
        Ok(cell.get_or_init(|| file).as_ref())
    }
}

/// How many shards are searched for the metadata of this library.
const MARKED: usize = 8;

/// True when this library made the step `name`, however damaged the step is. One of four facts shows this:
/// the storage has recorded it; the manifest begins as this library's manifests do; the manifest is empty,
/// zeroed or cut, and `name` is a name that this library gives; or a shard's header has the metadata of a
/// save.
fn ours(reading: &dyn Reading, name: &str) -> Result<bool> {
    if reading.is_recorded() {
        return Ok(true);
    }
    let missing = |error: &Error| error.kind() == ErrorKind::NotFound;
    match reading.open(MANIFEST) {
        Err(error) if missing(&error) => {}
        manifest => {
            let (manifest, mut head) = (manifest?, [0; 64]);
            let head = &mut head[..manifest.len().min(64) as usize];
            manifest.read_at(0, head)?;
            let canonical = || parse_step_name(name).is_some_and(|step| step_name(step) == name);
            if is_ours(head) || is_blank(head) && canonical() {
                return Ok(true);
            }
        }
    }
    let mut shards: Vec<_> = reading.list()?.into_iter().filter(|file| file.ends_with(".safetensors")).collect();
    shards.sort_unstable();
    for shard in shards.iter().take(MARKED) {
        match reading.open(shard).and_then(|file| mark(file.as_ref())) {
            Ok(_) => return Ok(true),
            Err(error) if missing(&error) || error.kind() == ErrorKind::Corrupt => {}
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}

/// Refuses to replace a directory `name` that this library did not make. An unused name is accepted.
pub(crate) fn replaceable(storage: &dyn Storage, name: &str) -> Result<()> {
    let reading = match storage.open(name) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        reading => reading?,
    };
    if ours(reading.as_ref(), name)? {
        return Ok(());
    }
    let foreign =
        Error::new(ErrorKind::Conflict, "the directory is not a checkpoint of this library; it is not replaced");
    Err(foreign.with_path(storage.describe(name)))
}

fn read_whole(file: &dyn FileReading) -> Result<AlignedBuffer> {
    let no_memory = || Error::new(ErrorKind::Busy, format!("no memory for a manifest bytes={}", file.len()));
    let len = usize::try_from(file.len()).map_err(|_| no_memory())?;
    // The buffer is aligned: direct I/O then reads the file in one request, instead of many through another
    // buffer.
    let mut bytes = AlignedBuffer::try_new(len).ok_or_else(no_memory)?;
    file.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Reads the step and attempt in a shard's metadata.
fn mark(file: &dyn FileReading) -> Result<(u64, Attempt)> {
    let mut prefix = [0; ALIGNMENT];
    let prefix = &mut prefix[..file.len().min(ALIGNMENT as u64) as usize];
    file.read_at(0, prefix)?;
    shard::identity(prefix)
}

/// Opens a file of a step, and checks that it is the file that was written.
fn open_file(reading: &dyn Reading, row: &FileRow) -> Result<Arc<dyn FileReading>> {
    let FileRow { entry, origin, .. } = row;
    let file = reading.open(&entry.name)?;
    if file.len() != entry.length {
        let (expected, found) = (entry.length, file.len());
        return Err(Error::corrupt(format!(
            "a file has the wrong length expected_bytes={expected} found_bytes={found}"
        )));
    }
    if entry.data > 0 {
        let (step, attempt) = mark(file.as_ref())?;
        if (step, attempt) != *origin {
            let expected = format!("expected={}:{}", origin.0, origin.1);
            return Err(Error::corrupt(format!("a shard belongs to another save {expected} found={step}:{attempt}")));
        }
    }
    Ok(file)
}
