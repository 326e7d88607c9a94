//! Waits that release the GIL and notice signals.

use crate::errors;
use pyo3::prelude::*;
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

/// How long a wait sleeps before it checks for signals. Ctrl-C must be answered within 50 ms. The rest of
/// that time is for the machine, and for a thread that holds the GIL.
pub const SLICE: Duration = Duration::from_millis(20);

/// Runs `work` in a thread of its own and waits for it. It is for calls of the engine that cannot be split
/// into slices. When a signal raises an exception, the call continues alone and its result is dropped.
pub fn interruptible<T: Send + 'static>(py: Python<'_>, work: impl FnOnce() -> T + Send + 'static) -> PyResult<T> {
    let (send, receive) = sync_channel(1);
    // The thread may end after this call has returned with an exception.
    let run = move || drop(send.send(work()));
    std::thread::Builder::new().name("ashore-wait".into()).spawn(run)?;
    let receive = Mutex::new(receive);
    loop {
        let received = py.detach(|| match receive.lock() {
            Ok(receive) => receive.recv_timeout(SLICE),
            Err(poisoned) => poisoned.into_inner().recv_timeout(SLICE),
        });
        match received {
            Ok(value) => return Ok(value),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(pyo3::exceptions::PyRuntimeError::new_err("a call of the engine panicked"));
            }
        }
    }
}

/// Converts a number of seconds.
pub fn seconds(py: Python<'_>, seconds: f64) -> PyResult<Duration> {
    let why = "a deadline is a number of seconds, 0 or more";
    Duration::try_from_secs_f64(seconds).map_err(|_| errors::invalid(py, &format!("{why} seconds={seconds}"), None))
}
