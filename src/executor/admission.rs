//! Admission: decides whether a save may begin while others are unfinished.

use super::{Admission, CheckpointExecutor};
use crate::completion::{Calls, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::outcome::Outcome;
use crate::own_threads;
use crate::save::Save;
use crate::settings::{OnUnseenError, Overlap};
use crate::staging::{Job, Stager};
use crate::sync::{MutexGuard, lock};
use crate::ticket::{Issue, Place, Ticket};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// How long after the deadline the rounds of several ranks may take to end. They may need a veto and its
/// fsync.
const ROUNDS_GRACE: Duration = Duration::from_secs(10);

/// The request that is to be admitted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind<'a> {
    /// A save whose state arrives later. Its fence and its place are checked when it begins.
    Deferred,
    /// A save to this place.
    To(&'a Place),
}

/// The decision on a requested save.
enum Verdict {
    /// The save may begin.
    Begin,
    /// The save does not begin and ends with this outcome.
    Ended(Outcome),
    /// The caller asks again after this waiting save has been superseded: see [`supersede`].
    InsteadOf(Waiting),
    /// The caller asks again when one of these unfinished saves has ended.
    After(Vec<Arc<Ticket>>),
}

/// A save that has not begun to stage.
enum Waiting {
    Staging(Box<Job>),
    Deferred(Arc<Ticket>),
}

/// Decides whether a save of `step` may begin at once. Never waits, because the caller holds the lock that
/// every other save needs.
///
/// # Errors
/// `Conflict` when the step is being saved.
fn admit(stager: &Stager, overlap: Overlap, step: u64, kind: Kind<'_>) -> Result<Verdict> {
    let unfinished = stager.saves.unfinished();
    if let Kind::To(place) = kind {
        refuse_conflict(&unfinished, step, place)?;
    }
    // Saves of other steps to the same place would be published in any order, so this save waits for them.
    let begin = |unfinished: &[Arc<Ticket>]| match kind {
        Kind::To(place) => match to(place, unfinished) {
            earlier if earlier.is_empty() => Verdict::Begin,
            earlier => Verdict::After(earlier),
        },
        Kind::Deferred => Verdict::Begin,
    };
    let room = match overlap {
        Overlap::Skip => {
            let by = unfinished.last().map(|t| t.step);
            return Ok(by.map_or(Verdict::Begin, |by| Verdict::Ended(Outcome::Skipped { by })));
        }
        Overlap::Latest => {
            if let Some(job) = stager.take_waiting() {
                return Ok(Verdict::InsteadOf(Waiting::Staging(Box::new(job))));
            }
            let mut newest_first = unfinished.iter().rev();
            let waiting = newest_first.find(|t| t.is_deferred() && !t.awaited.swap(true, Ordering::AcqRel));
            let instead_of = |ticket: &Arc<Ticket>| Verdict::InsteadOf(Waiting::Deferred(ticket.clone()));
            return Ok(waiting.map_or_else(|| begin(&unfinished), instead_of));
        }
        Overlap::Queue(room) => room,
        Overlap::Block => 0,
    };
    Ok(if unfinished.len() <= room { begin(&unfinished) } else { Verdict::After(unfinished) })
}

/// Returns the saves to `place` that have begun and not ended.
fn to(place: &Place, unfinished: &[Arc<Ticket>]) -> Vec<Arc<Ticket>> {
    unfinished.iter().filter(|t| !t.is_deferred() && t.extent().place == *place).cloned().collect()
}

/// Refuses a save of the step `step` in the root if another save of that step in the root has begun and not
/// ended. A directory outside of the root is no step.
fn refuse_conflict(unfinished: &[Arc<Ticket>], step: u64, place: &Place) -> Result<()> {
    let in_root = |t: &Ticket| !t.is_deferred() && t.extent().place.parent.is_none();
    if place.parent.is_none() && unfinished.iter().any(|t| t.step == step && in_root(t)) {
        return Err(Error::new(ErrorKind::Conflict, "a save of this step is under way").with_step(step));
    }
    Ok(())
}

/// Ends a waiting save that `step` supersedes. Holds no lock, because wakers run here.
fn supersede(stager: &Stager, waiting: Waiting, step: u64) {
    let ticket = match waiting {
        Waiting::Staging(job) => {
            let ticket = job.ticket.clone();
            stager.discard(*job);
            ticket
        }
        Waiting::Deferred(ticket) => ticket,
    };
    ticket.hand_over(ticket.finish(ticket.failure().map_or(Ok(Outcome::Superseded { by: step }), Err)));
}

pub(super) fn shut_down() -> Error {
    Error::invalid("the executor is shut down")
}

/// Waits until one of `unfinished` has ended. The first to end is not always the oldest: each has its own
/// deadline and can be cancelled.
///
/// # Errors
/// `Busy` at the deadline, or at once in a thread of the executor, because the saves may be waiting for that
/// thread.
pub(super) fn wait(stager: &Stager, unfinished: &[Arc<Ticket>], step: u64, deadline: Instant) -> Result<()> {
    let ended = || unfinished.iter().any(|ticket| ticket.done.is_complete()).then_some(());
    let own = own_threads::is_one_of(&stager.signal);
    let deadline = if own { Instant::now() } else { deadline };
    if stager.signal.wait_until(deadline, ended).is_some() {
        return Ok(());
    }
    let saves = unfinished.len();
    if own {
        let busy = "earlier saves have not ended, and a thread of the executor cannot wait for them";
        return Err(Error::new(ErrorKind::Busy, format!("{busy} unfinished={saves}")).with_step(step));
    }
    let busy = format!("earlier saves have not ended; the storage is slower than the saves come unfinished={saves}");
    Err(Error::new(ErrorKind::Busy, busy).with_step(step))
}

/// A save that may begin, with the lock under which it begins, or the handle of a save that has ended.
pub(super) enum Admitted<'a> {
    Begins(MutexGuard<'a, Admission>, Attempt),
    Ended(Save),
}

impl CheckpointExecutor {
    /// Returns the deadline of a save with `timeout`, which the settings limit.
    pub(crate) fn deadline(&self, timeout: Option<Duration>) -> Instant {
        let longest = self.settings.save_timeout;
        deadline_after(timeout.map_or(longest, |timeout| timeout.min(longest)))
    }

    /// Returns, or logs, the error of an earlier save that no call has returned.
    ///
    /// # Errors
    /// The error of that save.
    pub(super) fn report_unseen(&self) -> Result<()> {
        let Some(error) = self.stager.saves.unobserved() else { return Ok(()) };
        match self.settings.on_unseen_error {
            OnUnseenError::NextCall => return Err(error),
            OnUnseenError::Warn => error.log_unseen(),
        }
        Ok(())
    }

    /// Waits until a save of `step` may begin, as the overlap policy says.
    ///
    /// # Errors
    /// The error of an earlier save that no call has returned. `Invalid` after a shutdown, or a forgotten
    /// fence; `Conflict` if a save of the step is under way; `Busy` if too many saves were still unfinished
    /// at `deadline`.
    pub(super) fn admit(
        &self,
        step: u64,
        attempt: Option<Attempt>,
        deadline: Instant,
        last: bool,
        kind: Kind<'_>,
        overlap: Overlap,
    ) -> Result<Admitted<'_>> {
        let began = Instant::now();
        if !last {
            self.report_unseen()?;
        }
        loop {
            match self.admit_now(step, attempt, began, last, kind, overlap)? {
                Ok(admitted) => return Ok(admitted),
                Err(unfinished) => wait(&self.stager, &unfinished, step, deadline)?,
            }
        }
    }

    /// [`CheckpointExecutor::admit`] without its wait. The inner error lists the unfinished saves that leave
    /// no room: the caller asks again when one of them has ended.
    pub(super) fn admit_now(
        &self,
        step: u64,
        attempt: Option<Attempt>,
        began: Instant,
        last: bool,
        kind: Kind<'_>,
        overlap: Overlap,
    ) -> Result<Result<Admitted<'_>, Vec<Arc<Ticket>>>> {
        // A save that superseded another one begins, even if admission closes meanwhile.
        let mut superseded = false;
        loop {
            let mut admission = lock(&self.admission);
            if self.threads.channels().is_none() {
                return Err(shut_down());
            }
            if kind != Kind::Deferred {
                self.refuse_unfenced(step)?;
            }
            let attempt = attempt.unwrap_or_else(|| admission.attempts.next());
            if self.threads.admission_is_closed() && !last && !superseded {
                return Ok(Ok(Admitted::Ended(self.resolved(step, attempt, began, self.last_word(step)))));
            }
            match admit(&self.stager, overlap, step, kind)? {
                Verdict::Begin => return Ok(Ok(Admitted::Begins(admission, attempt))),
                Verdict::Ended(outcome) => {
                    return Ok(Ok(Admitted::Ended(self.resolved(step, attempt, began, outcome))));
                }
                Verdict::InsteadOf(waiting) => {
                    drop(admission);
                    supersede(&self.stager, waiting, step);
                    superseded = true;
                }
                Verdict::After(unfinished) => return Ok(Err(unfinished)),
            }
        }
    }

    /// Checks that a deferred save may begin.
    ///
    /// # Errors
    /// As [`CheckpointExecutor::admit`]; `Cancelled` if the save has ended.
    pub(super) fn admit_deferred(&self, ticket: &Ticket, place: &Place) -> Result<Admitted<'_>> {
        let admission = lock(&self.admission);
        if self.threads.channels().is_none() {
            return Err(shut_down());
        }
        if ticket.done.is_complete() {
            return Err(Error::new(ErrorKind::Cancelled, "the save ended before its state had come"));
        }
        self.refuse_unfenced(ticket.step)?;
        let unfinished = self.stager.saves.unfinished();
        refuse_conflict(&unfinished, ticket.step, place)?;
        if !to(place, &unfinished).is_empty() {
            let why = format!("a save to this place is under way name={:?}", place.name);
            return Err(Error::new(ErrorKind::Conflict, why).with_step(ticket.step));
        }
        Ok(Admitted::Begins(admission, ticket.attempt()))
    }

    /// Refuses a save if an earlier save of writable tensors was not fenced: the program would write them
    /// while copies read them.
    fn refuse_unfenced(&self, step: u64) -> Result<()> {
        let Some(ticket) = self.stager.saves.unfenced() else { return Ok(()) };
        let why = "writable tensors are still being read: call `fence` before the next save";
        Err(Error::invalid(format!("{why} unfenced={}", ticket.step)).with_step(step))
    }

    /// Returns the outcome of a save that is requested after admission has closed.
    fn last_word(&self, step: u64) -> Outcome {
        Outcome::Skipped { by: self.stager.saves.unfinished().last().map_or(step, |ticket| ticket.step) }
    }

    /// Returns the handle of a save that did not begin and ended with `outcome`.
    pub(super) fn resolved(&self, step: u64, attempt: Attempt, began: Instant, outcome: Outcome) -> Save {
        let ticket = self.issue(step, attempt, began, deadline_after(self.settings.save_timeout));
        ticket.release();
        ticket.finish(Ok(outcome)).into_iter().for_each(Calls::here);
        Save::new(ticket)
    }

    pub(super) fn issue(&self, step: u64, attempt: Attempt, began: Instant, deadline: Instant) -> Arc<Ticket> {
        // The committer knows which ranks are missing at the deadline, so it gets time to report them.
        let grace = if self.turns.is_some() { ROUNDS_GRACE } else { Duration::ZERO };
        let issue = Issue { step, attempt, deadline, grace };
        let ticket = Ticket::new(issue, began, self.stager.signal.clone(), self.stager.calls.clone());
        if let Some(behind) = &self.behind {
            ticket.promote_to(behind.names());
        }
        ticket.tell_to(self.stager.telemetry.clone());
        Arc::new(ticket)
    }
}
