//! Copies from the host to GPUs, for one thread of a restore: in a stream of its own on each, beside the copies of saves.
//!
//! # Safety argument
//! Copies are passed on to the driver under the contract of [`LoadQueue::load`]. A mark holds an event behind the copies of each
//! GPU that had some since the last mark; those before them in the same stream have ended then too.
#![expect(unsafe_code, reason = "asynchronous copies; argument above")]

use super::Shared;
use super::driver::Stream;
use super::gpu::{Gpu, Lent, POLL};
use super::queue::events_of;
use crate::device::{LoadQueue, Point};
use crate::error::Result;
use std::sync::Arc;
use std::time::Instant;

/// See the module.
pub(super) struct Loads {
    shared: Arc<Shared>,
    lanes: Vec<Lane>,
    /// The device whose context is current in this thread.
    current: Option<u32>,
}

/// One GPU as this queue uses it.
struct Lane {
    gpu: Arc<Gpu>,
    stream: Stream,
    /// Something was queued since the last mark.
    moved: bool,
}

impl Loads {
    pub fn new(shared: Arc<Shared>) -> Result<Self> {
        let mut loads = Self { shared, lanes: Vec::new(), current: None };
        let home = loads.shared.gpu(loads.shared.home)?;
        home.context.make_current()?;
        loads.current = Some(loads.shared.home);
        home.context.relax_capture()?;
        Ok(loads)
    }

    /// The lane of device `ordinal`, whose context is then current in this thread.
    fn lane(&mut self, ordinal: u32) -> Result<&mut Lane> {
        let found = self.lanes.iter().position(|lane| lane.gpu.context.ordinal == ordinal);
        let index = match found {
            Some(index) => index,
            None => {
                let gpu = self.shared.gpu(ordinal)?;
                let stream = gpu.context.stream()?;
                self.lanes.push(Lane { gpu, stream, moved: false });
                self.lanes.len() - 1
            }
        };
        let lane = &mut self.lanes[index];
        if self.current != Some(ordinal) {
            lane.gpu.context.make_current()?;
            self.current = Some(ordinal);
        }
        Ok(lane)
    }
}

impl LoadQueue for Loads {
    fn wait(&mut self, point: &Point) -> Result<()> {
        for event in events_of(point)? {
            self.lane(event.gpu.context.ordinal)?.stream.wait(event)?;
        }
        Ok(())
    }

    unsafe fn load(&mut self, ordinal: u32, from: *const u8, to: u64, len: usize) -> Result<()> {
        let lane = self.lane(ordinal)?;
        // Before the call: what fails may have been queued all the same.
        lane.moved = true;
        // SAFETY: passed on.
        unsafe { lane.stream.copy_to_device(from, to, len) }
    }

    fn mark(&mut self) -> Result<Point> {
        let moved: Vec<u32> =
            self.lanes.iter().filter(|lane| lane.moved).map(|lane| lane.gpu.context.ordinal).collect();
        let events = moved.into_iter().map(|ordinal| {
            let lane = self.lane(ordinal)?;
            let event = lane.gpu.event()?;
            event.record(lane.stream.handle())?;
            lane.moved = false;
            Ok(event)
        });
        Ok(Arc::new(events.collect::<Result<Vec<Lent>>>()?))
    }

    fn has_reached(&mut self, mark: &Point) -> Result<bool> {
        for event in events_of(mark)? {
            if !event.is_reached()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn quiesce(&mut self, deadline: Instant) -> bool {
        // A context that is lost does nothing any more: the driver has stopped all of its work.
        let ended = |lane: &Lane| lane.gpu.context.lost() || lane.stream.is_idle().unwrap_or(false);
        while !self.lanes.iter().all(ended) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }
}
