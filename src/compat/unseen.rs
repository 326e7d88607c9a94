//! Errors that the end of a face has to tell.

use crate::error::{Error, Result};

/// Returns the first of `errors`, and logs the others, because no later call tells them.
pub(crate) fn first(errors: impl IntoIterator<Item = Error>) -> Result<()> {
    let mut errors = errors.into_iter();
    let first = errors.next();
    errors.for_each(|error| {
        tracing::error!(error = format_args!("{error:#}"), "a save failed, and no call has returned its error")
    });
    first.map_or(Ok(()), Err)
}
