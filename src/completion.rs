//! A value that comes once, awaitable from any async runtime and waitable from a thread with a deadline.
//!
//! No thread and no polling per future: `event-listener` keeps the waiters, tasks and threads alike. The first value wins;
//! a waiter that comes late finds it there.

use crate::sync::{Arc, Mutex, lock};
use event_listener::{Event, EventListener, Listener};
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

/// The moment `patience` from now; a patience beyond all reason is a hundred years.
pub(crate) fn deadline_after(patience: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(patience).unwrap_or_else(|| now + Duration::from_secs(100 * 365 * 24 * 3600))
}

/// The cell that both sides share.
#[derive(Debug)]
pub(crate) struct Completion<T> {
    value: Mutex<Option<T>>,
    event: Event,
}

impl<T: Clone> Completion<T> {
    pub fn new() -> Self {
        Self { value: Mutex::new(None), event: Event::new() }
    }

    /// Completes with `value`; false, and without effect, when there is one already.
    pub fn complete(&self, value: T) -> bool {
        {
            let mut slot = lock(&self.value);
            if slot.is_some() {
                return false;
            }
            *slot = Some(value);
        }
        self.event.notify(usize::MAX);
        true
    }

    pub fn get(&self) -> Option<T> {
        lock(&self.value).clone()
    }

    pub fn is_complete(&self) -> bool {
        lock(&self.value).is_some()
    }

    /// Blocks the thread until there is a value or `deadline` has passed.
    pub fn wait(&self, deadline: Instant) -> Option<T> {
        self.wait_while(|listener| park(listener, deadline))
    }

    /// Blocks the thread until there is a value: only for waits that soundness forbids to cut short.
    pub fn wait_forever(&self) -> Option<T> {
        self.wait_while(|listener| {
            listener.wait();
            true
        })
    }

    fn wait_while(&self, park: impl Fn(EventListener) -> bool) -> Option<T> {
        loop {
            if let Some(value) = self.get() {
                return Some(value);
            }
            let listener = self.event.listen();
            if let Some(value) = self.get() {
                return Some(value);
            }
            if !park(listener) {
                return self.get();
            }
        }
    }
}

/// Sleeps until notified; false at the deadline.
fn park(listener: EventListener, deadline: Instant) -> bool {
    if cfg!(loom) {
        // Loom has no time: whoever sleeps there must be woken.
        listener.wait();
        return true;
    }
    listener.wait_deadline(deadline).is_some()
}

/// The future of a [`Completion`]. Any number of them may wait for the same one.
#[derive(Debug)]
pub(crate) struct Waiter<T> {
    cell: Arc<Completion<T>>,
    listener: Option<EventListener>,
}

impl<T: Clone> Waiter<T> {
    pub fn new(cell: Arc<Completion<T>>) -> Self {
        Self { cell, listener: None }
    }

    pub fn cell(&self) -> &Completion<T> {
        &self.cell
    }
}

impl<T: Clone> Future for Waiter<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        loop {
            if let Some(value) = self.cell.get() {
                self.listener = None;
                return Poll::Ready(value);
            }
            match &mut self.listener {
                None => self.listener = Some(self.cell.event.listen()),
                Some(listener) => match Pin::new(listener).poll(cx) {
                    Poll::Ready(()) => self.listener = None,
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }
}

/// Wakes one thread that watches several things at once. A notification that comes between the watcher's look and its
/// sleep is not lost: it listens first, then looks.
#[derive(Debug, Default)]
pub(crate) struct Signal(Event);

impl std::task::Wake for Signal {
    fn wake(self: std::sync::Arc<Self>) {
        self.notify();
    }
}

impl Signal {
    pub fn notify(&self) {
        self.0.notify(usize::MAX);
    }

    /// Returns the first `Some` of `look`; None at the deadline.
    pub fn wait_until<T>(&self, deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            let listener = self.0.listen();
            if let Some(found) = look() {
                return Some(found);
            }
            if !park(listener, deadline) {
                return look();
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_wins_and_late_waiters_find_it() {
        let cell = Completion::new();
        assert_eq!(cell.wait(Instant::now()), None);
        assert!(cell.complete(1) && !cell.complete(2));
        assert_eq!((cell.get(), cell.wait(Instant::now()), cell.wait_forever()), (Some(1), Some(1), Some(1)));
    }

    #[test]
    fn threads_and_tasks_are_woken_together() {
        let cell = Arc::new(Completion::new());
        let long = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| cell.wait(long))).collect();
            let task = scope.spawn(|| crate::testing::block_on(Waiter::new(cell.clone())));
            cell.complete(7);
            assert!(threads.into_iter().all(|t| t.join().unwrap() == Some(7)));
            assert_eq!(task.join().unwrap(), 7);
        });
    }

    #[test]
    fn a_waiter_that_is_dropped_leaves_nothing_behind() {
        let cell = Arc::new(Completion::new());
        let mut waiter = Box::pin(Waiter::new(cell.clone()));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(waiter.as_mut().poll(&mut cx).is_pending());
        drop(waiter);
        assert_eq!(Arc::strong_count(&cell), 1);
        cell.complete(1);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::thread;

    #[test]
    fn a_thread_that_waits_is_always_woken_and_one_of_two_values_wins() {
        loom::model(|| {
            let cell = Arc::new(Completion::new());
            let (first, second) = (cell.clone(), cell.clone());
            let first = thread::spawn(move || first.complete(1));
            let second = thread::spawn(move || second.complete(2));
            let value = cell.wait_forever();
            let won = (first.join().unwrap(), second.join().unwrap());
            assert!(matches!((won, value), ((true, false), Some(1)) | ((false, true), Some(2))));
        });
    }

    #[test]
    fn a_task_that_waits_is_always_woken() {
        loom::model(|| {
            let cell = Arc::new(Completion::new());
            let completer = cell.clone();
            let completer = thread::spawn(move || completer.complete(1));
            assert_eq!(loom::future::block_on(Waiter::new(cell)), 1);
            assert!(completer.join().unwrap());
        });
    }

    #[test]
    fn a_signal_between_look_and_sleep_is_not_lost() {
        loom::model(|| {
            let (signal, flag) = (Arc::new(Signal::default()), Arc::new(Mutex::new(false)));
            let (notifier, raised) = (signal.clone(), flag.clone());
            let notifier = thread::spawn(move || {
                *lock(&raised) = true;
                notifier.notify();
            });
            assert_eq!(signal.wait_until(Instant::now(), || lock(&flag).then_some(1)), Some(1));
            notifier.join().unwrap();
        });
    }
}
