//! Exchanges of an adapter between the ranks of an executor. An exchange takes the place of a save, so that
//! all ranks carry it out in the same order as their saves.

use super::CheckpointExecutor;
use super::ranks::{Borrowed, Wanted, What};
use super::threads::{Channels, Commits};
use crate::commit::several::{Group, Reply};
use crate::error::{Error, ErrorKind, Result};
use crate::id::step_name;
use crate::ranks::{Member, Phase};
use crossbeam_channel::Sender;
use std::sync::Arc;
use std::time::Instant;

/// The ranks of an executor, lent to an adapter. Later saves of the executor wait until this value is
/// dropped.
pub(crate) struct Together {
    group: Arc<Group>,
    save: u64,
    deadline: Instant,
    /// Dropping it returns the ranks.
    _lent: Sender<What>,
}

impl CheckpointExecutor {
    /// Returns the position of this process among the ranks that save together. None: the process saves
    /// alone.
    pub(crate) fn member(&self) -> Option<Member> {
        self.turns.as_ref().map(|turns| turns.member())
    }

    /// Waits until the ranks have finished earlier saves, and lends them. Every rank must call it in the
    /// place of the same save.
    ///
    /// # Errors
    /// `Invalid` for an executor that saves alone or is shut down, and in a thread of the executor;
    /// `Deadline` when earlier saves had not ended by the deadline: then the other ranks learn that.
    pub(crate) fn together(&self, step: u64, deadline: Instant) -> Result<Together> {
        self.alive()?;
        let turns = self.turns.as_ref().ok_or_else(|| Error::invalid("this executor saves alone"))?;
        if self.threads.are_here() {
            let why = "a thread of the executor cannot wait for the other ranks";
            let error = Error::invalid(why).with_step(step);
            self.refused(step, &error);
            return Err(error);
        }
        let wanted = Wanted { step, name: step_name(step), overwrite: false, deadline };
        let turn = turns.take();
        let Borrowed { group, save, begins, lent } = match &*self.threads.channels() {
            Some(Channels { commits: Commits::Several(calls), .. }) => turn.borrow(calls, &wanted),
            _ => return Err(super::admission::shut_down()),
        };
        drop(turn);
        begins.recv_deadline(deadline).map_err(|_| {
            let why = "earlier saves had not ended, or the executor was shut down, before the ranks could plan";
            Error::new(ErrorKind::Deadline, why).with_step(step)
        })?;
        Ok(Together { group, save, deadline, _lent: lent })
    }

    /// Declares that this rank makes no call of [`CheckpointExecutor::save`] for `step`, because its state
    /// could not be put together. The save fails on the other ranks, too, at once and with this rank and
    /// `why` in the error. Ranks count calls, so a rank that leaves a call out by itself would from then on
    /// be one step behind the others. Call it once in the place of the call; `save` does the same itself for
    /// a call that it refuses. Without other ranks it does nothing.
    ///
    /// ```
    /// # let dir = tempfile::tempdir().unwrap();
    /// # fn state() -> Result<ashore::StateDict<'static>, std::io::Error> { Err(std::io::Error::other("no data")) }
    /// let executor = ashore::CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?;
    /// match state() {
    ///     Ok(state) => drop(executor.save(1, state)?),
    ///     Err(error) => executor.decline(1, &error.to_string()),
    /// }
    /// # Ok::<(), ashore::Error>(())
    /// ```
    pub fn decline(&self, step: u64, why: &str) {
        self.refused(step, &Error::invalid(format!("a rank could not put its state together: {why}")).with_step(step));
    }

    /// Counts a call of `save` that this rank refuses, so that the save fails on the other ranks, too, and
    /// later calls have the same number on all ranks.
    pub(crate) fn refused(&self, step: u64, error: &Error) {
        let (Some(turns), Ok(())) = (&self.turns, self.alive()) else { return };
        let deadline = self.deadline(None);
        let turn = turns.take();
        if let Some(Channels { commits: Commits::Several(calls), .. }) = &*self.threads.channels() {
            let wanted = Wanted { step, name: step_name(step), overwrite: false, deadline };
            turn.call(calls, &wanted, What::Refused(error.clone()));
        }
    }
}

impl Together {
    /// The position of this process.
    pub fn member(&self) -> Member {
        self.group.member
    }

    /// Sends `part` to rank 0, where `reduce` gets the parts of all ranks. Returns the result of `reduce` for
    /// this rank. Each phase has one exchange.
    ///
    /// # Errors
    /// As [`Group::exchange`]. `Deadline` when the exchange begins too late to end while the ranks are lent.
    pub fn exchange(
        &self,
        phase: Phase,
        part: Result<Vec<u8>>,
        reduce: &mut dyn FnMut(Vec<Vec<u8>>) -> Result<Reply>,
    ) -> Result<Vec<u8>> {
        self.group.in_time(self.deadline)?;
        self.group.exchange(self.save, phase, part, reduce, self.deadline)
    }
}
