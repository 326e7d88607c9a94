//! Which executor the calling thread works for.
//!
//! Wakers, and functions given to `Save::on_done`, run on threads of the executor. Such a thread must not wait
//! for the end of a save, or for a thread: it may be the one that has to bring it about.

use crate::completion::Signal;
use std::cell::OnceCell;
use std::sync::Arc;

thread_local! {
    /// The signal is the identity of its executor; it is kept, so that no later one has its address.
    static EXECUTOR: OnceCell<Arc<Signal>> = const { OnceCell::new() };
}

/// Says that the calling thread works for the executor of `signal`, until it ends.
pub(crate) fn mark(signal: &Arc<Signal>) {
    EXECUTOR.with(|executor| _ = executor.set(signal.clone()));
}

/// Whether the calling thread works for the executor of `signal`.
pub(crate) fn is_one_of(signal: &Arc<Signal>) -> bool {
    let own = |executor: &OnceCell<_>| executor.get().is_some_and(|own| Arc::ptr_eq(own, signal));
    EXECUTOR.try_with(own).unwrap_or(false)
}
