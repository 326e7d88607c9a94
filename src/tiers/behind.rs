//! The tiers behind the root of an executor: what they have, what waits for them, and the end of their
//! threads.
//!
//! **Locks.** The state of a tier is locked for a few instructions, never during a call of a storage; its
//! completions are set after the lock is released.

use super::chain::{Chain, Found, Looked, Note};
use super::copy::check_newest;
use super::promote;
use super::{Tier, TierReport, TierState, open};
use crate::catalog::{Catalog, Entry, Hold, Retention};
use crate::completion::{Signal, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Attempt, parse_step_name, step_name};
use crate::mutant::{self, Mutant};
use crate::outcome::Promoted;
use crate::settings::Unpromoted;
use crate::storage::Storage;
use crate::storage::shared::Shared;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::thread::spawn;
use crate::ticket::{Promotion, Ticket};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long after its deadline a shutdown waits for a promotion to see it.
const CLOSE_GRACE: Duration = Duration::from_millis(500);

/// See the module.
#[derive(Debug)]
pub(crate) struct Behind {
    session: Uuid,
    /// Of the session in the root.
    generation: u64,
    pub(super) root: Arc<dyn Storage>,
    /// Where the chains are noted; None: the root is seen by no other process.
    shared: Option<Arc<dyn Shared>>,
    note: Mutex<Note>,
    pub(super) lines: Vec<Arc<Line>>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// A tier, as its thread and the others see it.
#[derive(Debug)]
pub(super) struct Line {
    pub name: Arc<str>,
    pub place: PathBuf,
    tier: Tier,
    pub retention: Retention,
    pub unpromoted: Unpromoted,
    state: Mutex<State>,
    pub moved: Signal,
}

/// What is known of a tier.
#[derive(Debug, Default)]
pub(super) struct State {
    pub standing: Standing,
    /// The generation of the session in the tier, and its chain, once it is recorded there.
    recorded: Option<(u64, (Chain, bool))>,
    pub chain: Chain,
    /// Saves of this process that wait to be told, by attempt, with their step.
    waiting: HashMap<Attempt, (u64, Promotion)>,
    /// Steps of the root that the tier wants and does not have; a set that the last look found, and what was
    /// saved since.
    pub lacks: BTreeMap<u64, Attempt>,
    /// What was promoted by this process, or found in the tier, of the steps in the root.
    pub done: HashMap<Attempt, Promoted>,
    pub forks: BTreeSet<u64>,
    /// The step that is being copied.
    pub copying: Option<u64>,
    pub error: Option<Error>,
    /// Counts what was saved, so that the thread looks again.
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

/// Which steps are promoted, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Mode {
    #[default]
    All,
    /// Only the newest durable step, because the process is about to end.
    Newest,
    /// The thread ends when the tier lacks nothing, or at this instant.
    Closing(Instant),
}

impl Behind {
    /// Opens the tiers and takes them over; one that is away is tried again by its thread. `session` is that of
    /// the ranks, with its generation in the root; None: this process takes the root over with a new one.
    ///
    /// # Errors
    /// `Invalid` for two tiers of one name, or a root that is no path and no known URL; errors of the root.
    pub fn new(
        root: Arc<dyn Storage>,
        note: Note,
        tiers: Vec<Tier>,
        session: Option<(Uuid, u64)>,
    ) -> Result<Arc<Self>> {
        let id = session.map_or_else(Uuid::new_v4, |(id, _)| id);
        let mut lines = Vec::with_capacity(tiers.len());
        for tier in tiers {
            tier.retention.check()?;
            let name: Arc<str> = tier.name().into();
            if lines.iter().any(|line: &Arc<Line>| line.name == name) {
                return Err(Error::invalid(format!("two tiers have one name tier={name:?}")));
            }
            let place = match &tier.root {
                super::Root::At(path) => path.into(),
                super::Root::Over(storage) => storage.describe(""),
            };
            let chain = note.tiers.get(&*name).cloned().unwrap_or_default().pending(id);
            let (retention, unpromoted) = (tier.retention, tier.unpromoted);
            let state = Mutex::new(State { chain, ..State::default() });
            lines.push(Arc::new(Line { name, place, tier, retention, unpromoted, state, moved: Signal::default() }));
        }
        let (generation, recorded) = match session {
            Some((_, generation)) => (generation, root.shared()),
            None => {
                let look = Looked::at(root.as_ref())?;
                (look.record(id)?, look.shared)
            }
        };
        let (threads, shared) = (Mutex::default(), recorded.clone());
        let behind = Self { session: id, generation, root, shared, note: Mutex::new(note), lines, threads };
        // Before the take-over of the root deletes the notes of earlier sessions.
        behind.write_note();
        if let (None, Some(recorded)) = (session, recorded) {
            recorded.take_over(generation)?;
        }
        for line in &behind.lines {
            if let Err(error) = behind.reach(line, true) {
                if error.kind() == ErrorKind::Invalid {
                    return Err(error);
                }
                tracing::warn!(
                    tier = &*line.name,
                    error = format_args!("{error:#}"),
                    "a tier is away: saves go on, and are promoted when it is back"
                );
                lock(&line.state).error = Some(error);
            }
        }
        behind.write_note();
        Ok(Arc::new(behind))
    }

    /// Starts the threads, which promote the steps of `catalog`.
    pub fn start(self: &Arc<Self>, catalog: &Arc<Catalog>, executor: &Arc<Signal>) -> Result<()> {
        for line in &self.lines {
            let (behind, line, catalog, executor) = (self.clone(), line.clone(), catalog.clone(), executor.clone());
            let thread = spawn("ashore-promote".into(), move || promote::run(&behind, &line, &catalog, &executor))?;
            lock(&self.threads).push(thread);
        }
        Ok(())
    }

    /// The session, and its generation in the root.
    pub fn session(&self) -> (Uuid, u64) {
        (self.session, self.generation)
    }

    pub fn names(&self) -> impl Iterator<Item = Arc<str>> {
        self.lines.iter().map(|line| line.name.clone())
    }

    /// Takes a tier over, unless that is done or no longer possible. At the `start` of a session any found
    /// session will do, because nothing was restored or saved yet.
    ///
    /// # Errors
    /// Why the tier is away; `Conflict` if it is lost.
    pub(super) fn reach(&self, line: &Line, start: bool) -> Result<Arc<Ours>> {
        match &lock(&line.state).standing {
            Standing::Ours(ours) => return Ok(ours.clone()),
            Standing::Lost => return Err(line.lost()),
            Standing::Away => {}
        }
        let storage = open(&line.tier.root)?;
        let look = Looked::at(storage.as_ref())?;
        let recorded = lock(&line.state).recorded.clone();
        let recorded = match recorded {
            Some(recorded) => recorded,
            None => self.record(line, &look)?,
        };
        lock(&line.state).recorded = Some(recorded.clone());
        let (generation, (chain, goes_on)) = recorded;
        let shared = look.shared;
        if let Some(shared) = &shared {
            shared.take_over(generation)?;
        }
        let catalog = Catalog::over(storage.clone());
        let ours = Arc::new(Ours { storage, catalog, shared, generation });
        let mut state = lock(&line.state);
        state.chain = chain;
        if !goes_on && !start {
            state.standing = Standing::Lost;
            drop(state);
            return Err(line.lost());
        }
        state.standing = Standing::Ours(ours.clone());
        state.error = None;
        Ok(ours)
    }

    /// Records the session in a tier, after a note of what its chain will be. Returns the generation, the
    /// chain, and whether that goes on from the one before.
    fn record(&self, line: &Line, look: &Looked) -> Result<(u64, (Chain, bool))> {
        let others: Vec<Chain> = {
            let note = lock(&self.note);
            note.tiers.iter().filter(|(name, _)| **name != *line.name).map(|(_, chain)| chain.clone()).collect()
        };
        let before = lock(&line.state).chain.clone();
        let after = before.after(look, self.session, others.iter());
        lock(&line.state).chain = before.before(&after, look, self.session);
        self.write_note();
        let generation = look.record(self.session)?;
        if generation == look.next {
            return Ok((generation, after));
        }
        let unknown = Looked { shared: None, found: Found::Unknown, next: generation };
        Ok((generation, before.after(&unknown, self.session, others.iter())))
    }

    /// A tier has failed with `error`: where it may be gone, as a mount may, it is opened and taken over anew.
    pub(super) fn away(&self, line: &Line, error: &Error) {
        if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unavailable | ErrorKind::Internal) {
            let mut state = lock(&line.state);
            if matches!(state.standing, Standing::Ours(_)) {
                (state.standing, state.recorded) = (Standing::Away, None);
                // It may be another one when it is back.
                state.done.clear();
            }
        }
    }

    /// Notes the chains beside the session in the root. Best effort: see [`Note`].
    pub fn write_note(&self) {
        let note = {
            let mut note = lock(&self.note);
            for line in &self.lines {
                note.tiers.insert(line.name.to_string(), lock(&line.state).chain.clone());
            }
            note.clone()
        };
        let Some(shared) = &self.shared else { return };
        if let Err(error) = note.write(shared.as_ref(), self.generation) {
            tracing::warn!(error = format_args!("{error:#}"), "what is known of the tiers cannot be noted");
        }
    }

    /// The save of `ticket` is durable as `name`, a step of the root or not.
    pub fn durable(&self, ticket: &Ticket, name: Option<&str>) {
        let step = ticket.step;
        let promoted = name.is_some_and(|name| parse_step_name(name) == Some(step));
        for (promotion, line) in ticket.promotions().iter().zip(&self.lines) {
            if !promoted {
                let why = "only steps of the root are promoted";
                promotion.done.complete(Err(Error::invalid(why).with_step(step)));
                continue;
            }
            let attempt = ticket.attempt();
            let mut state = lock(&line.state);
            if matches!(state.standing, Standing::Lost) {
                drop(state);
                promotion.done.complete(Err(line.lost().with_step(step)));
                continue;
            }
            state.saved += 1;
            let early = mutant::on(Mutant::PromoteEarly).then(|| line.promoted(step, attempt, 0));
            if let Some(done) = early.or_else(|| state.done.get(&attempt).cloned()) {
                drop(state);
                promotion.done.complete(Ok(done));
            } else {
                state.lacks.insert(step, attempt);
                state.waiting.insert(attempt, (step, promotion.clone()));
            }
            line.moved.notify();
        }
    }

    /// From now on only the newest durable step is promoted.
    pub fn only_newest(&self) {
        self.set_mode(Mode::Newest);
    }

    /// All steps are promoted again.
    pub fn all_again(&self) {
        self.set_mode(Mode::All);
    }

    fn set_mode(&self, mode: Mode) {
        for line in &self.lines {
            lock(&line.state).mode = mode;
            line.moved.notify();
        }
    }

    /// Waits until every tier has `newest`, or never will have it, for at most `slice`.
    pub fn has_newest(&self, newest: u64, slice: Duration) -> bool {
        let deadline = deadline_after(slice);
        let has = |line: &Line| {
            let state = lock(&line.state);
            let there = state.done.values().any(|done| done.step == newest) && !state.lacks.contains_key(&newest);
            let never = matches!(state.standing, Standing::Lost) || state.forks.contains(&newest);
            (there || never).then_some(())
        };
        self.lines.iter().all(|line| line.moved.wait_until(deadline, || has(line)).is_some())
    }

    /// What each tier has and lacks.
    pub fn report(&self) -> Vec<TierReport> {
        self.lines.iter().map(|line| line.report()).collect()
    }

    /// Waits until no tier lacks a step that it wants, and ends the threads. A later call waits for threads
    /// that are left.
    ///
    /// # Errors
    /// `Deadline`, naming tiers, roots and steps that were not promoted.
    pub fn close(&self, deadline: Instant) -> Result<()> {
        self.set_mode(Mode::Closing(deadline));
        let end = deadline.max(Instant::now()) + CLOSE_GRACE;
        loop {
            let mut threads = lock(&self.threads);
            for ended in threads.extract_if(.., |thread| thread.is_finished()) {
                let _ = ended.join();
            }
            if threads.is_empty() || Instant::now() >= end {
                for thread in threads.iter() {
                    tracing::error!(thread = thread.thread().name(), "a thread hangs in a tier and is left behind");
                }
                break;
            }
            drop(threads);
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut left = Vec::new();
        for line in &self.lines {
            let why = || Error::new(ErrorKind::Deadline, "the executor was shut down before the step was promoted");
            line.tell_all(|_| true, &why());
            let TierReport { tier, root, lacks, error, .. } = line.report();
            if !lacks.is_empty() {
                left.push((format!("tier={tier:?} root={} steps={lacks:?}", root.display()), error));
            }
        }
        let Some((_, error)) = left.first() else { return Ok(()) };
        let cause = error.clone();
        let what: Vec<String> = left.into_iter().map(|(what, _)| what).collect();
        let what =
            format!("steps are durable in the first tier and were not promoted by the deadline {}", what.join("; "));
        let late = Error::new(ErrorKind::Deadline, what);
        Err(match cause {
            Some(cause) => late.with_source(cause),
            None => late,
        })
    }
}

impl Hold for Behind {
    fn held(&self, entries: &[Entry]) -> BTreeSet<u64> {
        let mut held = BTreeSet::new();
        for line in &self.lines {
            let state = lock(&line.state);
            held.extend(state.copying);
            if line.unpromoted == Unpromoted::Warn || matches!(state.standing, Standing::Lost) {
                continue;
            }
            // Nothing is known yet of what a tier has that was never reached.
            let unknown = matches!(state.standing, Standing::Away);
            let lacks = |entry: &&Entry| {
                state.lacks.get(&entry.step) == Some(&entry.attempt)
                    || unknown && !state.chain.had.contains(&entry.attempt)
            };
            held.extend(entries.iter().filter(lacks).map(|entry| entry.step));
        }
        held
    }

    fn removed(&self, entries: &[Entry]) {
        for line in &self.lines {
            let mut lost = Vec::new();
            for entry in entries {
                let mut state = lock(&line.state);
                state.done.remove(&entry.attempt);
                let lacks = state.lacks.get(&entry.step) == Some(&entry.attempt);
                if lacks {
                    state.lacks.remove(&entry.step);
                }
                if lacks || state.waiting.contains_key(&entry.attempt) {
                    lost.push(entry.attempt);
                    let (step, tier, root) = (entry.step, &*line.name, line.place.display());
                    tracing::warn!(step, tier, %root, "retention deletes a step that the tier does not have");
                }
            }
            line.tell_gone(|attempt| lost.contains(&attempt));
        }
    }
}

impl Line {
    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// What a promotion reports.
    pub fn promoted(&self, step: u64, attempt: Attempt, bytes: u64) -> Promoted {
        let path = self.place.join(step_name(step));
        Promoted { tier: self.name.to_string(), root: self.place.clone(), step, attempt, path, bytes }
    }

    /// Adds the tier and its root to an error.
    pub fn located(&self, what: &str, error: &Error) -> Error {
        let what = format!("{what} tier={:?} root={}", self.name, self.place.display());
        Error::new(error.kind(), what).with_source(error.clone())
    }

    fn lost(&self) -> Error {
        let why = "another session owns the tier, and this one promotes nothing any more: does the job run elsewhere? \
                   Build a new executor to take the tier over and go on from its newest step";
        Error::new(ErrorKind::Conflict, format!("{why} tier={:?}", self.name)).with_path(&self.place)
    }

    /// Looks whether the tier still is this session's.
    ///
    /// # Errors
    /// `Conflict` if it is not, and it is lost then.
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

    /// Another session owns the tier.
    pub fn lose(&self, why: &Error) {
        let mut state = lock(&self.state);
        state.standing = Standing::Lost;
        state.error = Some(why.clone());
        state.lacks.clear();
        drop(state);
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
        state.chain.had.insert(promoted.attempt);
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

    /// Tells the saves of these attempts that the first tier does not have them any more.
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

    /// Why the tier is not this session's.
    pub fn state_error(&self) -> Error {
        let away = || Error::new(ErrorKind::Unavailable, "the tier was not reached yet").with_path(&self.place);
        lock(&self.state).error.clone().unwrap_or_else(away)
    }

    fn report(&self) -> TierReport {
        let state = lock(&self.state);
        let away =
            state.error.as_ref().is_some_and(|error| error.is_transient() || error.kind() == ErrorKind::NotFound);
        TierReport {
            tier: self.name.to_string(),
            root: self.place.clone(),
            state: match state.standing {
                Standing::Lost => TierState::Lost,
                Standing::Ours(_) if !away => TierState::Ours,
                Standing::Ours(_) | Standing::Away => TierState::Away,
            },
            newest: state.done.values().map(|done| done.step).max(),
            lacks: state.lacks.keys().copied().collect(),
            forks: state.forks.iter().copied().collect(),
            error: state.error.clone(),
        }
    }
}
