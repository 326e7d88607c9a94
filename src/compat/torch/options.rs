//! The options of one `execute_save`.

use super::group::ProcessGroup;
use super::planner::SavePlanner;
use super::writer::StorageWriter;
use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::ranks::Member;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The keyword arguments of `execute_save`.
///
/// ```
/// use ashore::compat::torch::ExecuteOptions;
/// use std::time::Duration;
/// let options = ExecuteOptions::new().checkpoint_id("step-100").timeout(Duration::from_secs(600));
/// // Each rank plans by its own plan alone:
/// let options = options.use_collectives(false);
/// ```
#[derive(Default)]
#[must_use]
pub struct ExecuteOptions {
    pub(super) checkpoint_id: Option<PathBuf>,
    pub(super) storage_writer: Option<Box<dyn StorageWriter>>,
    pub(super) planner: Option<Box<dyn SavePlanner>>,
    process_group: Option<Arc<dyn ProcessGroup>>,
    pub(super) no_dist: bool,
    use_collectives: Option<bool>,
    pub(super) keep_existing: bool,
    pub(super) timeout: Option<Duration>,
    pub(super) attempt: Option<Attempt>,
}

impl ExecuteOptions {
    /// torch's defaults: the ranks of the engine save together.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the directory of the checkpoint: a directory in the executor's root, such as `root/step-100`, or
    /// its name alone. A name that is not the name of a step makes a checkpoint beside the steps. Such a
    /// checkpoint is opened by its path. It is not listed, and retention does not delete it.
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

    /// Sets the ranks that save together. They must be the ranks of the executor's engine, which was built
    /// with the [`coordinator`](super::coordinator) of this group. This option may be left out, as torch's
    /// default group may.
    pub fn process_group(mut self, group: Arc<dyn ProcessGroup>) -> Self {
        self.process_group = Some(group);
        self
    }

    /// Makes this rank save alone, as the only rank and the coordinator. A process group is ignored. Where
    /// the engine saves with other ranks, the call needs a storage writer that does not.
    pub fn no_dist(mut self, no_dist: bool) -> Self {
        self.no_dist = no_dist;
        self
    }

    /// Sets how several ranks save. With true, the coordinator gets the plans of all ranks, and the results.
    /// With false, every rank plans by its own plan alone. A storage writer of the program then commits on
    /// every rank, and the ranks wait for each other at the end. The engine saves one step of all ranks
    /// either way. For a rank that saves alone, the option changes nothing.
    pub fn use_collectives(mut self, use_collectives: bool) -> Self {
        self.use_collectives = Some(use_collectives);
        self
    }

    /// Sets whether an existing checkpoint is replaced, as torch does by default. The old checkpoint stays
    /// whole until the new one is durable. With false, an existing checkpoint is a `Conflict`.
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

    /// How many places among the calls of `save` this call takes where several ranks save. The call takes all
    /// its places however it ends, so that the next call has the same place on all ranks.
    pub(super) fn places(&self) -> usize {
        let plans_together = self.planner.is_some() && self.use_collectives != Some(false);
        match (self.no_dist, &self.storage_writer) {
            (true, _) => 0,
            // The ranks of the writer exchange plans and results in one place.
            (false, Some(_)) => 1,
            // One place for the planner's exchanges, and one for the save.
            (false, None) => 1 + usize::from(plans_together),
        }
    }

    /// Returns who saves, for an engine that saves as `member` of several ranks, or alone.
    ///
    /// # Errors
    /// `Invalid` for a process group that is not the ranks of the engine, and for `no_dist` if the writer is
    /// an engine of several ranks.
    pub(super) fn who(&self, member: Option<Member>) -> Result<Who> {
        if self.no_dist {
            if member.is_some_and(|member| member.world > 1) && self.storage_writer.is_none() {
                let what = "no_dist saves with this rank alone, and the executor's engine saves with all: set a \
                    storage_writer over an engine that is built with `alone`";
                return Err(Error::invalid(what));
            };
            return Ok(Who::Alone);
        }
        if let Some(group) = &self.process_group {
            let (rank, world) = (group.rank(), group.world_size());
            let engine = member.map_or((0, 1), |member| (member.rank, member.world));
            if (rank, world) != engine {
                let what = "a process group is not the ranks of the executor's engine: build the engine with \
                    `ranks` and the coordinator of the group";
                let (of, in_all) = engine;
                let found = format!("{what} rank={rank} world_size={world} engine_rank={of} engine_ranks={in_all}");
                return Err(Error::invalid(found));
            }
        }
        match (member, self.use_collectives) {
            (None, _) => Ok(Who::Alone),
            (Some(_), None | Some(true)) => Ok(Who::Gather),
            (Some(_), Some(false)) => Ok(Who::PerRank),
        }
    }
}

/// Who saves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// Only this rank.
    Alone,
    /// The coordinator plans for all ranks.
    Gather,
    /// Every rank plans on its own.
    PerRank,
}

impl std::fmt::Debug for ExecuteOptions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExecuteOptions").field("checkpoint_id", &self.checkpoint_id).finish_non_exhaustive()
    }
}
