//! Errors that no call has returned when an adapter is closed.

use crate::error::{Error, Result};

/// Returns the first of `errors`, and logs the others, because no later call returns them.
pub(crate) fn first(errors: impl IntoIterator<Item = Error>) -> Result<()> {
    let mut errors = errors.into_iter();
    let first = errors.next();
    errors.for_each(|error| {
        tracing::error!(error = format_args!("{error:#}"), "a save failed, and no call has returned its error")
    });
    first.map_or(Ok(()), Err)
}
