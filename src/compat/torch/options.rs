//! The options of one `execute_save`.

use super::drive::Ranks;
use super::group::ProcessGroup;
use super::planner::SavePlanner;
use super::writer::StorageWriter;
use crate::error::{Error, Result};
use crate::id::Attempt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The keyword arguments of `execute_save`.
///
/// ```
/// use ashore::compat::torch::{ExecuteOptions, ThreadGroup};
/// use std::time::Duration;
/// let options = ExecuteOptions::new().checkpoint_id("step-100").timeout(Duration::from_secs(600));
/// // Of two ranks that are threads of this process:
/// let options = options.process_group(ThreadGroup::new(2).remove(0));
/// ```
#[derive(Default)]
#[must_use]
pub struct ExecuteOptions {
    pub(super) checkpoint_id: Option<PathBuf>,
    pub(super) storage_writer: Option<Box<dyn StorageWriter>>,
    pub(super) planner: Option<Box<dyn SavePlanner>>,
    process_group: Option<Arc<dyn ProcessGroup>>,
    no_dist: bool,
    use_collectives: Option<bool>,
    pub(super) keep_existing: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) attempt: Option<Attempt>,
}

impl ExecuteOptions {
    /// torch's defaults: every rank saves alone.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the directory of the checkpoint: one in the executor's root, such as `root/step-100`, or its name
    /// alone. A name that is not a step's makes a checkpoint beside the steps: it is opened by its path, and
    /// neither listed nor deleted by retention.
    pub fn checkpoint_id(mut self, path: impl Into<PathBuf>) -> Self {
        self.checkpoint_id = Some(path.into());
        self
    }

    /// Writes and commits with `writer` instead of the engine. A thread of the executor calls it.
    pub fn storage_writer(mut self, writer: impl StorageWriter + 'static) -> Self {
        self.storage_writer = Some(Box::new(writer));
        self
    }

    /// Plans with `planner` instead of the executor's [`DefaultSavePlanner`](super::DefaultSavePlanner).
    pub fn planner(mut self, planner: impl SavePlanner + 'static) -> Self {
        self.planner = Some(Box::new(planner));
        self
    }

    /// Sets the ranks that save together.
    pub fn process_group(mut self, group: Arc<dyn ProcessGroup>) -> Self {
        self.process_group = Some(group);
        self
    }

    /// Makes this rank save alone. Contradicts a process group, and `use_collectives(false)`.
    pub fn no_dist(mut self, no_dist: bool) -> Self {
        self.no_dist = no_dist;
        self
    }

    /// Sets how a process group saves. With true, the coordinator gathers plans and results and commits for
    /// all. With false, every rank plans and commits on its own, and the ranks only wait for each other.
    pub fn use_collectives(mut self, use_collectives: bool) -> Self {
        self.use_collectives = Some(use_collectives);
        self
    }

    /// Sets whether an existing checkpoint is replaced, as torch does by default: the old one stays whole
    /// until the new one is durable. With false it is a `Conflict`.
    pub fn overwrite(mut self, overwrite: bool) -> Self {
        self.keep_existing = !overwrite;
        self
    }

    /// Sets after how long an unfinished save fails; the engine's `save_timeout` is an upper limit.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// Sets the attempt, for programs that compare checkpoints byte by byte.
    pub fn attempt(mut self, attempt: Attempt) -> Self {
        self.attempt = Some(attempt);
        self
    }

    /// The ranks that save together.
    ///
    /// # Errors
    /// `Invalid` for options that contradict each other.
    pub(super) fn ranks(&self) -> Result<Ranks> {
        let refuse = |why: &str| Err(Error::invalid(format!("options of a save contradict each other: {why}")));
        match (&self.process_group, self.no_dist, self.use_collectives) {
            (Some(_), true, _) => refuse("no_dist saves alone, and a process group is given"),
            (None, _, Some(false)) => {
                refuse("use_collectives=false needs the ranks of a process group, and none is given")
            }
            (None, ..) => Ok(Ranks::Alone),
            (Some(group), ..) if group.rank() >= group.world_size() => {
                let (rank, world) = (group.rank(), group.world_size());
                Err(Error::invalid(format!("a rank is not in its process group rank={rank} world_size={world}")))
            }
            (Some(group), ..) if group.world_size() == 1 => Ok(Ranks::Alone),
            (Some(group), _, Some(false)) => Ok(Ranks::PerRank(group.clone())),
            (Some(group), ..) => Ok(Ranks::Gather(group.clone())),
        }
    }
}

impl std::fmt::Debug for ExecuteOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecuteOptions").field("checkpoint_id", &self.checkpoint_id).finish_non_exhaustive()
    }
}
