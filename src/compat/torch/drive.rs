//! Runs the phases of a save over any number of ranks, in torch's order. An error of one rank is an error of
//! all ranks.
//!
//! The ranks are those of the executor. As in torch there are two exchanges, one with the plans and one with
//! the write results. Plans and metadata are in notes on the storage, so a message has at most a few hundred
//! bytes.

use super::plan::{Metadata, SavePlan, WriteResult};
use super::planner::SavePlanner;
use super::travel::{decode_plan, decode_results, decode_values, encode_plan, encode_results, encode_values};
use super::writer::StorageWriter;
use crate::commit::several::Reply;
use crate::completion::block_on;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::Together;
use crate::guard::guarded;
use crate::mutant::{self, Mutant};
use crate::ranks::Phase;
use crate::state::StateDict;
use std::path::Path;
use std::time::Instant;

/// The ranks that save together.
pub(super) enum Ranks<'a> {
    /// Only this rank.
    Alone,
    /// The coordinator plans and commits for all.
    Gather(&'a Together),
    /// This rank plans and commits on its own.
    PerRank(u32),
}

impl Ranks<'_> {
    /// As in torch, rank 0 is the coordinator, with and without collectives. A rank that saves alone is also
    /// a coordinator.
    fn is_coordinator(&self) -> bool {
        let rank = match self {
            Self::Alone => 0,
            Self::Gather(together) => together.member().rank,
            Self::PerRank(rank) => *rank,
        };
        rank == 0 || mutant::on(Mutant::Coordinator)
    }
}

/// The plan of this rank, and the metadata of the whole save as far as this rank knows it. The coordinator,
/// and a rank that plans on its own, know all of it.
pub(super) struct Planned {
    pub plan: SavePlan,
    pub metadata: Metadata,
}

/// Plans a save.
pub(super) fn plan(
    state: Result<&StateDict<'static>>,
    planner: &mut dyn SavePlanner,
    writer: &mut dyn StorageWriter,
    checkpoint_id: Option<&Path>,
    ranks: &Ranks<'_>,
) -> Result<Planned> {
    let local = guarded("a planner or storage writer panicked", || {
        let state = state?;
        writer.reset(checkpoint_id)?;
        let coordinator = ranks.is_coordinator();
        planner.set_up_planner(state, writer.storage_meta().as_ref(), coordinator)?;
        writer.set_up_storage_writer(coordinator)?;
        let plan = planner.create_local_plan()?;
        writer.prepare_local_plan(plan)
    });
    let mut global = |plans: Vec<SavePlan>| {
        guarded("a planner or storage writer panicked", || {
            let world = plans.len();
            let (plans, metadata) = planner.create_global_plan(plans)?;
            let plans = writer.prepare_global_plan(plans)?;
            if plans.len() == world { Ok((plans, metadata)) } else { Err(uneven(world, plans.len())) }
        })
    };
    let Ranks::Gather(together) = ranks else {
        let (plans, metadata) = global(vec![local?])?;
        let plan = plans.into_iter().next().ok_or_else(|| uneven(1, 0))?;
        return Ok(Planned { plan, metadata });
    };
    let mut whole = None;
    let part = local.and_then(|plan| encode_plan(&plan, None));
    let mine = together.exchange(Phase::Agree, part, &mut |plans| {
        let plans = plans.iter().map(|plan| Ok(decode_plan(plan)?.0)).collect::<Result<_>>()?;
        let (plans, metadata) = global(plans)?;
        let shared = metadata.planner_data.as_ref();
        let encoded = plans.iter().map(|plan| encode_plan(plan, shared)).collect::<Result<_>>()?;
        whole = Some(metadata);
        Ok(Reply::Each(encoded))
    })?;
    let (plan, planner_data) = decode_plan(&mine)?;
    Ok(Planned { plan, metadata: whole.unwrap_or_else(|| Metadata { planner_data, ..Metadata::default() }) })
}

/// Tells a storage writer where a save goes.
pub(super) fn reset(writer: &mut dyn StorageWriter, checkpoint_id: Option<&Path>) -> Result<()> {
    guarded("a storage writer panicked", || writer.reset(checkpoint_id))
}

/// Saves with a storage writer of the program.
pub(super) fn save(
    state: Result<StateDict<'static>>,
    planner: &mut dyn SavePlanner,
    writer: &mut dyn StorageWriter,
    checkpoint_id: Option<&Path>,
    ranks: &Ranks<'_>,
    deadline: Instant,
) -> Result<Metadata> {
    let known = state.as_ref().map_err(Clone::clone);
    let planned = plan(known, planner, writer, checkpoint_id, ranks)?;
    write(state?, planned, planner, writer, ranks, deadline)
}

fn uneven(world: usize, plans: usize) -> Error {
    Error::invalid(format!("a global plan needs one plan for each rank world_size={world} plans={plans}"))
}

/// Finishes the plan, and returns the data that is written for it.
pub(super) fn resolve(
    planner: &mut dyn SavePlanner,
    plan: SavePlan,
    state: StateDict<'static>,
) -> Result<(SavePlan, StateDict<'static>)> {
    guarded("a planner panicked", || {
        let plan = planner.finish_plan(plan)?;
        let state = planner.resolve_data(&plan, state)?;
        Ok((plan, state))
    })
}

/// [`resolve`] for the engine, which keeps the values of rank 0: rank 0 gets the values that other ranks were
/// to write. Returns when every rank has resolved.
pub(super) fn resolve_together(
    planner: &mut dyn SavePlanner,
    plan: SavePlan,
    state: StateDict<'static>,
    together: &Together,
) -> Result<StateDict<'static>> {
    let resolved = resolve(planner, plan, state).and_then(|(plan, state)| plan.fits(&state).map(|()| state));
    let (mut state, part) = match resolved {
        Ok(state) => {
            let values = encode_values(&state.values);
            (Some(state), values)
        }
        Err(error) => (None, Err(error)),
    };
    together.exchange(Phase::Receipt, part, &mut |values| {
        for values in values.iter().skip(1) {
            for (name, value) in decode_values(values)? {
                let Some(state) = &mut state else { continue };
                state.values.entry(name).or_insert(value);
            }
        }
        Ok(Reply::Same(Vec::new()))
    })?;
    state.ok_or_else(|| Error::internal("the ranks go on with a save that has failed on this one"))
}

/// Finishes the plan, writes and commits. With a coordinator, returns when every rank has done so.
fn write(
    state: StateDict<'static>,
    planned: Planned,
    planner: &mut dyn SavePlanner,
    writer: &mut dyn StorageWriter,
    ranks: &Ranks<'_>,
    deadline: Instant,
) -> Result<Metadata> {
    let Planned { plan, mut metadata } = planned;
    let written = resolve(planner, plan, state).and_then(|(plan, state)| {
        let results = guarded("a storage writer panicked", || complete(writer.write_data(&plan, state)?, deadline))?;
        checked(&plan, results)
    });
    let mut finish = |results: Vec<Vec<WriteResult>>| {
        guarded("a storage writer panicked", || {
            metadata.storage_meta = writer.storage_meta();
            metadata.storage_data = results.iter().flatten().cloned().collect();
            writer.finish(&mut metadata, results).map(|()| metadata.clone())
        })
    };
    let Ranks::Gather(together) = ranks else { return finish(vec![written?]) };
    let shared = together.exchange(Phase::Receipt, written.and_then(encode_results), &mut |results| {
        let results = results.iter().map(|results| decode_results(results)).collect::<Result<_>>()?;
        serde_json::to_vec(&finish(results)?).map(Reply::Same).map_err(spoilt)
    })?;
    serde_json::from_slice(&shared).map_err(spoilt)
}

/// Ends a save that this rank has carried out on its own: torch's barrier. It fails when the save of another
/// rank has failed.
pub(super) fn barrier<T>(together: &Together, ended: Result<T>) -> Result<T> {
    let part = ended.as_ref().map(|_| Vec::new()).map_err(Clone::clone);
    together.exchange(Phase::Agree, part, &mut |_| Ok(Reply::Same(Vec::new())))?;
    ended
}

fn spoilt(error: serde_json::Error) -> Error {
    Error::internal("the metadata of a save cannot be handed to the ranks").with_source(error)
}

/// Checks that every planned item was written once, so that a writer whose threads died cannot report
/// success.
fn checked(plan: &SavePlan, results: Vec<WriteResult>) -> Result<Vec<WriteResult>> {
    let mut planned: Vec<&str> = plan.items.iter().map(|item| item.fqn.as_str()).collect();
    let mut written: Vec<&str> = results.iter().map(|result| result.fqn.as_str()).collect();
    planned.sort_unstable();
    written.sort_unstable();
    if planned == written {
        return Ok(results);
    }
    let (planned, written) = (planned.len(), written.len());
    Err(Error::internal(format!(
        "a storage writer did not write every planned item once planned={planned} written={written}"
    )))
}

/// Polls a future on this thread until it is ready or the deadline has passed.
pub(super) fn complete<T>(future: impl Future<Output = Result<T>>, deadline: Instant) -> Result<T> {
    let late = || Error::new(ErrorKind::Deadline, "staging or writing had not ended at the deadline of a save");
    block_on(future, deadline).ok_or_else(late)?
}
