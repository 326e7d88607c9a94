//! The pool of events of a GPU, and an event that returns to the pool when it is dropped. Recording such an
//! event again replaces the work that it is behind, but earlier waits for the event keep the old meaning.

use super::driver::{Context, Event};
use crate::device::Dependency;
use crate::error::{Error, Result};
use crate::sync::{Mutex, lock};
use std::ops::Deref;
use std::sync::Arc;

/// Number of events made at start: for two chunks in flight, and the producers and fences of a few saves.
const EVENTS: usize = 16;

/// The unused events of a GPU.
pub(super) struct EventPool {
    context: Arc<Context>,
    timed: bool,
    events: Mutex<Vec<Event>>,
}

impl EventPool {
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        let events = (0..EVENTS).map(|_| context.event(false)).collect::<Result<_>>()?;
        Ok(Self { context: context.clone(), timed: false, events: Mutex::new(events) })
    }

    /// A pool of timed events. Each event is created when it is first needed.
    pub fn timed(context: &Arc<Context>) -> Self {
        Self { context: context.clone(), timed: true, events: Mutex::default() }
    }

    /// Takes an event from the pool. The event returns to the pool when it is dropped.
    pub fn event(self: &Arc<Self>) -> Result<PooledEvent> {
        let pooled = lock(&self.events).pop();
        let event = pooled.map_or_else(|| self.context.event(self.timed), Ok)?;
        Ok(PooledEvent { pool: self.clone(), event: Some(event) })
    }
}

/// The events of a dependency that this device made.
pub(super) fn events_of(dependency: &Dependency) -> Result<&Vec<PooledEvent>> {
    dependency.downcast_ref::<Vec<PooledEvent>>().ok_or_else(|| Error::internal("a dependency of another device"))
}

/// An event that returns to its pool when it is dropped.
pub(super) struct PooledEvent {
    pool: Arc<EventPool>,
    event: Option<Event>,
}

impl PooledEvent {
    /// The context of the GPU to whose pool the event belongs.
    pub fn context(&self) -> &Context {
        &self.pool.context
    }

    /// True when the event is reached, or never will be because the device is lost.
    pub fn is_over(&self) -> bool {
        let context = self.context();
        // Query in any case, because only a query detects a lost context.
        let _entered = context.enter();
        self.is_reached().unwrap_or(false) || context.lost()
    }
}

impl Deref for PooledEvent {
    type Target = Event;

    fn deref(&self) -> &Event {
        self.event.as_ref().expect("taken only in drop")
    }
}

impl Drop for PooledEvent {
    fn drop(&mut self) {
        lock(&self.pool.events).extend(self.event.take());
    }
}
