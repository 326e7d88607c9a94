//! Checkpoints of one iterator in a directory, by step, at an interval.

use super::handler::{OrbaxCheckpointHandler, SaveArgs};
use super::state::Checkpointable;
use crate::error::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Saves and restores an iterator or a pipeline: Datarax's `IteratorCheckpoint` and `PipelineCheckpoint`.
///
/// ```
/// use ashore::compat::datarax::{IteratorCheckpoint, OrbaxCheckpointHandler, State};
/// # let directory = tempfile::tempdir().unwrap();
/// let checkpoints = IteratorCheckpoint::new(directory.path(), OrbaxCheckpointHandler::new());
/// let mut iterator = State::new(); // any `Checkpointable`
/// iterator.value("position", &640)?;
/// assert_eq!(checkpoints.save_to_step(&iterator, 150, 100, 5)?, None); // 100 does not divide 150
/// checkpoints.save_to_step(&iterator, 200, 100, 5)?;
/// let mut restarted = State::new();
/// checkpoints.restore_latest(&mut restarted)?;
/// assert_eq!(restarted, iterator);
/// checkpoints.close()?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct IteratorCheckpoint {
    directory: PathBuf,
    handler: OrbaxCheckpointHandler,
}

impl IteratorCheckpoint {
    /// Keeps checkpoints below `directory`, using `handler`.
    pub fn new(directory: impl AsRef<Path>, handler: OrbaxCheckpointHandler) -> Self {
        Self { directory: directory.as_ref().into(), handler }
    }

    /// Saves the state of `iterator`.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::save`].
    pub fn save_to_directory(&self, iterator: &impl Checkpointable, args: SaveArgs) -> Result<PathBuf> {
        self.handler.save(&self.directory, iterator, args)
    }

    /// Saves the state of `iterator` if `interval` divides `step`, and keeps the last `keep` steps; None or 0
    /// keeps all. Datarax's default is 5. Returns None for other steps.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::save`]; `Invalid` for an interval of 0.
    pub fn save_to_step(
        &self,
        iterator: &impl Checkpointable,
        step: u64,
        interval: u64,
        keep: impl Into<Option<usize>>,
    ) -> Result<Option<PathBuf>> {
        if interval == 0 {
            return Err(Error::invalid("an interval must be at least 1 interval=0"));
        }
        if !step.is_multiple_of(interval) {
            return Ok(None);
        }
        self.save_to_directory(iterator, SaveArgs::step(step).keep(keep)).map(Some)
    }

    /// Restores `iterator`. For None, restores the highest step, or the checkpoint without a step. The fields
    /// of the state that identify the sampler (`sampler_repr`), the data source (`data_source_repr`) and the
    /// number of shards and workers (`shard_count`, `worker_count`) must match those that were saved.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::restore`]; `Invalid` for the checkpoint of an iterator over other data;
    /// errors of `iterator`.
    pub fn restore(&self, iterator: &mut impl Checkpointable, step: Option<u64>) -> Result<()> {
        let saved = self.handler.restore(&self.directory, step)?;
        saved.same_iterator(&iterator.get_state()?)?;
        iterator.set_state(saved)
    }

    /// Restores `iterator` from the highest step.
    ///
    /// # Errors
    /// As [`restore`](Self::restore); `NotFound` when there is no step.
    pub fn restore_latest(&self, iterator: &mut impl Checkpointable) -> Result<()> {
        let none = || Error::new(ErrorKind::NotFound, "there is no checkpoint yet").with_path(&self.directory);
        let step = self.latest_step()?.ok_or_else(none)?;
        self.restore(iterator, Some(step))
    }

    /// The highest step.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::list_checkpoints`].
    pub fn latest_step(&self) -> Result<Option<u64>> {
        self.handler.latest_step(&self.directory)
    }

    /// Every step, with its path.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::list_checkpoints`].
    pub fn list_checkpoints(&self) -> Result<BTreeMap<u64, PathBuf>> {
        self.handler.list_checkpoints(&self.directory)
    }

    /// Waits until all saves are durable.
    ///
    /// # Errors
    /// As [`OrbaxCheckpointHandler::close`].
    pub fn close(self) -> Result<()> {
        self.handler.close()
    }
}
