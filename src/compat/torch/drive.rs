//! Runs the phases of a save over any number of ranks: an error of one rank is an error of all.

use super::group::ProcessGroup;
use super::plan::{Metadata, SavePlan, WriteResult};
use super::planner::SavePlanner;
use super::writer::StorageWriter;
use crate::completion::block_on;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::guarded;
use crate::mutant::{self, Mutant};
use crate::state::StateDict;
use crate::wire::WireError;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// The ranks that save together.
pub(super) enum Ranks {
    /// Only this rank.
    Alone,
    /// The coordinator plans and commits for all.
    Gather(Arc<dyn ProcessGroup>),
    /// Every rank plans and commits on its own; all end when the last one has.
    PerRank(Arc<dyn ProcessGroup>),
}

impl Ranks {
    fn is_coordinator(&self) -> bool {
        !matches!(self, Self::Gather(group) if group.rank() != 0) || mutant::on(Mutant::Coordinator)
    }

    /// Gathers the `part` of every rank, by rank. Every rank returns the first error of any rank.
    fn gather<T: Serialize + DeserializeOwned>(&self, part: Result<T>, deadline: Instant) -> Result<Vec<T>> {
        match self {
            Self::Alone => Ok(vec![part?]),
            Self::PerRank(group) | Self::Gather(group) => all(group.as_ref(), part, deadline),
        }
    }
}

/// Exchanges parts with all ranks.
fn all<T: Serialize + DeserializeOwned>(
    group: &dyn ProcessGroup,
    part: Result<T>,
    deadline: Instant,
) -> Result<Vec<T>> {
    let spoilt = |e: serde_json::Error| Error::internal("a message between ranks cannot be read").with_source(e);
    let mine = part.as_ref().map_err(|error| WireError::from(&error.clone().with_rank(group.rank())));
    let gathered = group.all_gather(serde_json::to_vec(&mine).map_err(spoilt)?, deadline)?;
    let mut parts = Vec::with_capacity(gathered.len());
    for message in gathered {
        let part = serde_json::from_slice::<Result<T, WireError>>(&message).map_err(spoilt)?;
        parts.push(part.map_err(WireError::into_error)?);
    }
    Ok(parts)
}

/// Plans a save: returns what this rank writes and, on the coordinator, the metadata of the whole save.
pub(super) fn plan(
    state: &StateDict<'static>,
    planner: &mut dyn SavePlanner,
    writer: &mut dyn StorageWriter,
    checkpoint_id: Option<&Path>,
    ranks: &Ranks,
    deadline: Instant,
) -> Result<(SavePlan, Metadata)> {
    let local = guarded("a planner or storage writer panicked", || {
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
    let (mine, metadata) = match ranks {
        Ranks::Alone => global(vec![local?])?,
        Ranks::PerRank(group) => {
            let planned = local.and_then(|plan| global(vec![plan]));
            all(group.as_ref(), planned.as_ref().map(|_| ()).map_err(Clone::clone), deadline)?;
            planned?
        }
        Ranks::Gather(group) => {
            let locals = all(group.as_ref(), local, deadline)?;
            let planned = if group.rank() == 0 { global(locals).map(Some) } else { Ok(None) };
            let world = group.world_size() as usize;
            let shared = all(group.as_ref(), planned, deadline)?.into_iter().next().flatten();
            let (mut plans, metadata) = shared.ok_or_else(|| Error::internal("the coordinator sent no plan"))?;
            let rank = group.rank() as usize;
            if rank >= plans.len() {
                return Err(uneven(world, plans.len()));
            }
            (vec![plans.swap_remove(rank)], metadata)
        }
    };
    let mine = mine.into_iter().next().ok_or_else(|| uneven(1, 0))?;
    let finished = guarded("a planner panicked", || planner.finish_plan(mine));
    let finished = match ranks {
        Ranks::Alone => finished?,
        Ranks::Gather(_) | Ranks::PerRank(_) => {
            ranks.gather(finished.as_ref().map(|_| ()).map_err(Clone::clone), deadline)?;
            finished?
        }
    };
    Ok((finished, metadata))
}

/// Returns the data that is written for `plan`.
pub(super) fn resolve(
    planner: &mut dyn SavePlanner,
    plan: &SavePlan,
    state: StateDict<'static>,
) -> Result<StateDict<'static>> {
    guarded("a planner panicked", || planner.resolve_data(plan, state))
}

fn uneven(world: usize, plans: usize) -> Error {
    Error::invalid(format!("a global plan needs one plan for each rank world_size={world} plans={plans}"))
}

/// Writes and finishes; returns when every rank has done both.
pub(super) fn write(
    state: Result<StateDict<'static>>,
    plan: &SavePlan,
    mut metadata: Metadata,
    writer: &mut dyn StorageWriter,
    ranks: &Ranks,
    deadline: Instant,
) -> Result<Metadata> {
    let written = guarded("a storage writer panicked", || complete(writer.write_data(plan, state?)?, deadline));
    let written = written.and_then(|results| checked(plan, results));
    let mut finish = |results: Vec<Vec<WriteResult>>| {
        guarded("a storage writer panicked", || {
            metadata.storage_meta = writer.storage_meta();
            metadata.storage_data = results.iter().flatten().cloned().collect();
            writer.finish(&mut metadata, results).map(|()| metadata.clone())
        })
    };
    match ranks {
        Ranks::Alone => finish(vec![written?]),
        Ranks::PerRank(group) => {
            let finished = written.and_then(|results| finish(vec![results]));
            all(group.as_ref(), finished.as_ref().map(|_| ()).map_err(Clone::clone), deadline)?;
            finished
        }
        Ranks::Gather(group) => {
            let results = all(group.as_ref(), written, deadline)?;
            let finished = if group.rank() == 0 { finish(results).map(Some) } else { Ok(None) };
            let shared = all(group.as_ref(), finished, deadline)?.into_iter().next().flatten();
            shared.ok_or_else(|| Error::internal("the coordinator sent no metadata"))
        }
    }
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
