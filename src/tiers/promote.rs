//! The promotion thread: it compares the steps of the root with those of its tier, and copies the steps that
//! the tier lacks, newest first.

use super::behind::Behind;
use super::copy::{Into, Owner};
use super::line::{Line, Mode, Ours, Standing};
use crate::catalog::{Catalog, Entry, Mark};
use crate::checkpoint::Checkpoint;
use crate::completion::{Signal, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{self, guarded};
use crate::id::{Attempt, parse_step_name, step_name};
use crate::own_threads;
use crate::settings::Priority;
use crate::storage::Sweep;
use crate::sync::lock;
use crate::thread::{adopt, spawn};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long the thread waits after one error, and at most after many.
const BACKOFF: Duration = Duration::from_millis(200);
const MOST_BACKOFF: Duration = Duration::from_secs(60);

/// How often the thread looks for steps without being told. Another process may have put such steps into the
/// root.
const LOOK: Duration = Duration::from_secs(300);

/// A step, and the session that wrote it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Written {
    attempt: Attempt,
    session: Option<Uuid>,
}

impl Written {
    fn of(checkpoint: &Checkpoint) -> Self {
        Self { attempt: checkpoint.attempt(), session: checkpoint.manifest().session }
    }
}

/// The result of one look.
enum Looked {
    /// A step was promoted: look again at once.
    Promoted,
    /// The tier lacks nothing that this session can promote.
    Done,
}

impl Behind {
    /// Starts the threads that promote the steps of `catalog`.
    pub fn start(self: &Arc<Self>, catalog: &Arc<Catalog>, executor: &Arc<Signal>) -> Result<()> {
        for line in &self.lines {
            let (behind, line, catalog, executor) = (self.clone(), line.clone(), catalog.clone(), executor.clone());
            let thread = spawn("ashore-promote".into(), move || run(&behind, &line, &catalog, &executor))?;
            lock(&self.threads).push(thread);
        }
        Ok(())
    }
}

/// The body of the thread.
fn run(behind: &Arc<Behind>, line: &Arc<Line>, catalog: &Catalog, executor: &Arc<Signal>) {
    own_threads::mark(executor);
    adopt(Priority::Low);
    let mut promoter = Promoter {
        behind,
        line,
        catalog,
        there: HashMap::new(),
        newest: BTreeSet::new(),
        refused: HashMap::new(),
        swept: None,
    };
    let mut backoff = BACKOFF;
    loop {
        let (saved, mode) = {
            let state = line.state();
            (state.saved, state.mode)
        };
        let looked = guarded("a storage panicked during a promotion", || promoter.look());
        // After an error the thread waits, even if more steps are saved meanwhile.
        let (until, patient) = match looked {
            Ok(Looked::Promoted) => {
                backoff = BACKOFF;
                continue;
            }
            Ok(Looked::Done) => {
                backoff = BACKOFF;
                if matches!(mode, Mode::Closing(_)) {
                    return;
                }
                (deadline_after(LOOK), false)
            }
            Err(error) => {
                let wait = jittered(backoff);
                backoff = backoff.saturating_mul(2).min(MOST_BACKOFF);
                promoter.failed(&error, wait);
                (deadline_after(wait), true)
            }
        };
        let end = match mode {
            Mode::Closing(end) if Instant::now() >= end => return,
            Mode::Closing(end) => until.min(end),
            Mode::All | Mode::Newest => until,
        };
        line.moved.wait_until(end, || {
            let state = line.state();
            (state.mode != mode || !patient && state.saved != saved).then_some(())
        });
    }
}

/// Returns a time between a half and one and a half of `wait`.
fn jittered(wait: Duration) -> Duration {
    let random = Uuid::new_v4().as_u128() as u8;
    wait / 2 + wait * u32::from(random) / 255
}

struct Promoter<'a> {
    behind: &'a Behind,
    line: &'a Line,
    catalog: &'a Catalog,
    /// The steps in the tier, by name. Only this session writes them.
    there: HashMap<String, Written>,
    /// The newest durable steps of the root, by number and by time, which the tier always wants.
    newest: BTreeSet<u64>,
    /// Attempts that cannot be promoted: they are damaged, or the tier has something else under their names.
    refused: HashMap<Attempt, Error>,
    /// The generation in which the tier was swept.
    swept: Option<u64>,
}

impl Promoter<'_> {
    /// Compares, and promotes the steps that the tier lacks, newest first, until a newer step is saved.
    fn look(&mut self) -> Result<Looked> {
        let before = {
            let state = self.line.state();
            if matches!(state.standing, Standing::Lost) {
                return Ok(Looked::Done);
            }
            (state.saved, state.mode)
        };
        let away = matches!(self.line.state().standing, Standing::Away);
        let reached = self.behind.reach(self.line, false);
        if away && !matches!(self.line.state().standing, Standing::Away) {
            self.behind.write_note();
        }
        let ours = match reached {
            Err(error) if matches!(self.line.state().standing, Standing::Lost) => {
                self.line.lose(&error);
                self.behind.write_note();
                return Ok(Looked::Done);
            }
            reached => reached?,
        };
        self.line.check(&ours)?;
        // A save that waits here was published before the root is listed.
        let waited = self.line.waiting();
        let lacked = self.line.state().lacks.clone();
        let local = self.local()?;
        let there: HashSet<Attempt> = local.values().map(|written| written.attempt).collect();
        self.line.tell_gone(|attempt| waited.contains(&attempt) && !there.contains(&attempt));
        self.survey(&ours)?;
        let todo = self.choose(&local, &lacked);
        if todo.is_empty() {
            self.sweep(&ours);
            // A refused step stays among the steps that the tier lacks, with its error.
            let refused = local.values().rev().find_map(|written| self.refused.get(&written.attempt));
            let mut state = self.line.state();
            (state.error, state.failing) = (refused.cloned(), false);
            return Ok(Looked::Done);
        }
        // Where the tier keeps all steps, a promotion does not change which steps it wants.
        let most = if self.line.retention.is_unlimited() { todo.len() } else { 1 };
        for (step, written) in todo.into_iter().take(most) {
            self.attempt(&ours, step, written)?;
            let state = self.line.state();
            if state.saved != before.0 || state.mode != before.1 || matches!(state.standing, Standing::Lost) {
                break;
            }
        }
        Ok(Looked::Promoted)
    }

    /// Deletes what dead processes have left in the tier: once after each take-over, when the tier lacks
    /// nothing.
    fn sweep(&mut self, ours: &Ours) {
        let closing = matches!(self.line.state().mode, Mode::Closing(_));
        if !closing && self.swept.replace(ours.generation) != Some(ours.generation) {
            guard::attempt("sweep a tier", || ours.storage.sweep(Sweep::default()).map(drop));
        }
    }

    /// Promotes one step. An error that concerns only this step is reported to its save.
    fn attempt(&mut self, ours: &Ours, step: u64, written: Written) -> Result<()> {
        self.line.state().copying = Some(step);
        let promoted = self.promote(ours, step, written);
        self.line.state().copying = None;
        match promoted {
            Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Conflict) => {
                if matches!(self.line.state().standing, Standing::Lost) {
                    return Ok(());
                }
                let error = self.line.located("a step cannot be promoted", &error).with_step(step);
                tracing::error!(step, error = format_args!("{error:#}"), "a step is not promoted");
                self.line.tell_all(|attempt| attempt == written.attempt, &error);
                {
                    let mut state = self.line.state();
                    (state.error, state.failing) = (Some(error.clone()), false);
                    state.never.insert(step);
                }
                self.refused.insert(written.attempt, error);
                self.line.moved.notify();
                Ok(())
            }
            // Retention has deleted the step.
            Err(error) if error.kind() == ErrorKind::NotFound && self.catalog.checkpoint(step).is_err() => Ok(()),
            // A newer step was saved, and the process is about to end.
            Err(error) if error.kind() == ErrorKind::Cancelled => Ok(()),
            promoted => promoted.map_err(|error| error.with_step(step)),
        }
    }

    /// The durable steps of the root under the names that this library gives, except those that are marked
    /// bad.
    fn local(&mut self) -> Result<BTreeMap<u64, Written>> {
        let (mut found, bad) = (BTreeMap::new(), self.catalog.bad());
        let mut entries = Vec::new();
        for entry in self.catalog.list()? {
            if entry.name != step_name(entry.step)
                || bad.contains(&entry.attempt)
                || !self.catalog.is_settled(&entry)?
            {
                continue;
            }
            match self.catalog.checkpoint(entry.step) {
                Ok(checkpoint) if checkpoint.attempt() == entry.attempt => {
                    found.insert(entry.step, Written::of(&checkpoint));
                    entries.push(entry);
                }
                Ok(_) => {}
                Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt) => {}
                Err(error) => return Err(error),
            }
        }
        let last = self.catalog.head(&entries).map(|head| head.step);
        self.newest = last.into_iter().chain(found.keys().next_back().copied()).collect();
        Ok(found)
    }

    /// Reads which attempts the tier has.
    fn survey(&mut self, ours: &Ours) -> Result<()> {
        let failed = |error: Error| self.line.located("a tier cannot be listed", &error);
        let names: BTreeSet<String> = ours.storage.list().map_err(failed)?.into_iter().collect();
        self.there.retain(|name, _| names.contains(name));
        for name in names {
            if self.there.contains_key(&name) {
                continue;
            }
            match Checkpoint::try_open(&ours.storage, &name) {
                Ok(checkpoint) => _ = self.there.insert(name, Written::of(&checkpoint)),
                Err(failure) => {
                    let damaged = failure.is_damage();
                    let error = failure.into_error();
                    // A damaged copy is replaced. The promotion of any other such step fails by itself.
                    if !damaged
                        && !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Corrupt | ErrorKind::Conflict)
                    {
                        return Err(failed(error));
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns the steps that the tier wants and lacks, and that this session may promote, newest first.
    /// `lacked` holds the steps that the tier was known to lack before `local` was listed.
    fn choose(&mut self, local: &BTreeMap<u64, Written>, lacked: &BTreeMap<u64, Attempt>) -> Vec<(u64, Written)> {
        let (mut lacks, mut forks, mut found) = (BTreeMap::new(), BTreeSet::new(), Vec::new());
        let number = |name: &String| parse_step_name(name).filter(|step| step_name(*step) == *name);
        let numbers: BTreeSet<u64> = self.there.keys().filter_map(number).collect();
        let (mut unwanted, mut forked, mut never) = (Vec::new(), Vec::new(), BTreeSet::new());
        let mut state = self.line.state();
        let attempts: HashSet<Attempt> = local.values().map(|written| written.attempt).collect();
        state.lineage.had.retain(|attempt| attempts.contains(attempt));
        state.done.retain(|attempt, _| attempts.contains(attempt));
        self.refused.retain(|attempt, _| attempts.contains(attempt));
        for (&step, written) in local {
            let there = self.there.get(&step_name(step));
            if there.is_some_and(|there| there.attempt == written.attempt) {
                found.push((step, written.attempt));
                continue;
            }
            // Another attempt of the lineage is an overwrite by this job itself.
            if there
                .is_some_and(|there| !state.lineage.replaces(there.session) || !state.lineage.allows(written.session))
            {
                forks.insert(step);
                forked.push(written.attempt);
                continue;
            }
            if state.lineage.had.contains(&written.attempt) || !state.lineage.allows(written.session) {
                never.insert(step);
                continue;
            }
            if self.refused.contains_key(&written.attempt) {
                never.insert(step);
                lacks.insert(step, *written);
                continue;
            }
            let wanted = || {
                let with = || numbers.iter().copied().chain([step]);
                self.line.retention.plan(with(), with()).is_ok_and(|gone| !gone.contains(&step))
            };
            if there.is_none() && !self.newest.contains(&step) && !wanted() {
                never.insert(step);
                unwanted.push(written.attempt);
                continue;
            }
            lacks.insert(step, *written);
        }
        let new: Vec<u64> = forks.difference(&state.forks).copied().collect();
        state.forks = forks;
        // Steps saved since the listing are not in it.
        let mut since = std::mem::take(&mut state.lacks);
        since.retain(|step, attempt| lacked.get(step) != Some(attempt) && !attempts.contains(attempt));
        never.retain(|step| !since.contains_key(step));
        state.lacks = lacks.iter().map(|(step, written)| (*step, written.attempt)).chain(since).collect();
        state.never = never;
        lacks.retain(|_, written| !self.refused.contains_key(&written.attempt));
        let promotable = |written: &Written| !self.refused.contains_key(&written.attempt);
        let newest = local.iter().rev().find(|(_, written)| promotable(written)).map(|(step, _)| *step);
        let mode = state.mode;
        let known: Vec<_> = found.into_iter().filter(|(_, attempt)| !state.done.contains_key(attempt)).collect();
        drop(state);
        for step in new {
            let (tier, root) = (&*self.line.name, self.line.place.display());
            tracing::error!(
                step,
                tier,
                %root,
                "the first tier and this tier have different attempts at the step: the attempt in this tier counts"
            );
        }
        for (step, attempt) in known {
            self.line.tell(self.line.promoted(step, attempt, 0));
        }
        self.line.moved.notify();
        let what = "the tier has another attempt at the step, of another run, which is not replaced";
        self.line.tell_all(|attempt| forked.contains(&attempt), &Error::new(ErrorKind::Conflict, what));
        let what = "the retention of the tier would delete this step at once, so it is not promoted";
        self.line.tell_all(|attempt| unwanted.contains(&attempt), &Error::new(ErrorKind::Cancelled, what));
        let all = lacks.into_iter().rev();
        all.filter(|(step, _)| mode != Mode::Newest || Some(*step) == newest).collect()
    }

    fn promote(&mut self, ours: &Ours, step: u64, written: Written) -> Result<()> {
        let from = self.catalog.checkpoint(step)?;
        if from.attempt() != written.attempt {
            return Err(Error::new(ErrorKind::Cancelled, "the step was replaced in the first tier"));
        }
        let began = Instant::now();
        let owner = match &ours.shared {
            Some(shared) => Owner::Session { shared: shared.as_ref(), generation: ours.generation },
            None => Owner::Caller,
        };
        let lineage = self.line.state().lineage.clone();
        let replaces = |there: &Checkpoint| lineage.replaces(there.manifest().session);
        let into = Into { to: &ours.storage, owner, replaces: &replaces };
        let copied = into.copy(&from, &|_| self.go_on(step)).inspect_err(|_| drop(self.line.check(ours)))?;
        self.there.insert(from.name().to_owned(), written);
        self.line.tell(self.line.promoted(step, written.attempt, copied.bytes));
        self.behind.write_note();
        let (tier, bytes, took) = (&*self.line.name, copied.bytes, began.elapsed());
        tracing::info!(step, tier, path = %copied.path.display(), bytes, ?took, "a step was promoted");
        if !self.line.retention.is_unlimited() {
            // Pruning is retried after the next promotion. It chooses by number alone: steps are promoted
            // newest first, so the time of writing says nothing.
            let prune = || {
                let marks = self.catalog.marks()?;
                let kept = |entry: &&Entry| {
                    let marked = marks.iter().any(|m| m.attempt == entry.attempt && m.mark == Mark::Keep);
                    marked || self.newest.contains(&entry.step)
                };
                let gone = |entries: &[Entry]| {
                    let steps = || entries.iter().map(|entry| entry.step);
                    let mut gone: BTreeSet<u64> =
                        self.line.retention.plan(steps(), steps()).unwrap_or_default().into_iter().collect();
                    entries.iter().filter(kept).for_each(|entry| _ = gone.remove(&entry.step));
                    gone
                };
                ours.catalog.prune_chosen(gone).map(drop)
            };
            guard::attempt("prune a tier", prune);
        }
        Ok(())
    }

    /// Ends a copy at the deadline of a shutdown, or when the process is about to end and has saved a newer
    /// step.
    fn go_on(&self, step: u64) -> Result<()> {
        let state = self.line.state();
        match state.mode {
            Mode::Closing(end) if Instant::now() >= end => {
                Err(Error::new(ErrorKind::Deadline, "the executor was shut down before the step was promoted"))
            }
            Mode::Newest if state.lacks.keys().any(|lacks| *lacks > step && !state.never.contains(lacks)) => {
                Err(Error::new(ErrorKind::Cancelled, "only the newest step is promoted"))
            }
            _ => Ok(()),
        }
    }

    fn failed(&mut self, error: &Error, wait: Duration) {
        // An error of the first tier says nothing about this tier.
        let first = error
            .path()
            .is_some_and(|path| path.starts_with(self.behind.root.describe("")) && !path.starts_with(&self.line.place));
        let failing = !first && (error.is_transient() || error.kind() == ErrorKind::NotFound);
        if !first {
            self.behind.away(self.line, error);
            self.there.clear();
        }
        let what = if first { "promotion failed, because of an error in the first tier" } else { "promotion failed" };
        let error = self.line.located(what, error);
        let (tier, root) = (&*self.line.name, self.line.place.display());
        tracing::warn!(tier, %root, error = format_args!("{error:#}"), ?wait, "a promotion is tried again");
        let mut state = self.line.state();
        (state.error, state.failing) = (Some(error), failing);
    }
}
