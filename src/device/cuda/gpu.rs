//! One GPU: its context, its copy stream and its pool of events.
//!
//! # Safety argument
//! The arena's memory is registered here while its guard lives. The arena drops the guard before it unmaps
//! the memory, as [`Register`](crate::memory::Register) requires.
#![expect(unsafe_code, reason = "registers the arena; argument above")]

use super::driver::{Context, Driver, Registered, Stream};
use super::pooled_event::{EventPool, PooledEvent};
use crate::error::Result;
use crate::memory::Pages;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum wait for queued work. After it, the memory of that work is leaked.
pub(super) const SETTLE_TIMEOUT: Duration = Duration::from_secs(10);
pub(super) const POLL_INTERVAL: Duration = Duration::from_micros(50);

/// One GPU, shared by all threads.
pub(super) struct Gpu {
    pub context: Arc<Context>,
    /// The copy stream, first in, first out: all copies to the host.
    pub copies: Arc<Stream>,
    events: Arc<EventPool>,
    /// Events that record when copies were made. The pool is empty unless saves are traced.
    timed_events: Arc<EventPool>,
}

impl Gpu {
    /// Retains the context of device `ordinal`, and creates its copy stream and events.
    pub fn new(driver: Arc<Driver>, ordinal: u32) -> Result<Arc<Self>> {
        let context = Context::retain(driver, ordinal)?;
        let copies = Arc::new(context.stream()?);
        let (events, timed_events) = (Arc::new(EventPool::new(&context)?), Arc::new(EventPool::timed(&context)));
        Ok(Arc::new(Self { context, copies, events, timed_events }))
    }

    /// Takes an event from the pool. The event returns to the pool when it is dropped.
    pub fn event(&self) -> Result<PooledEvent> {
        self.events.event()
    }

    /// Takes an event that records when it was reached.
    pub fn timed_event(&self) -> Result<PooledEvent> {
        self.timed_events.event()
    }

    /// Waits until the work that is in `stream` now has ended. Returns false after a timeout.
    pub fn settle(&self, stream: &Stream) -> bool {
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let recorded = |event: PooledEvent| event.record(stream.handle()).map(|()| event);
        let here = self.event().and_then(recorded);
        // Without an event, wait until the stream is idle.
        let over = || here.as_ref().map_or_else(|_| stream.is_idle(), |event| event.is_reached());
        while !over().unwrap_or(false) && !self.context.lost() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        true
    }

    /// Pins memory of the arena.
    pub fn pin(&self, pages: Pages<'_>) -> Result<Registered> {
        // SAFETY: the arena drops the guard before it unmaps the pages.
        unsafe { self.context.register(pages.base(), pages.size()) }
    }
}
