//! A thread's way to GPUs: on each of them a stream, what was queued there since the last mark, and what is held back to be queued in
//! one call.
//!
//! # Safety argument
//! What is held back was vouched for until a later mark, or until the streams are quiescent, by whoever handed it over; it is queued
//! before that mark, or dropped before anybody is told that nothing runs.
#![expect(unsafe_code, reason = "asynchronous copies; argument above")]

use super::Shared;
use super::driver::{Copies, Stream};
use super::gpu::{Gpu, POLL};
use super::pooled_event::{PooledEvent, events_of};
use crate::device::Point;
use crate::error::Result;
use crate::mutant::{self, Mutant};
use std::sync::Arc;
use std::time::Instant;

/// See the module.
pub(super) struct CopyStreams {
    shared: Arc<Shared>,
    /// Of a GPU that is used for the first time.
    stream: fn(&Gpu) -> Result<Arc<Stream>>,
    streams: Vec<CopyStream>,
}

/// One GPU.
pub(super) struct CopyStream {
    pub gpu: Arc<Gpu>,
    pub stream: Arc<Stream>,
    /// Something was queued, or is held back, since the last mark.
    pub moved: bool,
    /// Copies to the host.
    pub held: Copies,
}

impl CopyStreams {
    /// Those of this thread, which is then one that other threads may capture graphs beside.
    pub fn new(shared: Arc<Shared>, stream: fn(&Gpu) -> Result<Arc<Stream>>) -> Result<Self> {
        let home = shared.gpu(shared.home)?;
        home.context.make_current()?;
        home.context.relax_capture()?;
        Ok(Self { shared, stream, streams: Vec::new() })
    }

    /// The stream of device `ordinal`, whose context is then current in this thread.
    pub fn of(&mut self, ordinal: u32) -> Result<&mut CopyStream> {
        let found = self.streams.iter().position(|copy_stream| copy_stream.gpu.context.ordinal == ordinal);
        let index = match found {
            Some(index) => index,
            None => {
                let gpu = self.shared.gpu(ordinal)?;
                let stream = (self.stream)(&gpu)?;
                self.streams.push(CopyStream { gpu, stream, moved: false, held: Copies::default() });
                self.streams.len() - 1
            }
        };
        let copy_stream = &mut self.streams[index];
        // Each time: sources that are read or dropped in this thread run code of users, which may leave any context behind.
        copy_stream.gpu.context.make_current()?;
        Ok(copy_stream)
    }

    /// Everything queued from now on comes after `point`.
    pub fn wait(&mut self, point: &Point) -> Result<()> {
        for event in events_of(point)? {
            self.of(event.gpu.context.ordinal)?.stream.wait(event)?;
        }
        Ok(())
    }

    /// Queues what is held back.
    pub fn flush(&mut self) -> Result<()> {
        self.each_moved(CopyStream::flush)
    }

    /// One event for each GPU with something queued since the last mark, behind that.
    pub fn mark(&mut self, events: &mut impl Extend<PooledEvent>) -> Result<()> {
        self.each_moved(|copy_stream| {
            copy_stream.flush()?;
            let event = copy_stream.gpu.event()?;
            event.record(copy_stream.stream.handle())?;
            copy_stream.moved = false;
            events.extend([event]);
            Ok(())
        })
    }

    /// For each stream that has moved, with its context current.
    fn each_moved(&mut self, mut run: impl FnMut(&mut CopyStream) -> Result<()>) -> Result<()> {
        for at in 0..self.streams.len() {
            if self.streams[at].moved {
                run(self.of(self.streams[at].gpu.context.ordinal)?)?;
            }
        }
        Ok(())
    }

    /// Drops what is held back, and waits until nothing that was queued runs any more. False when that takes longer than until
    /// `deadline`.
    pub fn quiesce(&mut self, deadline: Instant) -> bool {
        if !mutant::on(Mutant::BatchKept) {
            self.streams.iter_mut().for_each(|copy_stream| copy_stream.held.clear());
        }
        // A context that is lost does nothing any more: the driver has stopped all of its work, or does not
        // say.
        let ended = |copy_stream: &CopyStream| {
            // As in `of`: users' code may have been what failed. Where it is refused, so is the question.
            _ = copy_stream.gpu.context.make_current();
            copy_stream.stream.is_idle().unwrap_or(false) || copy_stream.gpu.context.lost()
        };
        while !self.streams.iter().all(ended) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL);
        }
        true
    }
}

impl CopyStream {
    /// Queues what is held back. Its context is current.
    fn flush(&mut self) -> Result<()> {
        // SAFETY: see the safety argument.
        let queued = unsafe { self.stream.copy_all_to_host(&self.held) };
        self.held.clear();
        queued
    }
}
