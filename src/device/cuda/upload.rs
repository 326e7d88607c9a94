//! Copies from the host to GPUs for one thread of a restore. Each GPU has a stream of its own, separate from
//! the copies of saves.
//!
//! # Safety argument
//! Copies are passed on to the driver under the contract of [`LoadQueue::load`]. A mark has one event for
//! each GPU that had copies since the last mark, recorded behind these copies. Earlier copies in the same
//! stream have ended by then too.
#![expect(unsafe_code, reason = "asynchronous copies; argument above")]

use super::CudaState;
use super::copy_streams::CopyStreams;
use super::pooled_event::{PooledEvent, events_of};
use crate::device::{Dependency, LoadQueue, RowLayout};
use crate::error::Result;
use std::sync::Arc;
use std::time::Instant;

/// The copy streams of one restore thread.
pub(super) struct Uploads(CopyStreams);

impl Uploads {
    pub fn new(shared: Arc<CudaState>) -> Result<Self> {
        Ok(Self(CopyStreams::new(shared, |gpu| gpu.context.stream().map(Arc::new))?))
    }
}

impl LoadQueue for Uploads {
    fn wait(&mut self, dependency: &Dependency) -> Result<()> {
        self.0.wait(dependency)
    }

    unsafe fn load(&mut self, ordinal: u32, from: *const u8, to: u64, rows: RowLayout) -> Result<()> {
        let copy_stream = self.0.of(ordinal)?;
        // Set before the call, because a call that fails may still have queued the copy.
        copy_stream.moved = true;
        // SAFETY: the caller's contract, passed on.
        unsafe {
            match rows {
                RowLayout { width, height: 1, .. } => copy_stream.stream.copy_to_device(from, to, width),
                rows => copy_stream.stream.copy_rows_to_device(from, to, rows),
            }
        }
    }

    fn event(&mut self) -> Result<Dependency> {
        let mut events: Vec<PooledEvent> = Vec::new();
        self.0.event(|event, _| events.push(event))?;
        Ok(Arc::new(events))
    }

    fn has_reached(&mut self, event: &Dependency) -> Result<bool> {
        for event in events_of(event)? {
            if !event.is_reached()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn quiesce(&mut self, deadline: Instant) -> bool {
        self.0.quiesce(deadline)
    }
}
