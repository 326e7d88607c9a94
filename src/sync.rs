//! Synchronisation primitives: loom's for the code that `just loom` model-checks, std's otherwise.

use std::time::{Duration, Instant};

#[cfg(not(loom))]
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard};

#[cfg(loom)]
pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Locks and ignores poison: every critical section here leaves its data consistent.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits for a notification with the lock released; spurious wakeups happen.
pub(crate) fn wait<'a, T>(condvar: &Condvar, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
    condvar.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits for notifications with the lock released while `on` is true, at most for `limit`. Returns true if it
/// is still true at the end.
pub(crate) fn wait_while_for<'a, T>(
    condvar: &Condvar,
    mut guard: MutexGuard<'a, T>,
    limit: Duration,
    mut on: impl FnMut(&mut T) -> bool,
) -> (MutexGuard<'a, T>, bool) {
    if cfg!(loom) {
        // Loom has no time: a waiter must be notified.
        while on(&mut guard) {
            guard = wait(condvar, guard);
        }
        return (guard, false);
    }
    let until = Instant::now() + limit;
    while on(&mut guard) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return (guard, true);
        }
        guard = condvar.wait_timeout(guard, left).unwrap_or_else(std::sync::PoisonError::into_inner).0;
    }
    (guard, false)
}
