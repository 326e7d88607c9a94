//! Shows other hosts that the attempts of this executor are alive.
//!
//! Touching has its own thread, so that no work of another thread, such as a sweep of many files, delays it.

use crate::guard::attempt;
use crate::storage::Storage;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often live attempts are touched.
pub(super) const TOUCH_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// The body of the touch thread: touches once per `every`, until the sender of `ended` is dropped.
pub(super) fn run(ended: &Receiver<()>, storage: &dyn Storage, every: Duration) {
    while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        attempt("show that attempts are alive", || storage.touch());
    }
}
