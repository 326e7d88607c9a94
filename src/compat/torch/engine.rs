//! The engine as a storage writer.

use super::future::results;
use super::plan::{Metadata, SavePlan, StorageMeta, StorageMetadata, WriteResult, metadata};
use super::writer::{StorageWriter, WriteFuture};
use crate::compat::checkpoint_path::CheckpointPath;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{CheckpointExecutor, DeferredSave};
use crate::id::Attempt;
use crate::outcome::Outcome;
use crate::save::{Save, SaveOptions};
use crate::state::StateDict;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Writes and commits with a [`CheckpointExecutor`].
///
/// The engine commits after the last byte without returning to the caller. `write_data` therefore resolves
/// when the checkpoint is durable, and `finish` only reports its directory.
///
/// As the storage writer of another executor it saves for this rank alone: build `executor` with
/// [`alone`](crate::Builder::alone). Use an engine of several ranks through a
/// [`ThreadExecutor`](super::ThreadExecutor) over it.
///
/// ```
/// use ashore::compat::torch::{AsyncCheckpointExecutor, EngineWriter, ExecuteOptions, ThreadExecutor};
/// use ashore::{CheckpointExecutor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
/// # let build = |root| CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).build().map(Arc::new);
/// # let (engine, elsewhere) = (build(dir.path())?, build(other.path())?);
/// let executor = ThreadExecutor::new(engine)?;
/// let writer = EngineWriter::new(elsewhere.clone()).overwrite(false);
/// let mut state = StateDict::new();
/// state.tensor("weights", Arc::new(vec![0.5_f32; 4]))?;
/// let options = ExecuteOptions::new().checkpoint_id("step-100").storage_writer(writer);
/// executor.execute_save(state.into(), options)?.result(Duration::from_secs(60))?;
/// assert_eq!(elsewhere.checkpoint(100)?.read_as::<f32>("weights")?, [0.5; 4]);
/// # executor.close(Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct EngineWriter {
    executor: Arc<CheckpointExecutor>,
    options: SaveOptions,
    checkpoint_path: Option<CheckpointPath>,
    /// The identity of the save that `write_data` has begun.
    save_id: Option<String>,
    /// The metadata of what `write_data` has written.
    written: BTreeMap<String, StorageMetadata>,
}

impl EngineWriter {
    /// Writes below the root of `executor`, and replaces existing checkpoints as torch does.
    pub fn new(executor: Arc<CheckpointExecutor>) -> Self {
        Self {
            executor,
            options: SaveOptions::default().overwrite(),
            checkpoint_path: None,
            save_id: None,
            written: BTreeMap::new(),
        }
    }

    /// Sets whether an existing checkpoint is replaced. With false, an existing checkpoint is a `Conflict`.
    #[must_use]
    pub fn overwrite(mut self, overwrite: bool) -> Self {
        self.options.overwrite = overwrite;
        self
    }

    /// Sets the attempt of the next save.
    #[must_use]
    pub fn attempt(mut self, attempt: Option<Attempt>) -> Self {
        self.options.attempt = attempt;
        self
    }

    /// Sets after how long an unfinished save fails; the engine's settings are an upper limit.
    #[must_use]
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.options.timeout = timeout.into();
        self
    }

    /// Sets how often the engine retries a save.
    pub(super) fn retry(mut self, times: u32) -> Self {
        self.options.retries = times;
        self
    }

    /// Begins a save of a state that fits the plan.
    pub(super) fn submit(&mut self, state: StateDict<'static>) -> Result<Save> {
        let (step, options) = self.options()?;
        self.executor.save_with(step, state, options)
    }

    /// Begins a deferred save of a state that fits the plan.
    pub(super) fn begin(&mut self, deferred: DeferredSave, state: StateDict<'static>) {
        match self.options() {
            Ok((_, options)) => deferred.begin(&self.executor, state, options),
            Err(error) => deferred.end(Err(error)),
        }
    }

    fn options(&mut self) -> Result<(u64, SaveOptions)> {
        let path = self.checkpoint_path.as_ref().ok_or_else(|| Error::invalid("a storage writer was not set up"))?;
        let options = path.options(self.options.clone());
        self.options.attempt = None; // no two saves share an attempt
        Ok((path.step, options))
    }
}

impl StorageWriter for EngineWriter {
    fn reset(&mut self, checkpoint_id: Option<&Path>) -> Result<()> {
        let id = checkpoint_id.ok_or_else(|| {
            Error::invalid("nothing says where the checkpoint goes: set a checkpoint_id or a storage_writer")
        })?;
        (self.checkpoint_path, self.save_id) = (Some(CheckpointPath::of(&self.executor, id)?), None);
        Ok(())
    }

    fn storage_meta(&self) -> Option<StorageMeta> {
        let path = self.checkpoint_path.as_ref()?;
        Some(StorageMeta { checkpoint_id: path.path.clone(), save_id: self.save_id.clone() })
    }

    fn validate_checkpoint_id(&self, checkpoint_id: &Path) -> bool {
        CheckpointPath::of(&self.executor, checkpoint_id).is_ok()
    }

    fn set_up_storage_writer(&mut self, _: bool) -> Result<()> {
        Ok(())
    }

    fn prepare_local_plan(&mut self, plan: SavePlan) -> Result<SavePlan> {
        Ok(plan)
    }

    fn prepare_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<Vec<SavePlan>> {
        Ok(plans)
    }

    fn write_data(&mut self, plan: &SavePlan, state: StateDict<'static>) -> Result<WriteFuture> {
        if self.executor.member().is_some() {
            let why = "an engine of several ranks commits for all of them: make a ThreadExecutor of it, and set no \
                storage_writer";
            return Err(Error::invalid(why));
        }
        plan.fits(&state)?;
        let (save, plan) = (self.submit(state)?, plan.clone());
        self.written = metadata(std::slice::from_ref(&plan))?.state_dict_metadata;
        self.save_id = Some(save.attempt().to_string());
        Ok(Box::pin(async move {
            match save.await? {
                Outcome::Durable(committed) => Ok(results(&plan, &committed)),
                Outcome::Skipped { by } | Outcome::Superseded { by } => {
                    let what = format!("the overlap policy skipped or superseded the save by={by}");
                    Err(Error::new(ErrorKind::Cancelled, what))
                }
            }
        }))
    }

    fn finish(&mut self, metadata: &mut Metadata, results: Vec<Vec<WriteResult>>) -> Result<()> {
        metadata.state_dict_metadata = std::mem::take(&mut self.written);
        metadata.storage_meta = self.storage_meta();
        metadata.storage_data = results.into_iter().flatten().collect();
        Ok(())
    }
}
