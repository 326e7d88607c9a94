//! The ranks meet and take the root over. Then rank 0 takes the tiers over, and tells the other ranks.

use crate::commit::several::{Group, Reply};
use crate::completion::deadline_after;
use crate::error::{Error, Result};
use crate::ranks::{Coordinator, Phase, launcher};
use crate::storage::Storage;
use crate::tiers::{Behind, Note, Part, Tier};
use std::sync::Arc;
use std::time::Duration;

/// The number of the exchange about the tiers, which comes before the first save.
const TIERS: u64 = 0;

/// The number of the first save.
pub(super) const fn first_save(tiers: bool) -> u64 {
    if tiers { TIERS + 1 } else { 0 }
}

/// Whether other ranks save with this process.
#[derive(Debug)]
pub(super) enum Ranks {
    /// The program has not declared it.
    Unsaid,
    Alone,
    Several(Arc<dyn Coordinator>),
}

impl Ranks {
    /// Meets the other ranks, if there are any. `note` is the note of the newest session of the root.
    ///
    /// # Errors
    /// `Invalid` if a launcher started several ranks and the program has not declared whether they save
    /// together; errors of [`Group::meet`].
    pub fn meet(
        self,
        storage: &dyn Storage,
        run: Option<String>,
        note: &Note,
        timeout: Duration,
    ) -> Result<Option<Arc<Group>>> {
        let coordinator = match self {
            Self::Alone => return Ok(None),
            Self::Unsaid => {
                let several = launcher::launched()?.filter(|launched| launched.member.world > 1);
                return several.map_or(Ok(None), |launched| Err(launched.undecided()));
            }
            Self::Several(coordinator) => coordinator,
        };
        let run = match run {
            Some(run) => run,
            None => launcher::launched()?.and_then(|launched| launched.token).unwrap_or_default(),
        };
        let why = "this storage cannot be shared by several ranks: use a directory that all of them see";
        let shared = storage.shared().ok_or_else(|| Error::invalid(why))?;
        let carry = |generation| note.keep(shared.as_ref(), generation);
        let group = Group::meet(coordinator, shared.clone(), &run, &carry, deadline_after(timeout))?;
        Ok(Some(Arc::new(group)))
    }
}

/// Takes the tiers over, if there are any. With several ranks, rank 0 does that for all ranks.
///
/// # Errors
/// `Invalid` if the ranks have different tiers, or if this rank does not see those of rank 0; otherwise as
/// [`Behind::new`], on every rank.
pub(super) fn take_over(
    storage: &Arc<dyn Storage>,
    note: Note,
    tiers: Vec<Tier>,
    group: Option<&Group>,
    timeout: Duration,
) -> Result<Option<Arc<Behind>>> {
    if tiers.is_empty() {
        return Ok(None);
    }
    let Some(group) = group else { return Behind::new(storage.clone(), note, tiers, Part::Alone).map(Some) };
    let (id, generation) = (group.session.id, group.session.generation);
    let names = Tier::names(&tiers);
    let (mut given, mut taken) = (Some((note, tiers)), None);
    let mut take = |parts: Vec<Vec<u8>>| {
        for (rank, theirs) in (0..).zip(&parts) {
            if *theirs != names.as_bytes() {
                let why = "ranks have different tiers: give all ranks the same, or set ASHORE_TIER for all";
                let theirs = String::from_utf8_lossy(theirs);
                let error = Error::invalid(format!("{why} rank_0={names} rank_{rank}={theirs}"));
                return Err(error.with_ranks([rank]));
            }
        }
        let (note, tiers) = given.take().ok_or_else(|| Error::internal("the tiers are taken over twice"))?;
        taken = Some(Behind::new(storage.clone(), note, tiers, Part::Leads { id, generation })?);
        Ok(Reply::Same(Vec::new()))
    };
    let names = Ok(names.clone().into_bytes());
    group.exchange(TIERS, Phase::Agree, names, &mut take, deadline_after(timeout))?;
    match given {
        Some((_, tiers)) if group.member.rank > 0 => {
            let follows = Behind::follow(storage.clone(), tiers, Part::Follows { id, generation });
            follows.map(Some).map_err(|error| error.with_ranks([group.member.rank]))
        }
        _ => Ok(taken),
    }
}
