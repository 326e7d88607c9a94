//! The gate of a save's sources. They are live, then their release is requested, then they are dropped.
//!
//! A thread reads a source, or queues a copy from it, under the lock of reading. A thread first makes sure
//! that no thread starts another read. It then takes that lock once, after which it knows that no read is
//! running.

use crate::completion::{Signal, deadline_after};
use crate::sync::{Mutex, MutexGuard, lock};
use std::time::Duration;

/// The state of the sources. It only moves forward, except for another attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    Live,
    /// The stager must drop the borrowed sources at once. Nothing more is queued from them, and streams wait
    /// for queued copies.
    ReleaseRequested,
    /// The sources are dropped. This may happen before the save is staged.
    Dropped,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct SourceGate {
    state: Mutex<State>,
    changed: Signal,
    reading: Mutex<()>,
}

impl SourceGate {
    pub(super) fn new() -> Self {
        Self { state: Mutex::new(State::Live), changed: Signal::default(), reading: Mutex::new(()) }
    }

    fn state(&self) -> State {
        *lock(&self.state)
    }

    fn advance(&self, to: State) {
        let mut state = lock(&self.state);
        *state = (*state).max(to);
        drop(state);
        self.changed.notify();
    }

    /// Takes the lock under which a thread reads a source or queues a copy from it.
    pub fn read(&self) -> MutexGuard<'_, ()> {
        lock(&self.reading)
    }

    /// Waits for a read that has been decided on.
    pub fn await_read(&self) {
        drop(self.read());
    }

    pub(super) fn request_release(&self) {
        self.advance(State::ReleaseRequested);
    }

    pub fn is_live(&self) -> bool {
        self.state() == State::Live
    }

    /// Whether the sources must be dropped, and are not dropped yet.
    pub fn release_is_requested(&self) -> bool {
        self.state() == State::ReleaseRequested
    }

    /// Records that the sources are dropped.
    pub fn set_dropped(&self) {
        self.advance(State::Dropped);
    }

    /// Makes the sources, which were kept for another attempt, live again.
    pub(super) fn renew(&self) {
        *lock(&self.state) = State::Live;
    }

    pub fn is_dropped(&self) -> bool {
        self.state() == State::Dropped
    }

    /// Blocks until the sources are dropped. Only for waits that must not be cut short, for soundness.
    pub fn wait_until_dropped(&self) {
        let dropped = || self.is_dropped().then_some(());
        while self.changed.wait_until(deadline_after(Duration::MAX), dropped).is_none() {}
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn sources_go_one_way_from_live_to_dropped() {
        let gate = SourceGate::new();
        let now = || (gate.is_live(), gate.release_is_requested(), gate.is_dropped());
        assert_eq!(now(), (true, false, false));
        gate.request_release();
        assert_eq!(now(), (false, true, false));
        gate.set_dropped();
        gate.request_release();
        assert_eq!(now(), (false, false, true));
        gate.wait_until_dropped();
    }

    #[test]
    fn a_thread_that_waits_for_the_drop_is_woken() {
        let gate = SourceGate::new();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| gate.wait_until_dropped());
            gate.set_dropped();
            waiting.join().unwrap();
        });
    }
}
