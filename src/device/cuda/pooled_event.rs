//! An event that returns to the pool of its GPU when it is dropped. Recording it again replaces what it is
//! behind, but earlier waits for it stay as they are.

use super::driver::Event;
use super::gpu::Gpu;
use crate::device::Dependency;
use crate::error::{Error, Result};
use std::ops::Deref;
use std::sync::Arc;

/// The events of a dependency that this device made.
pub(super) fn events_of(dependency: &Dependency) -> Result<&Vec<PooledEvent>> {
    dependency.downcast_ref::<Vec<PooledEvent>>().ok_or_else(|| Error::internal("a dependency of another device"))
}

/// An event that returns to its pool when it is dropped.
pub(super) struct PooledEvent {
    pub gpu: Arc<Gpu>,
    event: Option<Event>,
}

impl PooledEvent {
    pub fn new(gpu: Arc<Gpu>, event: Event) -> Self {
        Self { gpu, event: Some(event) }
    }

    /// True when the event is reached, or never will be because the device is lost.
    pub fn is_over(&self) -> bool {
        let context = &self.gpu.context;
        // Query in any case: a query is what detects a lost context.
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
        self.event.take().into_iter().for_each(|event| self.gpu.put_back(event));
    }
}
