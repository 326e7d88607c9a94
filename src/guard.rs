//! Runs user code, whose panics must not end a thread of this crate. No other file catches panics.

use crate::error::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs user code and turns a panic into an error. A panic must not end a thread, or drop memory that a
/// device still reads.
pub(crate) fn guarded<T>(what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(Error::internal(what)))
}

/// Runs work of the storage that no save waits for. On failure, logs a warning and returns false.
pub(crate) fn attempt(what: &str, run: impl FnOnce() -> Result<()>) -> bool {
    let done = guarded("the storage panicked", run);
    if let Err(error) = &done {
        tracing::warn!(error = format_args!("{error:#}"), "could not {what}");
    }
    done.is_ok()
}

/// Runs user code that returns nothing, and logs `what` if it panics.
pub(crate) fn logged(what: &str, run: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(run)).is_err() {
        tracing::error!("{what}");
    }
}

/// Drops user objects (sources, attempts, queues); their panics must end neither a thread nor a call of
/// `save`.
pub(crate) fn dropped<T>(objects: T) {
    logged("an object of the program panicked when it was dropped", || drop(objects));
}
