//! The stager's queue of copies: those from GPUs in a stream of each, those from the host by the stager's own thread.
//!
//! # Safety argument
//! Copies are passed on to the driver under the contract of [`CopyQueue::copy`]. A mark is reached when the events of all GPUs
//! with a copy before it are reached, and marks are looked at in order.
#![expect(unsafe_code, reason = "asynchronous copies; argument above")]

use super::Shared;
use super::gpu::Lent;
use super::lanes::Lanes;
use crate::device::host::HostQueue;
use crate::device::{CopyQueue, Point};
use crate::digest::Digest;
use crate::error::Result;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// See the module.
pub(super) struct Queue {
    host: HostQueue,
    lanes: Lanes,
    /// Copies are held back.
    batch: bool,
    marks: VecDeque<Mark>,
    marked: u64,
    reached: u64,
}

/// A mark that is not known to be reached: one event for each GPU with copies before it.
struct Mark(SmallVec<[Lent; 1]>);

impl Queue {
    pub fn new(shared: Arc<Shared>) -> Result<Self> {
        let home = shared.home;
        let mut lanes = Lanes::new(shared, |gpu| Ok(gpu.copies.clone()))?;
        // From the beginning: kernels are queued there too, and `quiesce` waits for them.
        lanes.of(home)?;
        Ok(Self { host: HostQueue(0), lanes, batch: false, marks: VecDeque::with_capacity(8), marked: 0, reached: 0 })
    }
}

impl CopyQueue for Queue {
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>> {
        // SAFETY: passed on.
        unsafe { self.host.copy(from, to, len) }
    }

    fn wait(&mut self, point: &Point) -> Result<()> {
        self.lanes.wait(point)
    }

    fn batch(&mut self) {
        self.batch = true;
    }

    unsafe fn fetch(&mut self, ordinal: u32, from: *const u8, to: *mut u8, len: usize) -> Result<()> {
        let lane = self.lanes.of(ordinal)?;
        // Before the call: what fails may have been queued all the same.
        lane.moved = true;
        let from = from.addr() as u64;
        if self.batch {
            lane.held.push(from, to, len);
            return Ok(());
        }
        // SAFETY: passed on.
        unsafe { lane.stream.copy_to_host(from, to, len) }
    }

    fn flush(&mut self) -> Result<()> {
        self.lanes.flush()
    }

    fn mark(&mut self) -> Result<u64> {
        let mut events = SmallVec::new();
        self.lanes.mark(&mut events)?;
        self.marks.push_back(Mark(events));
        self.marked += 1;
        Ok(self.marked)
    }

    fn reached(&mut self) -> Result<u64> {
        while let Some(Mark(events)) = self.marks.front() {
            for event in events {
                // As in `Lanes::of`: who knows what ran in this thread since the last time.
                event.gpu.context.make_current()?;
                if !event.is_reached()? {
                    return Ok(self.reached);
                }
            }
            self.marks.pop_front();
            self.reached += 1;
        }
        Ok(self.reached)
    }

    fn quiesce(&mut self, deadline: Instant) -> bool {
        self.lanes.quiesce(deadline)
    }
}
