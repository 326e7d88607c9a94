//! One GPU: its context, the stream of our copies, a pool of events.
//!
//! # Safety argument
//! The arena's memory is registered here for as long as its guard lives, which the arena drops before it unmaps the memory:
//! that is what [`Register`](crate::memory::Register) asks of an arena.
#![expect(unsafe_code, reason = "registers the arena; argument above")]

use super::driver::{Context, Driver, Event, Registered, Stream};
use super::pooled_event::PooledEvent;
use crate::error::Result;
use crate::memory::Pages;
use crate::sync::{Mutex, lock};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Events made at start: two chunks in flight, and the producers and fences of a few saves.
const EVENTS: usize = 16;
/// How long what was queued is waited for when nothing else can be done.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
pub(super) const POLL: Duration = Duration::from_micros(50);

/// See the module.
pub(super) struct Gpu {
    pub context: Arc<Context>,
    /// First-in first-out: all copies to the host.
    pub copies: Arc<Stream>,
    events: Mutex<Vec<Event>>,
}

impl Gpu {
    /// Takes what copying needs of device `ordinal`.
    pub fn new(driver: Arc<Driver>, ordinal: u32) -> Result<Arc<Self>> {
        let context = Context::retain(driver, ordinal)?;
        let copies = Arc::new(context.stream()?);
        let events = (0..EVENTS).map(|_| context.event()).collect::<Result<_>>()?;
        Ok(Arc::new(Self { context, copies, events: Mutex::new(events) }))
    }

    /// An event, which goes back to the pool when it is dropped.
    pub fn event(self: &Arc<Self>) -> Result<PooledEvent> {
        let pooled = lock(&self.events).pop();
        let event = pooled.map_or_else(|| self.context.event(), Ok)?;
        Ok(PooledEvent::new(self.clone(), event))
    }

    /// Takes back an event that is not used any more.
    pub fn put_back(&self, event: Event) {
        lock(&self.events).push(event);
    }

    /// Waits until `stream` has come to where it is now. False when that takes too long.
    pub fn settle(self: &Arc<Self>, stream: &Stream) -> bool {
        let deadline = Instant::now() + PATIENCE;
        let recorded = |event: PooledEvent| event.record(stream.handle()).map(|()| event);
        let here = self.event().and_then(recorded);
        // Without an event, until the stream has nothing to do at all.
        let over = || here.as_ref().map_or_else(|_| stream.is_idle(), |event| event.is_reached());
        while !over().unwrap_or(false) && !self.context.lost() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }

    /// Pins memory of the arena.
    pub fn pin(&self, pages: Pages<'_>) -> Result<Registered> {
        // SAFETY: see the safety argument.
        unsafe { self.context.register(pages.base(), pages.size()) }
    }
}
