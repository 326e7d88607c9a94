//! Code of users, whose panics must end no thread of this crate. No other file catches panics.

use crate::error::{Error, Result};
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs code of users, whose panics must end no thread, and drop nothing that a device still reads.
pub(crate) fn guarded<T>(what: &str, run: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(Error::internal(what)))
}

/// Runs code of users that returns nothing; `what` is logged when it panics.
pub(crate) fn logged(what: &str, run: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(run)).is_err() {
        tracing::error!("{what}");
    }
}

/// Drops objects of users (sources, attempts, queues), whose panics must end neither a thread nor a call of `save`.
pub(crate) fn dropped<T>(objects: T) {
    logged("an object of the program panicked when it was dropped", || drop(objects));
}
