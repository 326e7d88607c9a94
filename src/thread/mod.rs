//! Threads of this library. Each has a name, blocks a signal that is not meant for it, and runs at the CPU
//! and I/O priority that it is given.

mod priority;
mod signals;

pub(crate) use priority::adopt;

use crate::error::{Error, ErrorKind, Result};
use signals::outlive_file_limits;
use std::thread::JoinHandle;

/// Starts a named thread. In it, a write beyond the file size limit is an ordinary error.
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
