//! The state of one tier: its standing, the steps that it has and lacks, and the saves that wait for it.
//!
//! **Locks.** The state is locked for a few instructions, never during a call of a storage. Completions are
//! set after the lock is released.

use super::claim::Claim;
use super::copy::check_newest;
use super::lineage::Lineage;
use super::{Tier, TierReport, TierState};
use crate::catalog::{Catalog, Retention};
use crate::completion::Signal;
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Attempt, step_name};
use crate::outcome::Promoted;
use crate::settings::Unpromoted;
use crate::storage::Storage;
use crate::storage::shared::Shared;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::ticket::Promotion;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

/// A tier, as its promotion thread and the other threads use it.
#[derive(Debug)]
pub(super) struct Line {
    pub name: Arc<str>,
    pub place: PathBuf,
    pub tier: Tier,
    pub retention: Retention,
    pub unpromoted: Unpromoted,
    pub state: Mutex<State>,
    pub moved: Signal,
    /// The claim on a tier that a path or a URL names, until the executor has ended or lost the tier.
    pub claim: Mutex<Option<Claim>>,
}

/// The state of a tier.
#[derive(Debug, Default)]
pub(super) struct State {
    pub standing: Standing,
    /// The generation of the session in the tier, and its lineage, once the session is recorded there.
    pub recorded: Option<(u64, (Lineage, bool))>,
    pub lineage: Lineage,
    /// Saves of this process that wait for their promotion, by attempt, with their step.
    pub waiting: HashMap<Attempt, (u64, Promotion)>,
    /// Steps of the root that the tier wants and does not have: those that the last look found, and those
    /// that were saved since.
    pub lacks: BTreeMap<u64, Attempt>,
    /// Attempts at steps in the root that this process promoted or found in the tier.
    pub done: HashMap<Attempt, Promoted>,
    pub forks: BTreeSet<u64>,
    /// Steps of the root that this session will not promote, although the tier has no step of their names.
    pub never: BTreeSet<u64>,
    /// The step that is being copied.
    pub copying: Option<u64>,
    pub error: Option<Error>,
    /// Whether the last error is one of the tier, which may be away.
    pub failing: bool,
    /// The number of saves, so that the thread looks again after each.
    pub saved: u64,
    pub mode: Mode,
}

#[derive(Debug, Default)]
pub(super) enum Standing {
    /// Not reached yet.
    #[default]
    Away,
    Ours(Arc<Ours>),
    Lost,
}

/// A tier that this session has taken over.
#[derive(Debug)]
pub(super) struct Ours {
    pub storage: Arc<dyn Storage>,
    pub catalog: Catalog,
    pub shared: Option<Arc<dyn Shared>>,
    pub generation: u64,
}

/// Which steps are promoted, and until when.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    All,
    /// Only the newest durable step, because the process is about to end.
    Newest,
    /// The thread ends when the tier lacks nothing, or at this instant.
    Closing(Instant),
}

impl Line {
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Returns the report of a promotion.
    pub fn promoted(&self, step: u64, attempt: Attempt, bytes: u64) -> Promoted {
        let path = self.place.join(step_name(step));
        Promoted { tier: self.name.to_string(), root: self.place.clone(), step, attempt, path, bytes }
    }

    /// Adds the tier and its root to an error.
    pub fn located(&self, what: &str, error: &Error) -> Error {
        let what = format!("{what} tier={:?} root={}", self.name, self.place.display());
        Error::new(error.kind(), what).with_source(error.clone())
    }

    /// The error of a tier that is lost.
    pub fn lost(&self) -> Error {
        let why = "another session owns the tier, and this one promotes nothing any more: does the job run elsewhere? \
                   Build a new executor to take the tier over and go on from its newest step";
        Error::new(ErrorKind::Conflict, format!("{why} tier={:?}", self.name)).with_path(&self.place)
    }

    /// Checks that the tier still belongs to this session.
    ///
    /// # Errors
    /// `Conflict` if it does not. The tier is lost then.
    pub fn check(&self, ours: &Ours) -> Result<()> {
        let Some(shared) = &ours.shared else { return Ok(()) };
        let checked = check_newest(shared.as_ref(), ours.generation);
        if let Err(error) = &checked
            && error.kind() == ErrorKind::Conflict
        {
            self.lose(error);
        }
        checked
    }

    /// Marks the tier as lost: another session owns it.
    pub fn lose(&self, why: &Error) {
        let mut state = lock(&self.state);
        state.standing = Standing::Lost;
        state.error = Some(why.clone());
        state.lacks.clear();
        drop(state);
        lock(&self.claim).take();
        tracing::error!(tier = &*self.name, error = format_args!("{why:#}"), "a tier is lost");
        self.tell_all(|_| true, &self.located("the step is not promoted", why));
        self.moved.notify();
    }

    /// Tells the save of this attempt that it is durable in the tier.
    pub fn tell(&self, promoted: Promoted) {
        let mut state = lock(&self.state);
        if state.lacks.get(&promoted.step) == Some(&promoted.attempt) {
            state.lacks.remove(&promoted.step);
        }
        state.lineage.had.insert(promoted.attempt);
        state.done.insert(promoted.attempt, promoted.clone());
        state.forks.remove(&promoted.step);
        let waiting = state.waiting.remove(&promoted.attempt);
        drop(state);
        if let Some((_, promotion)) = waiting {
            promotion.done.complete(Ok(promoted));
        }
        self.moved.notify();
    }

    /// The attempts whose saves wait to be told.
    pub fn waiting(&self) -> HashSet<Attempt> {
        lock(&self.state).waiting.keys().copied().collect()
    }

    /// Tells the saves of these attempts that the first tier no longer has them.
    pub fn tell_gone(&self, which: impl Fn(Attempt) -> bool) {
        let what = "the step was deleted in the first tier, or marked bad, before it was promoted";
        self.tell_all(which, &Error::new(ErrorKind::Cancelled, what));
    }

    /// Tells the saves of these attempts that they will not be promoted.
    pub fn tell_all(&self, which: impl Fn(Attempt) -> bool, why: &Error) {
        let told: Vec<_> = lock(&self.state).waiting.extract_if(|attempt, _| which(*attempt)).collect();
        for (_, (step, promotion)) in told {
            promotion.done.complete(Err(why.clone().with_step(step)));
        }
    }

    /// The tier, if this session has taken it over.
    pub fn ours(&self) -> Option<Arc<Ours>> {
        match &lock(&self.state).standing {
            Standing::Ours(ours) => Some(ours.clone()),
            Standing::Away | Standing::Lost => None,
        }
    }

    /// Returns why this session does not own the tier.
    pub fn state_error(&self) -> Error {
        let away = || Error::new(ErrorKind::Unavailable, "the tier was not reached yet").with_path(&self.place);
        lock(&self.state).error.clone().unwrap_or_else(away)
    }

    /// Reports what the tier has and lacks.
    pub fn report(&self) -> TierReport {
        let state = lock(&self.state);
        TierReport {
            tier: self.name.to_string(),
            root: self.place.clone(),
            state: match state.standing {
                Standing::Lost => TierState::Lost,
                Standing::Ours(_) if !state.failing => TierState::Ours,
                Standing::Ours(_) | Standing::Away => TierState::Away,
            },
            newest: state.done.values().map(|done| done.step).max(),
            lacks: state.lacks.keys().copied().collect(),
            forks: state.forks.iter().copied().collect(),
            error: state.error.clone(),
        }
    }
}
