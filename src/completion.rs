//! A value that comes once, awaitable from any async runtime and waitable from a thread with a deadline.
//!
//! No thread and no polling per future: `event-listener` keeps the waiters, tasks and threads alike. The first value wins;
//! a waiter that comes late finds it there.

use crate::sync::{Mutex, lock};
use event_listener::{Event, EventListener, Listener};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

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
        self.wait_while(|listener| listener.wait_deadline(deadline).is_some())
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
            if listener.wait_deadline(deadline).is_none() {
                return look();
            }
        }
    }
}
