//! An event that goes back to the pool of its GPU when it is dropped. Recorded anew it forgets what it was recorded behind, but what
//! waits for that goes on waiting.

use super::driver::Event;
use super::gpu::Gpu;
use crate::device::Point;
use crate::error::{Error, Result};
use std::ops::Deref;
use std::sync::Arc;

/// What a point of this device is.
pub(super) fn events_of(point: &Point) -> Result<&Vec<PooledEvent>> {
    point.downcast_ref::<Vec<PooledEvent>>().ok_or_else(|| Error::internal("a point of another device"))
}

/// See the module.
pub(super) struct PooledEvent {
    pub gpu: Arc<Gpu>,
    event: Option<Event>,
}

impl PooledEvent {
    pub fn new(gpu: Arc<Gpu>, event: Event) -> Self {
        Self { gpu, event: Some(event) }
    }

    /// True when it is reached, or never will be because the device is lost.
    pub fn is_over(&self) -> bool {
        let context = &self.gpu.context;
        // Asked in any case: that is how one learns that the context is lost.
        let _entered = context.enter();
        self.is_reached().unwrap_or(false) || context.lost()
    }
}

impl Deref for PooledEvent {
    type Target = Event;

    fn deref(&self) -> &Event {
        self.event.as_ref().expect("taken out in drop alone")
    }
}

impl Drop for PooledEvent {
    fn drop(&mut self) {
        self.event.take().into_iter().for_each(|event| self.gpu.put_back(event));
    }
}
