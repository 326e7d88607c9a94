//! A published step, open for reading.

use crate::device::{Device, DeviceChoice, choose};
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::{FileEntry, MANIFEST, TensorEntry};
use crate::format::manifest::Manifest;
use crate::format::seal::{is_blank, is_ours};
use crate::format::shard;
use crate::id::{Attempt, parse_step_name, step_name};
use crate::memory::{ALIGNMENT, AlignedBuffer};
use crate::state::{Dtype, Layout, decode_value};
use crate::storage::local::Local;
use crate::storage::{FileReading, Reading, Storage};
use serde::de::DeserializeOwned;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How often an open starts over when the step is replaced or pruned meanwhile.
const ATTEMPTS: usize = 8;

/// An open step. Its contents stay readable even if the step is replaced or pruned meanwhile.
///
/// Opening reads the manifest and the first 4096 bytes of each shard, but no tensor data: it checks what the
/// step contains, that every file has its length, and that no file belongs to another step or attempt. Tensor
/// bytes are checked against their digests when they are read; [`Checkpoint::verify`] checks all of them.
/// Clones are cheap and share the open files.
///
/// ```
/// use ashore::{Checkpoint, CheckpointExecutor, HostTensor, StateDict, Targets};
/// use std::{sync::Arc, time::Duration};
/// # let root = tempfile::tempdir().unwrap();
/// let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).build()?;
/// let weights = Arc::new((0..6).map(|i| i as f32).collect::<Vec<_>>());
/// let mut state = StateDict::new();
/// state.tensor("weights", HostTensor::new(weights, [2, 3]))?.value("epoch", &7)?;
/// executor.save(100, state)?.wait(Duration::from_secs(60))?;
///
/// let checkpoint = Checkpoint::open(root.path().join("step-00000100"))?;
/// assert_eq!(checkpoint.tensor("weights")?.shape, [2, 3]);
/// assert_eq!(checkpoint.value::<u32>("epoch")?, 7);
/// let mut weights = [0.0_f32; 6];
/// checkpoint.read_into(Targets::new().elements("weights", &mut weights))?;
/// assert_eq!(weights, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
/// let column = checkpoint.read_slice("weights", &[0..2, 1..2])?;
/// assert_eq!(column, [1.0_f32, 4.0].map(f32::to_le_bytes).concat());
/// assert!(checkpoint.verify()?.is_sound());
/// # executor.shutdown(Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone)]
pub struct Checkpoint {
    pub(crate) opened: Arc<Opened>,
    pub(crate) threads: usize,
    /// The device that copies to targets in device memory.
    pub(crate) device: Option<Arc<dyn Device>>,
    pub(crate) timeout: Duration,
}

pub(crate) struct Opened {
    name: String,
    path: PathBuf,
    bytes: u64,
    pub manifest: Manifest,
    /// In the order of `manifest.files`.
    pub files: Vec<Arc<dyn FileReading>>,
    /// The directory.
    pub reading: Arc<dyn Reading>,
    /// When the manifest was written, if the storage knows.
    modified: Option<SystemTime>,
}

/// A tensor's description, without its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct TensorInfo<'a> {
    /// Its name.
    pub name: &'a str,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its dimensions, outermost first.
    pub shape: &'a [usize],
    /// Its length in bytes.
    pub bytes: u64,
}

impl Checkpoint {
    /// Opens the step in the directory `path`. Needs no executor and no arena, and writes nothing.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory, or nothing in it belongs to a checkpoint; `Corrupt`,
    /// naming the file, when the manifest contradicts itself, a file is missing or has another length, or a
    /// shard belongs to another step or attempt.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let given = path.as_ref();
        let path = given.canonicalize().map_err(|e| Error::io("cannot open a checkpoint", e).with_path(given))?;
        let (Some(parent), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            return Err(Error::invalid("a checkpoint needs a parent directory and a name in utf-8").with_path(path));
        };
        Self::from_storage(Arc::new(Local::at(parent)?), name)
    }

    /// Opens the step `name` of `storage`.
    ///
    /// # Errors
    /// As [`Checkpoint::open`].
    pub fn from_storage(storage: Arc<dyn Storage>, name: &str) -> Result<Self> {
        Self::try_open(&storage, name).map_err(Failure::into_error)
    }

    pub(crate) fn try_open(storage: &Arc<dyn Storage>, name: &str) -> Result<Self, Failure> {
        let path = storage.describe(name);
        let mut tries = 1;
        loop {
            match Opened::new(storage.as_ref(), name, &path) {
                Ok(opened) => {
                    let (opened, device) = (Arc::new(opened), None);
                    return Ok(Self { opened, threads: THREADS, device, timeout: RESTORE_TIMEOUT });
                }
                // The step was replaced or pruned while its files were opened, and they are being deleted:
                // open the name again.
                Err(Failure::Gone(_)) if tries < ATTEMPTS => tries += 1,
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Reads with up to `threads` threads, including the caller's. Default: 32, and at most one for each 4
    /// MiB. Each uses a buffer of 2 MiB while it reads.
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads.max(1);
        self
    }

    /// Sets the device that copies to [targets in device memory](crate::Targets::device). A checkpoint opened
    /// by an executor already has the executor's device.
    ///
    /// # Errors
    /// `Unavailable` or `Device`, naming what is missing, if a GPU was requested and is not available.
    pub fn with_device(self, choice: DeviceChoice) -> Result<Self> {
        Ok(self.with_made_device(choose(choice)?.0))
    }

    /// Sets a device that exists already.
    #[doc(hidden)]
    pub fn with_made_device(mut self, device: Arc<dyn Device>) -> Self {
        self.device = Some(device);
        self
    }

    /// Sets how long a read waits for copies to a device that make no progress. Default: 10 minutes.
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The step.
    pub fn step(&self) -> u64 {
        self.opened.manifest.step
    }

    /// The attempt that was published.
    pub fn attempt(&self) -> Attempt {
        self.opened.manifest.attempt
    }

    /// The number of ranks that wrote it.
    pub fn world(&self) -> u32 {
        self.opened.manifest.world
    }

    /// The path under which it was opened.
    pub fn path(&self) -> &Path {
        &self.opened.path
    }

    /// The name of its directory.
    pub fn name(&self) -> &str {
        &self.opened.name
    }

    /// The total length of its files, including the manifest.
    pub fn bytes(&self) -> u64 {
        self.opened.bytes
    }

    /// When it was written, by the clock of the storage; None if unknown. A copy of a step may have another
    /// time.
    pub fn modified(&self) -> Option<SystemTime> {
        self.opened.modified
    }

    /// The manifest: every file, tensor, value and digest.
    #[doc(hidden)]
    pub fn manifest(&self) -> &Manifest {
        &self.opened.manifest
    }

    /// Every tensor, sorted by name.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = TensorInfo<'_>> {
        self.opened.manifest.tensors.iter().map(TensorInfo::of)
    }

    /// The tensors whose names begin with `prefix`, sorted by name.
    pub fn with_prefix<'a>(&'a self, prefix: &str) -> impl ExactSizeIterator<Item = TensorInfo<'a>> + use<'a> {
        let tensors = &self.opened.manifest.tensors;
        let start = tensors.partition_point(|tensor| tensor.name.as_str() < prefix);
        let tail = tensors.get(start..).unwrap_or_default();
        let len = tail.partition_point(|tensor| tensor.name.starts_with(prefix));
        tail.get(..len).unwrap_or_default().iter().map(TensorInfo::of)
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// `NotFound`, naming the tensor and the path.
    pub fn tensor(&self, name: &str) -> Result<TensorInfo<'_>> {
        self.entry(name).map(TensorInfo::of)
    }

    pub(crate) fn entry(&self, name: &str) -> Result<&TensorEntry> {
        let tensors = &self.opened.manifest.tensors;
        let found = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok();
        found.and_then(|index| tensors.get(index)).ok_or_else(|| self.missing("tensor", name))
    }

    /// Decodes the value `name`, without reading tensor data.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Invalid` when it is not a `T`; both name the value and the path.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.decode("value", name, self.opened.manifest.values.get(name))
    }

    /// Decodes the user metadata under `key`.
    ///
    /// # Errors
    /// As [`Checkpoint::value`].
    pub fn metadata<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.decode("metadata", key, self.opened.manifest.metadata.get(key))
    }

    /// The names of all values, sorted.
    pub fn value_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.opened.manifest.values.keys().map(String::as_str)
    }

    /// The keys of all user metadata, sorted.
    pub fn metadata_keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.opened.manifest.metadata.keys().map(String::as_str)
    }

    fn decode<T: DeserializeOwned>(&self, what: &str, name: &str, value: Option<&serde_json::Value>) -> Result<T> {
        let value = value.ok_or_else(|| self.missing(what, name))?;
        decode_value(value).map_err(|e| {
            let wanted = std::any::type_name::<T>();
            let wrong = Error::invalid(format!("the {what} has another type {what}={name:?} wanted={wanted}"));
            self.located(wrong.with_source_of(&e))
        })
    }

    fn missing(&self, what: &str, name: &str) -> Error {
        self.located(Error::new(ErrorKind::NotFound, format!("no such {what} in the checkpoint {what}={name:?}")))
    }

    /// Adds step and path to an error.
    pub(crate) fn located(&self, error: Error) -> Error {
        error.with_step(self.step()).with_path(self.path())
    }
}

impl fmt::Debug for Checkpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Checkpoint");
        out.field("step", &self.step()).field("attempt", &self.attempt()).field("path", &self.path()).finish()
    }
}

impl<'a> TensorInfo<'a> {
    fn of(entry: &'a TensorEntry) -> Self {
        let bytes = Layout::new(entry.dtype, &entry.shape).bytes().unwrap_or_default();
        Self { name: &entry.name, dtype: entry.dtype, shape: &entry.shape, bytes }
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
    /// This library made the step, and it cannot be opened: `Corrupt` when its bytes are not those written.
    Broken(Error),
}

impl Failure {
    /// True for a step of this library whose bytes are not those written.
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
    fn new(storage: &dyn Storage, name: &str, path: &Path) -> Result<Self, Failure> {
        let missing = |error: &Error| error.kind() == ErrorKind::NotFound;
        let reading = storage.open(name).map_err(|error| {
            let failure = if missing(&error) { Failure::Absent } else { Failure::Unknown };
            failure(error.with_path(path))
        })?;
        let owned = || ours(reading.as_ref(), name).map_err(|error| Failure::Unknown(error.with_path(path)));
        let manifest_path = path.join(MANIFEST);
        let file = match reading.open(MANIFEST) {
            Err(error) if missing(&error) && owned()? => return Err(Failure::Gone(error.with_path(manifest_path))),
            Err(error) if missing(&error) => return Err(Failure::Foreign(error.with_path(path))),
            // The manifest's name is a link, or the storage does not answer.
            Err(error) => return Err(Failure::Unknown(error.with_path(path))),
            Ok(file) => file,
        };
        let bytes = read_whole(file.as_ref()).map_err(|error| Failure::Unknown(error.with_path(&manifest_path)))?;
        let manifest = match Manifest::parse(&bytes) {
            Ok(manifest) => manifest,
            Err(error) if owned()? => return Err(Failure::Broken(error.with_path(manifest_path))),
            Err(error) => return Err(Failure::Foreign(error.with_path(manifest_path))),
        };
        let modified = file.modified();
        let mut bytes = file.len();
        let mut files = Vec::new();
        for entry in &manifest.files {
            let file = open_file(reading.as_ref(), &manifest, entry).map_err(|error| {
                let gone = missing(&error);
                let error = error.with_step(manifest.step).with_path(path.join(&entry.name));
                if gone { Failure::Gone(error) } else { Failure::Broken(error) }
            })?;
            bytes = bytes.saturating_add(file.len());
            files.push(file);
        }
        Ok(Self { name: name.into(), path: path.into(), bytes, manifest, files, reading, modified })
    }
}

/// How many shards are searched for the metadata of this library.
const MARKED: usize = 8;

/// True when this library made the step `name`, however damaged it is. Either its manifest begins as ours do;
/// or the manifest is empty, zeroed or cut and `name` is one that this library gives; or a shard's header has
/// the metadata of a save.
fn ours(reading: &dyn Reading, name: &str) -> Result<bool> {
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

/// Refuses to replace what is under `name` when this library did not make it. An unused name is accepted.
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
    // An aligned buffer: with direct I/O it is read in one request instead of many through another buffer.
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

/// Opens a file that the manifest names, and checks that it belongs to this attempt.
fn open_file(reading: &dyn Reading, manifest: &Manifest, entry: &FileEntry) -> Result<Arc<dyn FileReading>> {
    let file = reading.open(&entry.name)?;
    if file.len() != entry.length {
        let (expected, found) = (entry.length, file.len());
        return Err(Error::corrupt(format!(
            "a file has the wrong length expected_bytes={expected} found_bytes={found}"
        )));
    }
    if entry.data > 0 {
        let (step, attempt) = mark(file.as_ref())?;
        if (step, attempt) != (manifest.step, manifest.attempt) {
            let expected = format!("expected={}:{}", manifest.step, manifest.attempt);
            return Err(Error::corrupt(format!("a shard belongs to another save {expected} found={step}:{attempt}")));
        }
    }
    Ok(file)
}

/// Threads spend most of their time waiting for the storage, and fast storage needs many requests at once: 64
/// MiB in flight with this many threads. Few bytes are read by fewer. `docs/tuning.md` has the measurements.
const THREADS: usize = 32;

/// Like a fence's timeout: a stream may have a lot of work queued before a restore's copies.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(600);
