//! The handler: where checkpoints are, which are kept, and when a call returns.

use super::state::{Checkpointable, State};
use crate::catalog::{Catalog, PruneOptions, Pruned, Retention};
use crate::checkpoint::Checkpoint;
use crate::compat::ending::first;
use crate::compat::open::Open;
use crate::error::{Error, ErrorKind, Result, found};
use crate::save::{Save, SaveOptions};
use crate::settings::Settings;
use crate::state::encode_named;
use crate::sync::{Mutex, lock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

/// The name of a checkpoint without a step.
const UNVERSIONED: &str = "checkpoint";

/// How many directories stay open for saving; each has its own arena and threads.
const OPEN: usize = 2;

/// The options of one save.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct SaveArgs {
    /// The step. None saves the one checkpoint that has no step.
    pub step: Option<u64>,
    /// How many steps are kept after a save with a step. The default is 1, as in Datarax; None or 0 keeps
    /// all.
    pub keep: Option<usize>,
    /// Replaces an existing checkpoint. The old one stays whole until the new one is durable.
    pub overwrite: bool,
    /// The encoded values, by key.
    metadata: BTreeMap<String, Value>,
}

impl Default for SaveArgs {
    fn default() -> Self {
        Self { step: None, keep: Some(1), overwrite: false, metadata: BTreeMap::new() }
    }
}

impl SaveArgs {
    /// Options for a save of this step.
    pub fn step(step: u64) -> Self {
        Self { step: Some(step), ..Self::default() }
    }

    /// Sets how many steps are kept; None or 0 keeps all.
    pub fn keep(mut self, keep: impl Into<Option<usize>>) -> Self {
        self.keep = keep.into();
        self
    }

    /// Replaces an existing checkpoint.
    pub fn overwrite(mut self) -> Self {
        self.overwrite = true;
        self
    }

    /// Adds metadata; a later value for a key replaces the earlier one.
    ///
    /// # Errors
    /// `Invalid`, naming the key: the value cannot be kept exactly.
    pub fn metadata(mut self, key: impl Into<String>, value: &(impl Serialize + ?Sized)) -> Result<Self> {
        let key = key.into();
        let encoded = encode_named("metadata", &key, value)?;
        self.metadata.insert(key, encoded);
        Ok(self)
    }
}

/// The metadata of a checkpoint, read without its tensors.
#[derive(Clone, Debug)]
pub struct Metadata(Checkpoint);

impl Metadata {
    /// The value that was saved under `key`.
    ///
    /// # Errors
    /// `NotFound` when there is no such key, `Invalid` when the value is not a `T`.
    pub fn get<T: DeserializeOwned>(&self, key: &str) -> Result<T> {
        self.0.metadata(key)
    }

    /// Every key, sorted.
    pub fn keys(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.metadata_keys()
    }
}

/// Saves and restores any [`Checkpointable`].
///
/// ```
/// use ashore::compat::datarax::{OrbaxCheckpointHandler, PrngKey, SaveArgs, State};
/// # let directory = tempfile::tempdir().unwrap();
/// let mut state = State::new();
/// state.array("weights", vec![0.5_f32; 6], [2, 3])?.key("rng", PrngKey::threefry2x32(42))?.value("name", "v2")?;
/// let handler = OrbaxCheckpointHandler::new();
/// let path = handler.save(directory.path(), &state, SaveArgs::step(1000).keep(5).metadata("epoch", &10)?)?;
/// assert!(path.ends_with("ckpt-1000"));
/// assert_eq!(handler.restore_metadata(directory.path(), None)?.get::<u32>("epoch")?, 10);
/// assert_eq!(handler.restore(directory.path(), Some(1000))?, state);
/// handler.close()?;
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// Dropping the handler waits for a save in flight, at most for the settings' `shutdown_timeout`; its error
/// is then only logged.
#[derive(Debug)]
pub struct OrbaxCheckpointHandler {
    shutdown_timeout: Duration,
    asynchronous: bool,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    open: Open<PathBuf>,
    in_flight: Option<InFlight>,
}

/// An unfinished save of the executor that was used last.
#[derive(Debug)]
struct InFlight {
    save: Save,
    keep: Option<usize>,
}

impl Default for OrbaxCheckpointHandler {
    fn default() -> Self {
        Self::new()
    }
}

impl OrbaxCheckpointHandler {
    /// A handler whose saves return when they are durable. Each directory's arena of 64 MiB is allocated at
    /// the first save there.
    pub fn new() -> Self {
        Self::with_settings(Settings { arena: 64 << 20, ..Settings::default() })
    }

    /// A handler whose executors have these settings. Each save says how many steps are kept. There is no run
    /// log, because other programs list the directories.
    pub fn with_settings(settings: Settings) -> Self {
        let settings = Settings { run_log: false, ..settings };
        let shutdown_timeout = settings.shutdown_timeout;
        let inner = Inner { open: Open::new(OPEN, settings), in_flight: None };
        Self { shutdown_timeout, asynchronous: false, inner: Mutex::new(inner) }
    }

    /// Makes saves return at once. The next call that touches checkpoints waits for the previous save, and
    /// returns its error.
    #[must_use]
    pub fn asynchronous(mut self) -> Self {
        self.asynchronous = true;
        self
    }

    /// [`save`](Self::save) under the name that newer versions of Datarax use.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn save_to_directory(
        &self,
        directory: impl AsRef<Path>,
        target: &impl Checkpointable,
        args: SaveArgs,
    ) -> Result<PathBuf> {
        self.save(directory, target, args)
    }

    /// Saves the state of `target` below `directory`, which is created when it is missing. Returns the path
    /// of the checkpoint.
    ///
    /// # Errors
    /// `Conflict` when the checkpoint exists and `overwrite` is not set, or when the existing directory is
    /// not a checkpoint of this library; `Invalid` for a state that cannot be saved; the error of the last
    /// asynchronous save; errors of the storage. An existing checkpoint is left unchanged.
    pub fn save(&self, directory: impl AsRef<Path>, target: &impl Checkpointable, args: SaveArgs) -> Result<PathBuf> {
        let directory = directory.as_ref();
        let mut inner = lock(&self.inner);
        inner.finish(Duration::MAX)?;
        let mut state = target.get_state()?.into_dict()?;
        if args.metadata.contains_key("") {
            return Err(Error::invalid("metadata needs a key"));
        }
        state.metadata = args.metadata;
        let executor = inner.open.executor(directory.into(), directory)?;
        let name = match args.step {
            None => UNVERSIONED.into(),
            Some(step) => match executor.checkpoint(step) {
                Ok(there) if !args.overwrite => {
                    let exists = Error::new(ErrorKind::Conflict, "the step exists").with_step(step);
                    return Err(exists.with_path(there.path()));
                }
                Ok(there) => there.name().to_owned(),
                Err(_) => format!("ckpt-{step}"),
            },
        };
        let mut options = SaveOptions::default().name(&*name);
        options.overwrite = args.overwrite;
        let save = executor.save_with(args.step.unwrap_or(0), state, options)?;
        inner.in_flight = Some(InFlight { save, keep: args.keep.filter(|keep| *keep > 0 && args.step.is_some()) });
        if !self.asynchronous {
            inner.finish(Duration::MAX)?;
        }
        Ok(directory.join(name))
    }

    /// Returns the state saved as `step`. None means the highest step, or the checkpoint without a step if
    /// there are no steps.
    ///
    /// # Errors
    /// `NotFound`: no such directory, or no such checkpoint in it. `Corrupt` when the bytes are not those
    /// that were saved.
    pub fn restore(&self, directory: impl AsRef<Path>, step: Option<u64>) -> Result<State> {
        State::read(&self.find(directory.as_ref(), step)?)
    }

    /// Restores into `target`. `target` is left unchanged when the checkpoint cannot be read or has another
    /// structure: other names, or another kind, dtype or shape under a name. An empty [`State`] accepts any
    /// structure.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::restore`]; `Invalid` for another structure, and for the checkpoint of an
    /// iterator over other data; errors of `target`.
    pub fn restore_into(
        &self,
        directory: impl AsRef<Path>,
        step: Option<u64>,
        target: &mut impl Checkpointable,
    ) -> Result<()> {
        let (saved, current) = (self.restore(directory, step)?, target.get_state()?);
        if current.names().len() > 0 {
            saved.same_iterator(&current)?;
            saved.same_structure(&current)?;
        }
        target.set_state(saved)
    }

    /// Returns the metadata; reads no tensor.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::restore`], without the errors of tensors.
    pub fn restore_metadata(&self, directory: impl AsRef<Path>, step: Option<u64>) -> Result<Metadata> {
        self.find(directory.as_ref(), step).map(Metadata)
    }

    fn find(&self, directory: &Path, step: Option<u64>) -> Result<Checkpoint> {
        self.wait_until_finished()?;
        let catalog = Catalog::open(directory)?;
        match step {
            Some(step) => catalog.checkpoint(step),
            None => catalog.latest()?.map_or_else(|| Checkpoint::open(directory.join(UNVERSIONED)), Ok),
        }
    }

    /// Every step below `directory`, ascending; empty when there is no such directory. Directories without a
    /// checkpoint of this library, or with a damaged one, are not steps.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn get_checkpoint_steps(&self, directory: impl AsRef<Path>) -> Result<Vec<u64>> {
        Ok(self.list_checkpoints(directory)?.into_keys().collect())
    }

    /// The highest step.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::get_checkpoint_steps`].
    pub fn latest_step(&self, directory: impl AsRef<Path>) -> Result<Option<u64>> {
        Ok(self.list_checkpoints(directory)?.into_keys().next_back())
    }

    /// Every step, with its path.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::get_checkpoint_steps`].
    pub fn list_checkpoints(&self, directory: impl AsRef<Path>) -> Result<BTreeMap<u64, PathBuf>> {
        self.wait_until_finished()?;
        let Some(catalog) = found(Catalog::open(directory))? else { return Ok(BTreeMap::new()) };
        // If a step exists under several names, the first in the catalog is the one that is restored.
        Ok(catalog.list()?.into_iter().rev().map(|entry| (entry.step, entry.path)).collect())
    }

    /// Waits until the last save is durable.
    ///
    /// # Errors
    /// The error of that save, once.
    pub fn wait_until_finished(&self) -> Result<()> {
        lock(&self.inner).finish(Duration::MAX)
    }

    /// Waits until all saves are durable, and releases arenas and threads.
    ///
    /// # Errors
    /// The error of the last save, if no call has returned it; others are logged.
    pub fn close(self) -> Result<()> {
        let mut inner = lock(&self.inner);
        let finished = inner.finish(Duration::MAX).err();
        first(finished.into_iter().chain(inner.open.shut_down()))
    }
}

impl Drop for OrbaxCheckpointHandler {
    fn drop(&mut self) {
        // In a forked child the save belongs to the parent, and cannot be waited for.
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = inner.finish(self.shutdown_timeout) {
            tracing::error!(
                error = format_args!("{error:#}"),
                "a handler was dropped before its save ended, or the save failed"
            );
        }
    }
}

fn prune(catalog: &Catalog, keep_last: Option<usize>) -> Result<Pruned> {
    catalog.prune(&Retention { keep_last, keep_every: None }, PruneOptions::new())?.complete()
}

impl Inner {
    /// Waits for the last save, then deletes the steps that it does not keep.
    fn finish(&mut self, timeout: Duration) -> Result<()> {
        let Some(InFlight { save, keep }) = self.in_flight.take() else { return Ok(()) };
        // The save has its own deadline.
        save.wait(timeout)?;
        if let (Some((directory, executor)), Some(_)) = (self.open.last(), keep)
            && let Err(error) = prune(executor.catalog(), keep)
        {
            tracing::warn!(?directory, error = format_args!("{error:#}"), "could not delete old steps");
        }
        Ok(())
    }
}
