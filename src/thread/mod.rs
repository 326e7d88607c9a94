//! Threads of this library: named, deaf to a signal that is not for them, and as polite as they are told to
//! be.

mod priority;
mod signals;

pub(crate) use priority::adopt;

use crate::error::{Error, ErrorKind, Result};
use signals::outlive_file_limits;
use std::thread::JoinHandle;

/// Starts a named thread, in which a limit for the size of files is an error as any other.
///
/// # Errors
/// `Busy` when the system has no more threads.
pub(crate) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.clone())
        .spawn(move || {
            outlive_file_limits();
            run();
        })
        .map_err(|e| Error::new(ErrorKind::Busy, format!("a thread cannot be started thread={name}")).with_source(e))
}
