//! The tiers behind the root of an executor: this module takes them over and ends their threads.

use super::claim::Claim;
use super::line::{Line, Mode, Ours, Standing, State};
use super::lineage::{Found, Lineage, Looked, Note};
use super::{Tier, TierReport, open};
use crate::catalog::{Catalog, Entry, Hold};
use crate::completion::{Signal, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::id::step_name;
use crate::mutant::{self, Mutant};
use crate::settings::Unpromoted;
use crate::storage::Storage;
use crate::storage::shared::Shared;
use crate::sync::{Mutex, lock};
use crate::ticket::Ticket;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long after its deadline a shutdown waits for a running promotion to notice that deadline.
const CLOSE_GRACE: Duration = Duration::from_millis(500);

/// The role of this process. Ranks belong to a session, which has this generation in the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// The process saves alone, and takes the root over with a session of its own.
    Alone,
    /// The process is rank 0, which takes the tiers over and promotes.
    Leads { id: Uuid, generation: u64 },
    /// The process is another rank, which reads the tiers that rank 0 has taken over.
    Follows { id: Uuid, generation: u64 },
}

/// The tiers behind one root, as one process uses them. See the module.
#[derive(Debug)]
pub(crate) struct Behind {
    pub(super) part: Part,
    pub(super) session: Uuid,
    /// The generation of the session in the root.
    pub(super) generation: u64,
    pub(super) root: Arc<dyn Storage>,
    /// Where the lineages are noted. None: no other process sees the root.
    pub(super) shared: Option<Arc<dyn Shared>>,
    note: Mutex<Note>,
    pub(super) lines: Vec<Arc<Line>>,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Behind {
    /// Opens the tiers and takes them over. Where a tier is away, its thread tries again.
    ///
    /// # Errors
    /// `Invalid` for two tiers of one name, for a tier that another executor of this process has, or for a
    /// root that is neither a path nor a known URL; errors of the root.
    pub fn new(root: Arc<dyn Storage>, note: Note, tiers: Vec<Tier>, part: Part) -> Result<Arc<Self>> {
        let behind = Self::over(root, note, tiers, part)?;
        // This comes before the take-over of the root, which deletes the notes of earlier sessions.
        behind.write_note();
        if let (Part::Alone, Some(shared)) = (part, &behind.shared) {
            shared.take_over(behind.generation)?;
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
        match part {
            Part::Alone => behind.write_note(),
            // The other ranks read this note.
            Part::Leads { .. } | Part::Follows { .. } => behind.note()?,
        }
        Ok(Arc::new(behind))
    }

    /// Makes the tiers, and opens none of them yet. A process alone is recorded in the root as its newest
    /// session.
    pub(super) fn over(root: Arc<dyn Storage>, note: Note, tiers: Vec<Tier>, part: Part) -> Result<Self> {
        let session = match part {
            Part::Alone => Uuid::new_v4(),
            Part::Leads { id, .. } | Part::Follows { id, .. } => id,
        };
        let mut lines = Vec::with_capacity(tiers.len());
        for mut tier in tiers {
            tier.retention.check()?;
            let name: Arc<str> = tier.name().into();
            // The tier may be opened again later, when the program's working directory is another one.
            tier.root.make_absolute()?;
            if lines.iter().any(|line: &Arc<Line>| line.name == name) {
                return Err(Error::invalid(format!("two tiers have one name tier={name:?}")));
            }
            let claim = match part {
                Part::Alone | Part::Leads { .. } => Some(Claim::of(&tier.root)?),
                Part::Follows { .. } => None,
            };
            let place = tier.root.place();
            let lineage = note.tiers.get(&*name).cloned().unwrap_or_default().pending(session);
            let (retention, unpromoted) = (tier.retention, tier.unpromoted);
            let state = Mutex::new(State { lineage, ..State::default() });
            let (moved, claim) = (Signal::default(), Mutex::new(claim));
            lines.push(Arc::new(Line { name, place, tier, retention, unpromoted, state, moved, claim }));
        }
        let (generation, shared) = match part {
            Part::Leads { generation, .. } | Part::Follows { generation, .. } => (generation, root.shared()),
            Part::Alone => {
                let look = Looked::at(root.as_ref())?;
                (look.record(session)?, look.shared)
            }
        };
        let (threads, note) = (Mutex::default(), Mutex::new(note));
        Ok(Self { part, session, generation, root, shared, note, lines, threads })
    }

    /// Whether this process promotes.
    pub fn promotes(&self) -> bool {
        !matches!(self.part, Part::Follows { .. })
    }

    /// The session, and its generation in the root.
    pub fn session(&self) -> (Uuid, u64) {
        (self.session, self.generation)
    }

    /// The names of the tiers to which this process promotes.
    pub fn names(&self) -> impl Iterator<Item = Arc<str>> {
        self.lines.iter().filter(|_| self.promotes()).map(|line| line.name.clone())
    }

    /// Takes a tier over, unless that is done or no longer possible. At the `start` of a session, any session
    /// found in the tier may be followed, because nothing was restored or saved yet. Later, a tier that
    /// another session took over meanwhile is lost: it stays that session's, and nothing is written to it.
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
            None => {
                let after = self.after(line, &look);
                if !after.1 && !start {
                    lock(&line.state).standing = Standing::Lost;
                    return Err(line.lost());
                }
                self.record(line, &look, after)?
            }
        };
        lock(&line.state).recorded = Some(recorded.clone());
        let (generation, (lineage, goes_on)) = recorded;
        if !goes_on && !start {
            let mut state = lock(&line.state);
            (state.lineage, state.standing) = (lineage, Standing::Lost);
            drop(state);
            return Err(line.lost());
        }
        let shared = look.shared;
        if let Some(shared) = &shared {
            shared.take_over(generation)?;
        }
        let catalog = Catalog::over(storage.clone());
        let ours = Arc::new(Ours { storage, catalog, shared, generation });
        let mut state = lock(&line.state);
        state.lineage = lineage;
        state.standing = Standing::Ours(ours.clone());
        (state.error, state.failing) = (None, false);
        Ok(ours)
    }

    /// Returns the lineage that a take-over makes, and whether it continues the lineage before it.
    fn after(&self, line: &Line, look: &Looked) -> (Lineage, bool) {
        let before = lock(&line.state).lineage.clone();
        let note = lock(&self.note);
        let others = note.tiers.iter().filter(|(name, _)| **name != *line.name).map(|(_, lineage)| lineage);
        before.after(look, self.session, others)
    }

    /// Records the session in a tier, after a note of the lineage that results: `after`. Returns the
    /// generation, the lineage, and whether it continues the lineage before it.
    fn record(&self, line: &Line, look: &Looked, after: (Lineage, bool)) -> Result<(u64, (Lineage, bool))> {
        let before = lock(&line.state).lineage.clone();
        lock(&line.state).lineage = before.before(&after, look, self.session);
        self.write_note();
        let generation = look.record(self.session)?;
        if generation == look.next {
            return Ok((generation, after));
        }
        // Another session was recorded at the same time, and this session after it. So this session is the
        // newest and owns the tier. It promotes the steps that it saves itself.
        let unknown = Looked { shared: None, found: Found::Unknown, next: generation };
        Ok((generation, (before.after(&unknown, self.session, std::iter::empty()).0, after.1)))
    }

    /// Handles the `error` of a tier. Where the tier may be gone, as a mount may, it is opened and taken over
    /// anew.
    pub(super) fn away(&self, line: &Line, error: &Error) {
        if matches!(
            error.kind(),
            ErrorKind::NotFound | ErrorKind::Unavailable | ErrorKind::Internal | ErrorKind::Indeterminate
        ) {
            let mut state = lock(&line.state);
            if matches!(state.standing, Standing::Ours(_)) {
                (state.standing, state.recorded) = (Standing::Away, None);
                // The tier may be another one when it is back.
                state.done.clear();
            }
        }
    }

    /// Notes the lineages beside the session in the root. Best effort: see [`Note`].
    pub fn write_note(&self) {
        if let Err(error) = self.note() {
            tracing::warn!(
                error = format_args!("{error:#}"),
                "cannot write the note of the tiers: the next session may promote fewer steps"
            );
        }
    }

    /// Whether the ranks read a tier: they read the tiers that rank 0 noted last. A process alone reads every
    /// tier that it reaches.
    pub(super) fn is_noted(&self, line: &Line) -> bool {
        !matches!(self.part, Part::Leads { .. }) || lock(&self.note).ours.contains(&*line.name)
    }

    fn note(&self) -> Result<()> {
        let note = {
            let mut note = lock(&self.note);
            note.ours.clear();
            for line in &self.lines {
                let state = lock(&line.state);
                note.tiers.insert(line.name.to_string(), state.lineage.clone());
                if matches!(state.standing, Standing::Ours(_)) {
                    note.ours.insert(line.name.to_string());
                }
            }
            note.clone()
        };
        self.shared.as_ref().map_or(Ok(()), |shared| note.write(shared.as_ref(), self.generation))
    }

    /// Tells the tiers that the save of `ticket` is durable as `name`, which need not be a step of the root.
    pub fn durable(&self, ticket: &Ticket, name: Option<&str>) {
        let step = ticket.step;
        let promoted = name.is_some_and(|name| name == step_name(step));
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
                state.never.remove(&step);
                state.waiting.insert(attempt, (step, promotion.clone()));
            }
            line.moved.notify();
        }
    }

    /// Returns what an error of a save in the first tier means for the tiers. A save never bypasses a full
    /// first tier: promotion reads the bytes again, and the program may write its tensors after the fence.
    pub fn of_save(&self, why: Error) -> Error {
        if why.kind() != ErrorKind::NoSpace {
            return why;
        }
        let known = |line: &Arc<Line>| {
            let TierReport { tier, state, newest, lacks, .. } = line.report();
            format!("{tier:?} {state:?} newest={newest:?} lacks={lacks:?}")
        };
        let tiers: Vec<String> = self.lines.iter().map(known).collect();
        let what = "the first tier is full, and saves do not go straight to the tiers behind it: free space in it, keep \
                    fewer steps there by `keep_last`, or make a tier behind it the root";
        let what = format!("{what} first_tier={} tiers=[{}]", self.root.describe("").display(), tiers.join(", "));
        let full = Error::new(ErrorKind::NoSpace, what).with_ranks(why.ranks().iter().copied());
        let full = why.step().into_iter().fold(full, Error::with_step);
        let full = why.path().into_iter().fold(full, Error::with_path);
        full.with_source(why)
    }

    /// Promotes only the newest durable step from this call on.
    pub fn only_newest(&self) {
        self.set_mode(Mode::Newest);
    }

    /// Promotes all steps again.
    pub fn all_again(&self) {
        self.set_mode(Mode::All);
    }

    fn set_mode(&self, mode: Mode) {
        for line in &self.lines {
            let mut state = lock(&line.state);
            // A SIGTERM may arrive during a shutdown, whose deadline stays.
            if !matches!((state.mode, mode), (Mode::Closing(_), Mode::Newest | Mode::All)) {
                state.mode = mode;
            }
            drop(state);
            line.moved.notify();
        }
    }

    /// Waits until every tier has the step `newest`, or will never have it, for at most `slice`.
    pub fn has_newest(&self, newest: u64, slice: Duration) -> bool {
        let deadline = deadline_after(slice);
        let has = |line: &Line| {
            let state = lock(&line.state);
            let there = state.done.values().any(|done| done.step == newest) && !state.lacks.contains_key(&newest);
            let never = matches!(state.standing, Standing::Lost)
                || state.forks.contains(&newest)
                || state.never.contains(&newest);
            (there || never).then_some(())
        };
        self.lines.iter().all(|line| line.moved.wait_until(deadline, || has(line)).is_some())
    }

    /// Reports what each tier to which this process promotes has and lacks.
    pub fn report(&self) -> Vec<TierReport> {
        self.lines.iter().filter(|_| self.promotes()).map(|line| line.report()).collect()
    }

    /// Waits until no tier lacks a step that it wants, and ends the threads. A later call waits for threads
    /// that are still running.
    ///
    /// # Errors
    /// `Deadline`, naming tiers, roots and steps that were not promoted.
    pub fn close(&self, deadline: Instant) -> Result<()> {
        self.set_mode(Mode::Closing(deadline));
        let end = deadline.max(Instant::now()) + CLOSE_GRACE;
        loop {
            let mut threads = lock(&self.threads);
            for ended in threads.extract_if(.., |thread| thread.is_finished()) {
                if ended.join().is_err() {
                    tracing::error!("a thread that promotes has panicked: later steps were not promoted to its tier");
                }
            }
            if threads.is_empty() || Instant::now() >= end {
                for thread in threads.iter() {
                    tracing::error!(
                        thread = thread.thread().name(),
                        "a promotion thread hangs in a call of its tier: the shutdown goes on without it"
                    );
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
            lock(&line.claim).take();
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
            // The steps of a tier that was never reached are not known yet.
            let unknown = matches!(state.standing, Standing::Away);
            let lacks = |entry: &&Entry| {
                let lacks = state.lacks.get(&entry.step) == Some(&entry.attempt);
                let promoted = entry.name == step_name(entry.step);
                lacks || unknown && promoted && !state.lineage.had.contains(&entry.attempt)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::local::Local;

    /// Once, both sessions lost the tier: the first to the second, and the second because the first was
    /// there.
    #[test]
    fn of_two_sessions_that_take_a_tier_over_at_the_same_time_the_later_one_owns_it() {
        let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let storage = || Arc::new(Local::open(tier.path()).unwrap());
        let tiers = vec![Tier::over("shared", storage())];
        let late = Behind::over(Arc::new(Local::open(root.path()).unwrap()), Note::default(), tiers, Part::Alone);
        let late = late.unwrap();
        let line = &late.lines[0];
        let look = Looked::at(storage().as_ref()).unwrap();
        let other = Looked::at(storage().as_ref()).unwrap();
        assert_eq!(other.record(Uuid::new_v4()).unwrap(), 1);
        let recorded = late.record(line, &look, late.after(line, &look)).unwrap();
        assert_eq!(recorded.0, 2);
        lock(&line.state).recorded = Some(recorded);
        let ours = late.reach(line, false).unwrap();
        line.check(&ours).unwrap();
        let lineage = &lock(&line.state).lineage;
        assert!(lineage.allows(Some(late.session)) && !lineage.allows(None), "what was there before may be a fork");
    }

    #[test]
    fn sigterm_during_a_shutdown_does_not_take_back_its_deadline() {
        let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let tier = Tier::over("shared", Arc::new(Local::open(tier.path()).unwrap()));
        let behind = Behind::new(Arc::new(Local::open(root.path()).unwrap()), Note::default(), vec![tier], Part::Alone);
        let behind = behind.unwrap();
        let mode = || lock(&behind.lines[0].state).mode;
        behind.only_newest();
        assert_eq!(mode(), Mode::Newest);
        behind.all_again();
        assert_eq!(mode(), Mode::All);
        let deadline = Instant::now();
        behind.close(deadline).unwrap();
        behind.only_newest();
        behind.all_again();
        assert_eq!(mode(), Mode::Closing(deadline));
    }
}
