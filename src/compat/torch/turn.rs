//! Plans the saves of the engine, and carries out the saves of storage writers of the program, in the order
//! of calls.

use super::drive::{self, Planned, Ranks};
use super::engine::EngineWriter;
use super::future::{Told, Written};
use super::options::Who;
use super::plan::Metadata;
use super::planner::SavePlanner;
use super::writer::StorageWriter;
use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::state::StateDict;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Plans a save by the engine for one rank, and returns the state to save.
pub(super) fn planned(
    state: StateDict<'static>,
    planner: &mut dyn SavePlanner,
    writer: &mut EngineWriter,
    id: Option<&Path>,
    told: &Told,
) -> Result<StateDict<'static>> {
    let Planned { plan, metadata } = drive::plan(Ok(&state), planner, writer, id, &Ranks::Alone)?;
    let (plan, state) = drive::resolve(planner, plan, state)?;
    plan.fits(&state)?;
    let _ = told.set(Written::Planned(plan, metadata));
    Ok(state)
}

/// A save by several ranks, in its turn.
pub(super) struct Turn<'a> {
    pub executor: &'a Arc<CheckpointExecutor>,
    pub who: Who,
    pub step: u64,
    pub deadline: Instant,
}

impl<'a> Turn<'a> {
    pub fn new(executor: &'a Arc<CheckpointExecutor>, who: Who, step: u64, timeout: Option<Duration>) -> Self {
        Self { executor, who, step, deadline: executor.deadline(timeout) }
    }

    /// Plans a save by the engine, and returns the state that this rank saves. The engine itself plans for
    /// all ranks, so that only a planner of the program costs an exchange.
    ///
    /// # Errors
    /// Errors of the planner and of the path. They fail the save on all ranks.
    pub fn planned(
        &self,
        state: Result<StateDict<'static>>,
        planner: Option<&mut (dyn SavePlanner + 'static)>,
        writer: &mut EngineWriter,
        id: Option<&Path>,
        told: &Told,
    ) -> Result<StateDict<'static>> {
        let here = |error: Error| error.with_ranks(self.executor.member().map(|member| member.rank));
        let planned = match (planner, self.who) {
            // Its errors name the ranks that failed.
            (Some(planner), Who::Gather) => self.planned_together(planner, state, writer, id),
            (Some(planner), _) => state.and_then(|state| self.planned_by(planner, state, writer, id)).map_err(here),
            (None, _) => state.and_then(|state| drive::reset(writer, id).map(|()| (state, None))).map_err(here),
        };
        // An error also takes the place of the save. This rank may have failed alone, even in an exchange
        // whose last answer only the other ranks have received.
        let (state, planner_data) = planned.inspect_err(|error| self.executor.refused(self.step, error))?;
        let _ = told.set(Written::Together(self.executor.storage().clone(), planner_data));
        Ok(state)
    }

    /// Plans with the other ranks, in the place before the place of the save.
    fn planned_together(
        &self,
        planner: &mut (dyn SavePlanner + 'static),
        state: Result<StateDict<'static>>,
        writer: &mut EngineWriter,
        id: Option<&Path>,
    ) -> Result<(StateDict<'static>, Option<serde_json::Value>)> {
        let together = self.executor.together(self.step, self.deadline)?;
        let known = state.as_ref().map_err(Clone::clone);
        let Planned { plan, metadata } = drive::plan(known, planner, writer, id, &Ranks::Gather(&together))?;
        let state = drive::resolve_together(planner, plan, state?, &together)?;
        Ok((state, metadata.planner_data))
    }

    /// Plans without collectives.
    fn planned_by(
        &self,
        planner: &mut (dyn SavePlanner + 'static),
        state: StateDict<'static>,
        writer: &mut EngineWriter,
        id: Option<&Path>,
    ) -> Result<(StateDict<'static>, Option<serde_json::Value>)> {
        let Planned { plan, metadata } = drive::plan(Ok(&state), planner, writer, id, &self.per_rank())?;
        let (plan, state) = drive::resolve(planner, plan, state)?;
        plan.fits(&state)?;
        Ok((state, metadata.planner_data))
    }

    /// Saves with a storage writer of the program.
    pub fn written(
        &self,
        state: Result<StateDict<'static>>,
        planner: &mut dyn SavePlanner,
        writer: &mut dyn StorageWriter,
        id: Option<&Path>,
    ) -> Result<Metadata> {
        let together = self.executor.together(self.step, self.deadline)?;
        if self.who == Who::PerRank {
            let saved = drive::save(state, planner, writer, id, &self.per_rank(), self.deadline);
            return drive::barrier(&together, saved);
        }
        drive::save(state, planner, writer, id, &Ranks::Gather(&together), self.deadline)
    }

    fn per_rank(&self) -> Ranks<'static> {
        Ranks::PerRank(self.executor.member().map_or(0, |member| member.rank))
    }
}
