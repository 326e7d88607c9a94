//! Deferred saves: before their state arrives, they have a position among other saves, a handle and a
//! deadline.

use super::CheckpointExecutor;
use super::admission::{Admitted, Kind, wait};
use crate::completion::Calls;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::outcome::{Committed, Outcome, Phase};
use crate::save::{Save, SaveOptions};
use crate::settings::IoMode;
use crate::staging::Stager;
use crate::state::StateDict;
use crate::ticket::{Extent, Ticket};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// The right to begin or end a deferred save. Dropping it unused ends the save. It does not keep the executor
/// alive.
pub(crate) struct DeferredSave {
    stager: Arc<Stager>,
    ticket: Arc<Ticket>,
    /// Set when the stager has the save and will end it.
    begun: bool,
    /// Whether the save has a position among those of the executor.
    listed: bool,
}

impl CheckpointExecutor {
    /// Reserves a position for a save of `step`, whose state arrives later, as the overlap policy allows.
    /// None if the policy ended the save.
    ///
    /// # Errors
    /// As [`CheckpointExecutor::save`], except that the step is checked when the save begins.
    pub(crate) fn defer(
        &self,
        step: u64,
        attempt: Option<Attempt>,
        timeout: Option<Duration>,
    ) -> Result<(Save, Option<DeferredSave>)> {
        self.may_defer(step)?;
        let (began, deadline) = (Instant::now(), self.deadline(timeout));
        let admitted = self.admit(step, attempt, deadline, false, Kind::Deferred, self.settings.overlap)?;
        Ok(self.position(step, admitted, began, deadline))
    }

    /// Saves `state` with the options from `to`, for threads that outlive their callers. The wait for room
    /// does not keep the executor alive, so that the program's last `Arc` waits for saves when it is dropped.
    /// The save gets its position when there is room.
    ///
    /// # Errors
    /// Errors of `to`; `Cancelled` if the executor has been dropped; `Busy` if too many saves were still
    /// unfinished at `deadline`; errors of [`CheckpointExecutor::defer`]. The save returns all others.
    pub(crate) fn save_when_room(
        executor: &Weak<Self>,
        deadline: Instant,
        state: StateDict<'static>,
        to: impl FnOnce(&Self) -> Result<(u64, SaveOptions)>,
    ) -> Result<Save> {
        let gone = || Error::new(ErrorKind::Cancelled, "the executor went before a deferred save could begin");
        let upgraded = || executor.upgrade().ok_or_else(gone);
        let (step, options) = to(&*upgraded()?)?;
        upgraded()?.report_unseen()?;
        loop {
            let this = upgraded()?;
            this.may_defer(step)?;
            let (began, until) = (Instant::now(), this.deadline(options.timeout));
            let overlap = this.settings.overlap;
            let unfinished = match this.admit_now(step, options.attempt, began, false, Kind::Deferred, overlap)? {
                Ok(admitted) => {
                    let (save, deferred) = this.position(step, admitted, began, until);
                    if let Some(deferred) = deferred {
                        deferred.begin(&this, state, options);
                    }
                    return Ok(save);
                }
                Err(unfinished) => unfinished,
            };
            let stager = this.stager.clone();
            drop(this);
            wait(&stager, &unfinished, step, deadline)?;
        }
    }

    /// Refuses to defer a save in a forked child, and with several ranks.
    fn may_defer(&self, step: u64) -> Result<()> {
        self.alive()?;
        if self.turns.is_some() {
            let why = "a save of several ranks cannot be deferred: call `save` when the state is there";
            return Err(Error::invalid(why).with_step(step));
        }
        Ok(())
    }

    /// Gives a position to an admitted save whose state has not arrived yet.
    fn position(
        &self,
        step: u64,
        admitted: Admitted<'_>,
        began: Instant,
        deadline: Instant,
    ) -> (Save, Option<DeferredSave>) {
        let (admission, attempt) = match admitted {
            Admitted::Begins(admission, attempt) => (admission, attempt),
            Admitted::Ended(save) => return (save, None),
        };
        let ticket = self.issue(step, attempt, began, deadline);
        self.stager.saves.add(ticket.clone());
        drop(admission);
        // The stager waits for the next deadline, which may be that of this save.
        self.stager.signal.notify();
        let deferred = DeferredSave { stager: self.stager.clone(), ticket: ticket.clone(), begun: false, listed: true };
        (Save::new(ticket), Some(deferred))
    }

    /// Returns a handle for work that takes no position among the saves of this executor: another save has
    /// the position, or this executor writes nothing of it. The overlap policy does not count it.
    pub(crate) fn stand_in(&self, step: u64, timeout: Option<Duration>) -> Result<(Save, DeferredSave)> {
        self.alive()?;
        self.report_unseen()?;
        let ticket = self.issue(step, Attempt::new(), Instant::now(), self.deadline(timeout));
        let (stager, save) = (self.stager.clone(), Save::new(ticket.clone()));
        Ok((save, DeferredSave { stager, ticket, begun: false, listed: false }))
    }

    /// Returns the handle of a save that failed before it could begin. The next call returns its error if the
    /// program has not observed it.
    pub(crate) fn failed(&self, step: u64, error: Error) -> Save {
        let (began, attempt) = (Instant::now(), Attempt::new());
        let ticket = self.issue(step, attempt, began, began);
        ticket.begin(Extent::default());
        ticket.fail(error.clone());
        ticket.finish(Err(error)).into_iter().for_each(Calls::here);
        self.stager.saves.add(ticket.clone());
        self.stager.saves.release(&ticket);
        Save::new(ticket)
    }
}

impl DeferredSave {
    /// Claims the save for its state, so that no other save supersedes it. False if another save has claimed
    /// it already, or if the save has ended.
    pub fn claim(&self) -> bool {
        !self.ticket.awaited.swap(true, Ordering::AcqRel) && !self.ticket.done.is_complete()
    }

    /// Marks the save as one that can be neither cancelled nor given up as failed, because other parties now
    /// decide on it. False if it has failed.
    pub fn commit(&self) -> bool {
        self.ticket.release();
        self.ticket.enter(Phase::Promised)
    }

    /// Returns a handle of the save.
    pub fn save(&self) -> Save {
        Save::new(self.ticket.clone())
    }

    /// Saves `state`. Any error fails the save.
    pub fn begin(mut self, executor: &CheckpointExecutor, state: StateDict<'static>, options: SaveOptions) {
        let begun = executor.submit_deferred(&self.ticket, state, options);
        self.begun = !self.ticket.is_deferred();
        if let Err(error) = begun {
            self.finish(Err(error));
        }
    }

    /// Describes the checkpoint at `path`, which was written by other code than the engine.
    pub fn elsewhere(&self, path: PathBuf) -> Committed {
        Committed {
            step: self.ticket.step,
            attempt: self.ticket.attempt(),
            path,
            bytes: 0,
            blocked: Duration::ZERO,
            staged: self.ticket.began.elapsed(),
            durable: self.ticket.began.elapsed(),
            tail: Duration::ZERO,
            mode: IoMode::Buffered,
            over_budget: 0,
            late_chunks: 0,
            written_bytes: 0,
            cloned_bytes: 0,
            linked_bytes: 0,
            refused_files: 0,
        }
    }

    /// Ends the save.
    pub fn end(self, result: Result<Outcome>) {
        self.finish(result);
    }

    fn finish(&self, result: Result<Outcome>) {
        if let Err(error) = &result {
            self.ticket.fail(error.clone());
        }
        self.ticket.finish(result).into_iter().for_each(Calls::here);
    }
}

impl Drop for DeferredSave {
    fn drop(&mut self) {
        if self.begun {
            return;
        }
        self.finish(Err(Error::new(ErrorKind::Cancelled, "the save was given up before its state had come")));
        if !self.listed {
            self.stager.saves.add(self.ticket.clone()); // so that the next call returns an unseen error
        }
        self.stager.saves.release(&self.ticket);
    }
}
