//! A published step, open for reading.

mod opened;
mod tables;

use crate::device::{Device, DeviceChoice, choose};
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::{FileEntry, TensorEntry};
use crate::format::manifest::Manifest;
use crate::format::shard::{rank_of, values_name};
use crate::id::Attempt;
use crate::state::{Dtype, Layout, decode_value};
use crate::storage::local::Local;
use crate::storage::{self, Reading, StepPlace, Storage};
pub(crate) use opened::{Failure, Files, Opened, replaceable};
use serde::de::DeserializeOwned;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// How often an open tries a step that is replaced or pruned meanwhile.
const ATTEMPTS: usize = 8;

/// An open step. Its contents stay readable even if the step is replaced or pruned meanwhile.
///
/// Opening reads the manifest, the beginning of its tables and the first 4096 bytes of each shard, but no
/// tensor data. It checks that every file has its length, and that no file belongs to another step or
/// attempt. If a step has more than 1000 files, each file is opened and checked when something in it is first
/// read. Tables and tensor bytes are checked against their digests when they are read; [`Checkpoint::verify`]
/// checks everything. The results of look-ups in tables stay in memory. Clones are cheap and share the open
/// files.
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
    /// The tier in which the step was found, if that tier is behind the first.
    pub(crate) tier: Option<Arc<str>>,
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

/// Every file and tensor of a step.
#[doc(hidden)]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents<'a> {
    /// The files, without the manifest and tables.
    pub files: Vec<&'a FileEntry>,
    /// The tensors, sorted by name.
    pub tensors: Vec<&'a TensorEntry>,
}

impl Checkpoint {
    /// Opens the step in the directory `path`, or at a URL such as `s3://bucket/prefix/step-00000007`. Needs
    /// no executor and no arena, and writes nothing.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory, or nothing in it belongs to a checkpoint. `Corrupt`,
    /// naming the file, when the manifest contradicts itself, a file is missing or has another length, or a
    /// shard belongs to another step or attempt.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let given = path.as_ref();
        let given = match StepPlace::of(given)? {
            StepPlace::Store(root, name) => return Self::from_storage(storage::at(root)?, &name),
            StepPlace::Directory(given) => given,
        };
        let path = given.canonicalize().map_err(|e| Error::io("cannot open a checkpoint", e).with_path(&given))?;
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

    /// Opens the files of a step that has no name yet, before it is published as `name`.
    #[doc(hidden)]
    pub fn from_reading(reading: Arc<dyn Reading>, name: &str, path: &Path) -> Result<Self> {
        let opened = Opened::of(reading, name, path).map_err(Failure::into_error)?;
        let (opened, device) = (Arc::new(opened), None);
        Ok(Self { opened, threads: THREADS, device, timeout: RESTORE_TIMEOUT, tier: None })
    }

    pub(crate) fn try_open(storage: &Arc<dyn Storage>, name: &str) -> Result<Self, Failure> {
        let path = storage.describe(name);
        let mut tries = 1;
        loop {
            match Opened::new(storage.as_ref(), name, &path) {
                Ok(opened) => {
                    let (opened, device) = (Arc::new(opened), None);
                    return Ok(Self { opened, threads: THREADS, device, timeout: RESTORE_TIMEOUT, tier: None });
                }
                // The step was replaced or pruned while its files were opened, and its files are being
                // deleted. Open the name again.
                Err(Failure::Gone(_)) if tries < ATTEMPTS => tries += 1,
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Reads with up to `threads` threads, including the caller's. Default: 32, and at most one thread for
    /// each 4 MiB. Each thread uses a buffer of 2 MiB while it reads. A storage across a network may ask for
    /// fewer threads and longer buffers.
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
        self.manifest().step
    }

    /// The attempt that was published.
    pub fn attempt(&self) -> Attempt {
        self.manifest().attempt
    }

    /// The number of ranks that wrote the step.
    pub fn world(&self) -> u32 {
        self.manifest().world
    }

    /// The path under which the step was opened.
    pub fn path(&self) -> &Path {
        &self.opened.path
    }

    /// The tier in which the executor found this copy. None if the copy is in the executor's own root, or if
    /// there are no [tiers](crate::tiers).
    pub fn tier(&self) -> Option<&str> {
        self.tier.as_deref()
    }

    /// The name of the step's directory.
    pub fn name(&self) -> &str {
        &self.opened.name
    }

    /// The total length of the step's files in bytes, including the manifest.
    pub fn bytes(&self) -> u64 {
        self.opened.bytes
    }

    /// When the step was written, by the clock of the storage; None if unknown. A copy of a step may have
    /// another time.
    pub fn modified(&self) -> Option<SystemTime> {
        self.opened.modified
    }

    /// The manifest, which identifies the save and holds its values.
    #[doc(hidden)]
    pub fn manifest(&self) -> &Manifest {
        self.opened.index.manifest()
    }

    /// Every file and every tensor, with all digests.
    #[doc(hidden)]
    pub fn contents(&self) -> Result<Contents<'_>> {
        let index = &self.opened.index;
        let files = index.all_files().map_err(|e| self.unlisted(e))?.into_iter().map(|file| &file.entry).collect();
        let tensors = index.some(0..index.tensors()).map_err(|e| self.unlisted(e))?;
        Ok(Contents { files, tensors })
    }

    /// The values of the rank that wrote file number `file`. They are in the table beside the file. If the
    /// rank wrote no tensor, they are in the file itself.
    #[doc(hidden)]
    pub fn values_beside(&self, file: usize) -> Result<BTreeMap<String, serde_json::Value>> {
        let row = self.opened.index.file(file).map_err(|e| self.unlisted(e))?;
        let entry = &row.entry;
        let of_values = entry.data == 0 && rank_of(&entry.name).is_some_and(|rank| entry.name == values_name(rank));
        if of_values {
            return self.opened.values(file).map_err(|e| self.located(e));
        }
        self.opened.index.values_beside(file).map_err(|e| self.unlisted(e))
    }

    /// Checks all tables, name by name and row by row. Does not read tensor bytes.
    #[doc(hidden)]
    pub fn check_tables(&self) -> Result<()> {
        self.opened.index.check().map_err(|e| self.unlisted(e))
    }

    /// Every tensor, sorted by name. Their descriptions stay in memory.
    ///
    /// # Errors
    /// `Corrupt`, naming the file, when the stored description of a tensor is not what was written.
    pub fn tensors(&self) -> Result<impl ExactSizeIterator<Item = TensorInfo<'_>> + use<'_>> {
        self.with_prefix("")
    }

    /// The tensors whose names begin with `prefix`, sorted by name.
    ///
    /// # Errors
    /// As [`Checkpoint::tensors`].
    pub fn with_prefix<'a>(&'a self, prefix: &str) -> Result<impl ExactSizeIterator<Item = TensorInfo<'a>> + use<'a>> {
        let index = &self.opened.index;
        let found = index.prefix(prefix).and_then(|range| index.some(range));
        Ok(found.map_err(|e| self.unlisted(e))?.into_iter().map(TensorInfo::of))
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// `NotFound`, naming the tensor and the path; otherwise as [`Checkpoint::tensors`].
    pub fn tensor(&self, name: &str) -> Result<TensorInfo<'_>> {
        self.entry(name).map(TensorInfo::of)
    }

    pub(crate) fn entry(&self, name: &str) -> Result<&TensorEntry> {
        let found = self.opened.index.find(name).map_err(|e| self.unlisted(e))?;
        found.ok_or_else(|| self.missing("tensor", name))
    }

    /// The entries of these tensors, in this order.
    pub(crate) fn entries(&self, names: &[&str]) -> Result<Vec<&TensorEntry>> {
        let found = self.opened.index.find_all(names).map_err(|e| self.unlisted(e))?;
        found.into_iter().zip(names).map(|(entry, name)| entry.ok_or_else(|| self.missing("tensor", name))).collect()
    }

    /// Adds the step to an error of a table. The error of a table names its own path.
    pub(crate) fn unlisted(&self, error: Error) -> Error {
        if error.path().is_some() { error.with_step(self.step()) } else { self.located(error) }
    }

    /// Decodes the value `name`, without reading tensor data.
    ///
    /// # Errors
    /// `NotFound` when there is no such value, `Invalid` when the value is not a `T`. Both errors name the
    /// value and the path.
    pub fn value<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        self.decode("value", name, self.manifest().values.get(name))
    }

    /// Decodes the value `name` that rank `rank` kept for itself: see
    /// [`StateDict::rank_value`](crate::StateDict::rank_value). In a step that one process saved alone, they
    /// are among its [values](Checkpoint::value).
    ///
    /// # Errors
    /// `NotFound` when that rank kept no such value. `Invalid` when the value is not a `T`, or there is no
    /// such rank. `Corrupt` when the stored value is not what was written.
    pub fn rank_value<T: DeserializeOwned>(&self, rank: u32, name: &str) -> Result<T> {
        let world = self.world();
        if rank >= world {
            let wrong = format!("the checkpoint has no such rank rank={rank} ranks={world}");
            return Err(self.located(Error::invalid(wrong)));
        }
        if world == 1 && self.opened.index.values_beside(0).map_err(|e| self.unlisted(e))?.is_empty() {
            return self.value(name);
        }
        let files = self.opened.index.all_files().map_err(|e| self.unlisted(e))?;
        // A session of one rank names its shards like a process that saves alone.
        let of = |name: &str| rank_of(name).or((world == 1).then_some(0));
        let first = files.iter().position(|file| of(&file.entry.name) == Some(rank));
        let values = first.map_or_else(|| Ok(BTreeMap::new()), |file| self.values_beside(file))?;
        self.decode("value", name, values.get(name))
    }

    /// Decodes the value `name` of every rank that kept one for itself; the keys of the map are rank numbers.
    /// For a job that goes on with another number of ranks and has to redistribute these values.
    ///
    /// # Errors
    /// `NotFound` when no rank kept such a value; otherwise as [`Checkpoint::rank_value`].
    pub fn rank_values<T: DeserializeOwned>(&self, name: &str) -> Result<BTreeMap<u32, T>> {
        if self.world() == 1 {
            return Ok([(0, self.rank_value(0, name)?)].into());
        }
        // The values of a rank are stored with its first file.
        let mut firsts = BTreeMap::new();
        for (number, file) in self.opened.index.all_files().map_err(|e| self.unlisted(e))?.iter().enumerate() {
            if let Some(rank) = rank_of(&file.entry.name).filter(|rank| *rank < self.world()) {
                firsts.entry(rank).or_insert(number);
            }
        }
        let mut values = BTreeMap::new();
        for (rank, file) in firsts {
            if let Some(value) = self.values_beside(file)?.get(name) {
                values.insert(rank, self.decode("value", name, Some(value))?);
            }
        }
        if values.is_empty() { Err(self.missing("value", name)) } else { Ok(values) }
    }

    /// Decodes the user metadata under `key`.
    ///
    /// # Errors
    /// As [`Checkpoint::value`].
    pub fn metadata<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.decode("metadata", key, self.manifest().metadata.get(key))
    }

    /// The names of all values, sorted.
    pub fn value_names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.manifest().values.keys().map(String::as_str)
    }

    /// The keys of all user metadata, sorted.
    pub fn metadata_keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.manifest().metadata.keys().map(String::as_str)
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

/// Threads spend most of their time waiting for the storage, and fast storage needs many requests at once.
/// This many threads have 64 MiB in flight. Fewer threads read when there are few bytes. `docs/tuning.md` has
/// the measurements.
const THREADS: usize = 32;

/// As long as the timeout of a fence, because a stream may have a lot of work queued before a restore's
/// copies.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(600);
