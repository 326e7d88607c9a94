//! The stager's queue of copies: those from GPUs in a stream of each, those from the host by the stager's own thread.
//!
//! # Safety argument
//! Copies are passed on to the driver under the contract of [`CopyQueue::copy`]. A mark is reached when the events of all GPUs
//! with a copy before it are reached, and marks are looked at in order.
#![expect(unsafe_code, reason = "asynchronous copies; argument above")]

use super::Shared;
use super::gpu::{Gpu, Lent, POLL};
use crate::device::host::HostQueue;
use crate::device::{CopyQueue, Point};
use crate::digest::Digest;
use crate::error::{Error, Result};
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// See the module.
pub(super) struct Queue {
    shared: Arc<Shared>,
    host: HostQueue,
    lanes: Vec<Lane>,
    /// The device whose context is current in this thread.
    current: Option<u32>,
    marks: VecDeque<Mark>,
    marked: u64,
    reached: u64,
}

/// One GPU as this queue uses it.
struct Lane {
    gpu: Arc<Gpu>,
    /// Something was queued since the last mark.
    moved: bool,
}

/// What a point of this device is.
pub(super) fn events_of(point: &Point) -> Result<&Vec<Lent>> {
    point.downcast_ref::<Vec<Lent>>().ok_or_else(|| Error::internal("a point of another device"))
}

/// A mark that is not known to be reached: one event for each GPU with copies before it.
struct Mark(SmallVec<[Lent; 1]>);

impl Queue {
    pub fn new(shared: Arc<Shared>) -> Result<Self> {
        let (lanes, marks) = (Vec::new(), VecDeque::with_capacity(8));
        let mut queue = Self { shared, host: HostQueue(0), lanes, current: None, marks, marked: 0, reached: 0 };
        let home = queue.lane(queue.shared.home)?;
        queue.lanes[home].gpu.context.relax_capture()?;
        Ok(queue)
    }

    /// The lane of device `ordinal`, whose context is then current in this thread.
    fn lane(&mut self, ordinal: u32) -> Result<usize> {
        let found = self.lanes.iter().position(|lane| lane.gpu.context.ordinal == ordinal);
        let index = match found {
            Some(index) => index,
            None => {
                self.lanes.push(Lane { gpu: self.shared.gpu(ordinal)?, moved: false });
                self.lanes.len() - 1
            }
        };
        if self.current != Some(ordinal) {
            self.lanes[index].gpu.context.make_current()?;
            self.current = Some(ordinal);
        }
        Ok(index)
    }
}

impl CopyQueue for Queue {
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>> {
        // SAFETY: passed on.
        unsafe { self.host.copy(from, to, len) }
    }

    fn wait(&mut self, point: &Point) -> Result<()> {
        for event in events_of(point)? {
            let lane = self.lane(event.gpu.context.ordinal)?;
            self.lanes[lane].gpu.copies.wait(event)?;
        }
        Ok(())
    }

    unsafe fn fetch(&mut self, ordinal: u32, from: *const u8, to: *mut u8, len: usize) -> Result<()> {
        let lane = self.lane(ordinal)?;
        let lane = &mut self.lanes[lane];
        // Before the call: what fails may have been queued all the same.
        lane.moved = true;
        // SAFETY: passed on.
        unsafe { lane.gpu.copies.copy_to_host(from.addr() as u64, to, len) }
    }

    fn mark(&mut self) -> Result<u64> {
        let mut events = SmallVec::new();
        for lane in 0..self.lanes.len() {
            if std::mem::take(&mut self.lanes[lane].moved) {
                self.lane(self.lanes[lane].gpu.context.ordinal)?;
                let event = self.lanes[lane].gpu.event()?;
                event.record(self.lanes[lane].gpu.copies.handle())?;
                events.push(event);
            }
        }
        self.marks.push_back(Mark(events));
        self.marked += 1;
        Ok(self.marked)
    }

    fn reached(&mut self) -> Result<u64> {
        while let Some(Mark(events)) = self.marks.front() {
            for event in events {
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
        // A context that is lost does nothing any more: the driver has stopped all of its work.
        let ended = |lane: &Lane| lane.gpu.context.lost() || lane.gpu.copies.is_idle().unwrap_or(false);
        while !self.lanes.iter().all(ended) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }
}
