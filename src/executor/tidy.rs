//! Tidying after a commit is durable and reported, off the path of saves: it deletes the replaced copy,
//! writes the hint, applies retention and sweeps.
//!
//! No error here can fail a save. The committer waits when [`MOST_UNTIDIED`] saves wait to be tidied up,
//! which bounds the files that are not deleted yet. Work that fails is retried after later saves, and once
//! more when the executor ends.

use super::ending::Leftover;
use super::scrub::Scrub;
use crate::catalog::{Catalog, Keeping};
use crate::guard::{attempt, dropped};
use crate::id::parse_step_name;
use crate::storage::{Remnant, State, Storage, Sweep, Swept};
use crate::telemetry::meters::{self, Meters};
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::iter::once;
use std::time::{Duration, Instant};

/// The number of saves that may wait while as many are being tidied up. An attempt keeps three descriptors
/// open until then.
pub(super) const MOST_UNTIDIED: usize = 16;

/// The number of sweeps after saves that look for files this process left. After that only the hourly sweep,
/// and one at the end, looks.
const SWEEP_TRIES: u8 = 3;
/// The number of rounds that try to delete the files of an attempt by its own descriptors.
const OWED_TRIES: u8 = 3;
/// How often to sweep files that other processes may have left. `BRANCH_CHECK_INTERVAL` is how often to check
/// whether that is due.
const SWEEP_INTERVAL: Duration = Duration::from_secs(3600);
/// How often the steps of the root are counted for metrics.
const COUNT_INTERVAL: Duration = Duration::from_secs(60);
const BRANCH_CHECK_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// The body of the tidying thread: sweeps, then tidies up after saves until the committer has ended. Saves
/// that arrived meanwhile share one hint, one prune and one sweep.
pub(super) fn run(
    leavings: &Receiver<Leftover>,
    storage: &dyn Storage,
    catalog: &Catalog,
    keeping: &Keeping,
    sweep: Sweep,
    scrub: &Scrub,
) {
    attempt("look at the steps", || catalog.warn_of_oddities());
    let (owed, reported) = (Vec::new(), Vec::new());
    let (unpruned, unswept, tries, last) = (false, false, SWEEP_TRIES, None);
    let counted = None;
    let mut tidy = Tidy { storage, catalog, keeping, sweep, owed, unpruned, unswept, tries, reported, last, counted };
    tidy.sweep_all();
    tidy.count();
    let mut swept = Instant::now();
    loop {
        match leavings.recv_timeout(BRANCH_CHECK_INTERVAL) {
            Ok(first) => tidy.take(once(first).chain(leavings.try_iter()).take(MOST_UNTIDIED)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => break,
        }
        if swept.elapsed() >= SWEEP_INTERVAL {
            swept = Instant::now();
            tidy.sweep_all();
        }
        tidy.work();
        tidy.count();
        attempt("read a shared file back", || scrub.run(|| !leavings.is_empty()));
    }
    tidy.tries = tidy.tries.max(1);
    tidy.work();
    tidy.counted = None;
    tidy.count();
    tidy.owed.drain(..).for_each(dropped);
}

/// An attempt that has ended and still has files on the medium.
struct Owed {
    left: Leftover,
    /// How many more rounds of work try to delete the files before a sweep does.
    tries: u8,
}

struct Tidy<'a> {
    storage: &'a dyn Storage,
    catalog: &'a Catalog,
    keeping: &'a Keeping,
    sweep: Sweep,
    /// Attempts that have ended and still have files on the medium, at most [`MOST_UNTIDIED`] after each
    /// round of work.
    owed: Vec<Owed>,
    /// Whether steps were published since the last successful prune.
    unpruned: bool,
    /// Whether this process left files that only a sweep can remove.
    unswept: bool,
    /// How many more rounds may sweep for those files.
    tries: u8,
    /// The names that the last sweep neither removed nor knew to be alive.
    reported: Vec<String>,
    /// The step that was published last.
    last: Option<u64>,
    /// When the steps were counted.
    counted: Option<Instant>,
}

impl Tidy<'_> {
    fn take(&mut self, batch: impl Iterator<Item = Leftover>) {
        let before = self.owed.len();
        self.owed.extend(batch.map(|left| Owed { left, tries: OWED_TRIES }));
        let mut names = self.owed.iter().skip(before).filter_map(|owed| owed.left.published());
        // A checkpoint under a name of its own is not the latest step.
        if let Some(newest) = names.rfind(|name| parse_step_name(name).is_some()) {
            attempt("write the hint", || self.storage.hint(newest));
            let step = parse_step_name(newest);
            // A run begins, or returns to an earlier step.
            if let Some(step) = step.filter(|step| self.last.is_none_or(|last| *step < last)) {
                attempt("look for newer steps", || self.catalog.warn_if_below(step));
            }
            self.last = step;
        }
        self.unpruned |= self.owed.iter().skip(before).any(|owed| owed.left.published().is_some());
    }

    fn work(&mut self) {
        let (mut unknown, sweep) = (false, self.sweep);
        let over = |owed: &mut Owed| match &owed.left {
            Leftover::Published { attempt: step, .. } => attempt("delete the replaced copy", || step.settle()),
            Leftover::Elsewhere { storage } => {
                attempt("sweep beside a checkpoint", || storage.sweep(sweep).map(drop));
                true
            }
            Leftover::Failed { attempt: failed } => attempt("delete a failed attempt", || failed.abandon()),
            Leftover::Unknown => {
                unknown = true;
                true
            }
        };
        self.owed.extract_if(.., over).for_each(dropped);
        // After a failed fsync an attempt cannot be deleted by its own descriptors. A sweep opens other
        // descriptors.
        let given_up = |owed: &mut Owed| {
            owed.tries -= 1;
            owed.tries == 0
        };
        let before = self.owed.len();
        self.owed.extract_if(.., given_up).for_each(dropped);
        unknown |= self.owed.len() < before;
        let most = self.owed.len().saturating_sub(MOST_UNTIDIED);
        self.owed.drain(..most).for_each(dropped);
        if unknown || most > 0 {
            (self.unswept, self.tries) = (true, SWEEP_TRIES);
        }
        if self.unpruned {
            self.unpruned = !attempt("prune", || self.keeping.prune(self.catalog));
        }
        if self.unswept && self.tries > 0 {
            self.tries -= 1;
            // An attempt that looks alive may be one that its last thread is still releasing.
            let done = |swept: Swept| swept.left.iter().all(|left| left.state == State::Undecided);
            self.unswept = !self.sweep().is_some_and(done);
        }
    }

    /// Counts the steps for metrics, unless they were counted a short time ago. Object stores are not
    /// counted, because opening every step costs requests.
    fn count(&mut self) {
        let dear = self.storage.directory().is_none();
        if !Meters::WANTED || dear || self.counted.is_some_and(|counted| counted.elapsed() < COUNT_INTERVAL) {
            return;
        }
        self.counted = Some(Instant::now());
        let count = || {
            let entries = self.catalog.list()?;
            meters::retained(entries.len(), entries.iter().map(|entry| entry.bytes).sum());
            Ok(())
        };
        attempt("count the steps", count);
    }

    /// Sweeps files that other processes may have left. A sweep that fails is retried after later saves.
    fn sweep_all(&mut self) {
        if self.sweep().is_none() {
            (self.unswept, self.tries) = (true, SWEEP_TRIES);
        }
    }

    fn sweep(&mut self) -> Option<Swept> {
        let mut done = None;
        attempt("sweep", || self.storage.sweep(self.sweep).map(|swept| done = Some(swept)));
        if let Some(swept) = &done {
            for removed in &swept.removed {
                tracing::info!(name = removed.name, why = removed.why, bytes = removed.bytes, "swept");
            }
            self.report(&swept.left);
        }
        done
    }

    /// Warns about files that take space and are not known to be alive, whenever their names have changed.
    fn report(&mut self, left: &[Remnant]) {
        let left: Vec<&Remnant> = left.iter().filter(|remnant| remnant.state != State::Live).collect();
        let names: Vec<String> = left.iter().map(|remnant| remnant.name.clone()).collect();
        if names != self.reported
            && let Some(first) = left.first()
        {
            let bytes: u64 = left.iter().map(|remnant| remnant.bytes).sum();
            let what = "unfinished saves of other hosts are left; `ashore prune --abandoned` deletes what is dead";
            let (attempts, after) = (left.len(), self.sweep.older_than);
            tracing::warn!(attempts, bytes, first = first.name, why = first.why, abandoned_after = ?after, "{what}");
        }
        self.reported = names;
    }
}
