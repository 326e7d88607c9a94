//! Ends saves and executors by a deadline, and returns or logs the errors that no later call returns.

use crate::error::{Error, ErrorKind, Result};
use crate::executor::CheckpointExecutor;
use crate::outcome::Outcome;
use crate::save::Save;
use std::sync::Arc;
use std::time::Instant;

/// Waits for a save until `deadline`, then cancels it. A save that is being published cannot be cancelled: it
/// has until `grace`. `what` names the deadline in errors.
///
/// # Errors
/// The failure of the save; `Deadline` when it was cancelled; `Indeterminate` when it was still being
/// published at `grace`: the save may become durable.
pub(crate) fn end_by(save: &Save, deadline: Instant, grace: Instant, what: &str) -> Result<Outcome> {
    let failed = |kind, why: &str| Err(Error::new(kind, format!("{why} {what}")).with_step(save.step()));
    let ended = |until: Instant| {
        let _ = save.wait(until.saturating_duration_since(Instant::now()));
        save.try_get()
    };
    match ended(deadline) {
        Some(ended) => ended,
        None if save.cancel() => failed(ErrorKind::Deadline, "the save was cancelled, because it had not ended before"),
        None => ended(grace).unwrap_or_else(|| {
            failed(ErrorKind::Indeterminate, "the save may still become durable: it was being published at")
        }),
    }
}

/// Shuts `executor` down if this is its last owner, and returns the first error of `ended` and the shutdown.
/// Dropping the executor instead would wait again, past the deadline.
pub(crate) fn shut_down_last(executor: Arc<CheckpointExecutor>, ended: Result<()>, deadline: Instant) -> Result<()> {
    let shut = Arc::into_inner(executor)
        .map_or(Ok(()), |executor| executor.shutdown(deadline.saturating_duration_since(Instant::now())));
    first(ended.err().into_iter().chain(shut.err()))
}

/// Returns the first of `errors`, and logs the others, because no later call returns them.
pub(crate) fn first(errors: impl IntoIterator<Item = Error>) -> Result<()> {
    let mut errors = errors.into_iter();
    let first = errors.next();
    errors.for_each(|error| error.log_unseen());
    first.map_or(Ok(()), Err)
}
