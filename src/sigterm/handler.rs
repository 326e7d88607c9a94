//! The handler of the signal: wakes a thread, and does nothing else; lets a forked child die.
//!
//! # Safety argument
//! The action runs inside a signal handler, where only async-signal-safe things may be done: it asks for the process id, writes
//! one byte to a socket that it owns and that does not block, and in a child gives the signal its default effect by a function
//! made for handlers. It allocates nothing, takes no lock and cannot panic.
#![expect(unsafe_code, reason = "an action inside a signal handler; argument above")]

use signal_hook::consts::SIGTERM;
use signal_hook::{SigId, low_level};
use std::io::{Result, Write};
use std::os::unix::net::UnixStream;

/// Has a byte written to `wake` whenever the signal comes to this process. In a forked child, which has the handler and the
/// socket, too, it has its default effect: the parent must not hear of it.
pub(super) fn register(wake: UnixStream) -> Result<SigId> {
    wake.set_nonblocking(true)?;
    let owner = std::process::id();
    let action = move || {
        if std::process::id() == owner {
            let _ = (&wake).write(&[0]);
        } else {
            let _ = low_level::emulate_default_handler(SIGTERM);
        }
    };
    // SAFETY: see the module.
    unsafe { low_level::register(SIGTERM, action) }
}
