//! Tells which executor the calling thread belongs to.
//!
//! Wakers, and functions given to `Save::on_done`, run on threads of the executor. Such a thread must not
//! wait for the end of a save, or for a thread: that end may depend on its own work.

use crate::completion::Signal;
use std::cell::OnceCell;
use std::sync::Arc;

thread_local! {
    /// The signal identifies its executor. The `Arc` is kept so that no later signal has its address.
    static EXECUTOR: OnceCell<Arc<Signal>> = const { OnceCell::new() };
}

/// Records that the calling thread belongs to the executor of `signal`, until the thread ends.
pub(crate) fn mark(signal: &Arc<Signal>) {
    EXECUTOR.with(|executor| _ = executor.set(signal.clone()));
}

/// Returns true if the calling thread belongs to the executor of `signal`.
pub(crate) fn is_one_of(signal: &Arc<Signal>) -> bool {
    let own = |executor: &OnceCell<_>| executor.get().is_some_and(|own| Arc::ptr_eq(own, signal));
    EXECUTOR.try_with(own).unwrap_or(false)
}
