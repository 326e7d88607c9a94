//! Whether a save may begin while others are unfinished.

use crate::error::{Error, ErrorKind, Result};
use crate::settings::Overlap;
use crate::staging::Stager;
use crate::ticket::Outcome;
use std::time::Instant;

/// Makes room for a save of `step`; or the outcome of one that is not to begin.
///
/// # Errors
/// `Conflict` when the step is being saved; `Busy` when there was no room by `deadline`.
pub(super) fn admit(stager: &Stager, overlap: Overlap, step: u64, deadline: Instant) -> Result<Option<Outcome>> {
    loop {
        let unfinished = stager.flights.unfinished();
        if unfinished.iter().any(|t| t.step == step) {
            return Err(Error::new(ErrorKind::Conflict, "a save of this step is under way").with_step(step));
        }
        let room = match overlap {
            Overlap::Skip => {
                return Ok(unfinished.last().map(|t| Outcome::Skipped { by: t.step }));
            }
            Overlap::Latest => {
                if let Some(job) = stager.take_waiting() {
                    let ticket = job.ticket.clone();
                    stager.discard(job);
                    ticket.finish(ticket.failure().map_or(Ok(Outcome::Superseded { by: step }), Err));
                }
                return Ok(None);
            }
            Overlap::Queue(room) => room,
            Overlap::Block => 0,
        };
        if unfinished.len() <= room {
            return Ok(None);
        }
        if unfinished[0].done.wait(deadline).is_none() {
            let saves = unfinished.len();
            let busy =
                format!("earlier saves have not ended; the storage is slower than the saves come unfinished={saves}");
            return Err(Error::new(ErrorKind::Busy, busy).with_step(step));
        }
    }
}
