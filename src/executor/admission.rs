//! Whether a save may begin while others are unfinished.

use super::CheckpointExecutor;
use crate::error::{Error, ErrorKind, Result};
use crate::outcome::Outcome;
use crate::own_threads;
use crate::settings::Overlap;
use crate::staging::{Job, Stager};
use crate::ticket::Ticket;
use std::sync::{Arc, Weak};
use std::time::Instant;

/// What becomes of a save that is asked for.
pub(super) enum Verdict {
    /// It may begin.
    Begin,
    /// It does not begin, and that is how it ended.
    Ended(Outcome),
    /// To be asked again when this save, which waits, was taken back: see [`supersede`].
    InsteadOf(Box<Job>),
    /// To be asked again when one of these saves, which have not ended, has.
    After(Vec<Arc<Ticket>>),
}

/// Whether a save of `step` may begin now. Waits for nothing: whoever looks holds up all others.
///
/// # Errors
/// `Conflict` when the step is being saved.
pub(super) fn admit(stager: &Stager, overlap: Overlap, step: u64) -> Result<Verdict> {
    let unfinished = stager.saves.unfinished();
    if unfinished.iter().any(|t| t.step == step) {
        return Err(Error::new(ErrorKind::Conflict, "a save of this step is under way").with_step(step));
    }
    let room = match overlap {
        Overlap::Skip => {
            let by = unfinished.last().map(|t| t.step);
            return Ok(by.map_or(Verdict::Begin, |by| Verdict::Ended(Outcome::Skipped { by })));
        }
        Overlap::Latest => {
            if let Some(job) = stager.take_waiting() {
                return Ok(Verdict::InsteadOf(Box::new(job)));
            }
            return Ok(Verdict::Begin);
        }
        Overlap::Queue(room) => room,
        Overlap::Block => 0,
    };
    Ok(if unfinished.len() <= room { Verdict::Begin } else { Verdict::After(unfinished) })
}

/// Ends a save that waited, because `step` takes its place. Wakers run here: no lock is held.
pub(super) fn supersede(stager: &Stager, job: Job, step: u64) {
    let ticket = job.ticket.clone();
    stager.discard(job);
    ticket.hand_over(ticket.finish(ticket.failure().map_or(Ok(Outcome::Superseded { by: step }), Err)));
}

/// Waits until one of `unfinished` has ended: not always the oldest, for each has a deadline of its own and
/// can be cancelled.
///
/// # Errors
/// `Busy` at the deadline; at once in a thread of the executor, for which they may be waiting.
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

impl CheckpointExecutor {
    /// The executor, when it has room for a save, for threads that outlive their callers. Nothing here keeps
    /// it alive meanwhile: the program's last `Arc` waits for saves when it is dropped.
    ///
    /// # Errors
    /// `Cancelled` when the executor has gone; `Busy` when there was no room by `deadline`.
    pub(crate) fn with_room(executor: &Weak<Self>, deadline: Instant) -> Result<Arc<Self>> {
        loop {
            let gone = || Error::new(ErrorKind::Cancelled, "the executor went before a deferred save could begin");
            let executor = executor.upgrade().ok_or_else(gone)?;
            let room = match executor.settings.overlap {
                Overlap::Queue(room) => room,
                Overlap::Block => 0,
                Overlap::Skip | Overlap::Latest => return Ok(executor),
            };
            let (unfinished, signal) = (executor.stager.saves.unfinished(), executor.stager.signal.clone());
            if unfinished.len() <= room {
                return Ok(executor);
            }
            drop(executor);
            let ended = || unfinished.iter().any(|ticket| ticket.done.is_complete()).then_some(());
            let busy = || format!("earlier saves have not ended unfinished={}", unfinished.len());
            signal.wait_until(deadline, ended).ok_or_else(|| Error::new(ErrorKind::Busy, busy()))?;
        }
    }
}
