//! The stager's copy queue. One stream per GPU copies from that GPU; the stager's own thread copies from the
//! host.
//!
//! # Safety argument
//! Copies are passed on to the driver under the contract of [`CopyQueue::copy`]. A mark is reached when the
//! events of all GPUs with a copy before the mark are reached. Marks are checked in order.
#![expect(unsafe_code, reason = "asynchronous copies; argument above")]

use super::CudaState;
use super::copy_streams::CopyStreams;
use super::copy_times::Begun;
use super::pooled_event::PooledEvent;
use crate::device::host::HostQueue;
use crate::device::{CopyQueue, CopyTime, Dependency};
use crate::digest::Digest;
use crate::error::Result;
use smallvec::SmallVec;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

/// The stager's copy queue over the host and all GPUs.
pub(super) struct Queue {
    host: HostQueue,
    streams: CopyStreams,
    /// True if copies are held back for a batch.
    batch: bool,
    pending: VecDeque<ChunkEvents>,
    recorded: u64,
    reached: u64,
    /// The times of copies that the caller has not taken yet, each with the number of its completion event.
    times: VecDeque<(u64, CopyTime)>,
}

/// A mark that is not yet known to be reached: one event for each GPU with copies before it.
struct ChunkEvents(SmallVec<[(PooledEvent, Option<Begun>); 1]>);

impl Queue {
    pub fn new(shared: Arc<CudaState>) -> Result<Self> {
        let home = shared.home;
        let mut streams = CopyStreams::new(shared, |gpu| Ok(gpu.copies.clone()))?;
        // The stream exists from the start: kernels are queued there too, and `quiesce` waits for them.
        streams.of(home)?;
        Ok(Self {
            host: HostQueue(0),
            streams,
            batch: false,
            pending: VecDeque::with_capacity(8),
            recorded: 0,
            reached: 0,
            times: VecDeque::new(),
        })
    }
}

impl CopyQueue for Queue {
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>> {
        // SAFETY: the caller's contract, passed on.
        unsafe { self.host.copy(from, to, len) }
    }

    fn wait(&mut self, dependency: &Dependency) -> Result<()> {
        self.streams.wait(dependency)
    }

    fn batch(&mut self) {
        self.batch = true;
    }

    unsafe fn fetch(&mut self, ordinal: u32, from: *const u8, to: *mut u8, len: usize) -> Result<()> {
        let copy_stream = self.streams.of(ordinal)?;
        // Set before the call, because a call that fails may still have queued the copy.
        copy_stream.moved = true;
        let from = from.addr() as u64;
        if self.batch {
            copy_stream.held.push(from, to, len);
            return Ok(());
        }
        copy_stream.begin();
        // SAFETY: the caller's contract, passed on.
        unsafe { copy_stream.stream.copy_to_host(from, to, len) }
    }

    fn flush(&mut self) -> Result<()> {
        self.streams.flush()
    }

    fn event(&mut self) -> Result<u64> {
        let mut events = SmallVec::new();
        self.streams.event(|event, begun| events.push((event, begun)))?;
        self.pending.push_back(ChunkEvents(events));
        self.recorded += 1;
        Ok(self.recorded)
    }

    fn reached(&mut self) -> Result<u64> {
        while let Some(ChunkEvents(events)) = self.pending.front() {
            for (event, _) in events {
                // As in `CopyStreams::of`, users' code may have changed this thread's context.
                event.context().make_current()?;
                if !event.is_reached()? {
                    return Ok(self.reached);
                }
            }
            let events = self.pending.pop_front();
            self.reached += 1;
            for (event, begun) in events.into_iter().flat_map(|events| events.0) {
                if let Some(begun) = begun {
                    self.times.push_back((self.reached, begun.until(&event, Instant::now())));
                }
            }
        }
        Ok(self.reached)
    }

    fn measure(&mut self, on: bool) {
        self.times.clear();
        self.streams.measure(on);
    }

    fn times(&mut self, event: u64) -> SmallVec<[CopyTime; 1]> {
        while self.times.front().is_some_and(|(of, _)| *of < event) {
            self.times.pop_front();
        }
        let of_event = self.times.iter().take_while(|(of, _)| *of == event).count();
        self.times.drain(..of_event).map(|(_, time)| time).collect()
    }

    fn quiesce(&mut self, deadline: Instant) -> bool {
        self.streams.quiesce(deadline)
    }
}
