//! The copy streams of one thread, one per GPU. Each also records what was queued since the last mark, and
//! which copies are held back for a batch.
//!
//! # Safety argument
//! The caller that hands over a copy vouches for its memory until a later mark, or until the streams are
//! quiescent. A copy that is held back is either queued before that mark, or dropped before `quiesce`
//! returns.
#![expect(unsafe_code, reason = "asynchronous copies; argument above")]

use super::CudaState;
use super::copy_times::{Begun, CopyTimer};
use super::driver::{Copies, Stream};
use super::gpu::{Gpu, POLL_INTERVAL};
use super::pooled_event::{PooledEvent, events_of};
use crate::device::Dependency;
use crate::error::Result;
use crate::mutant::{self, Mutant};
use std::sync::Arc;
use std::time::Instant;

/// The copy streams of one thread.
pub(super) struct CopyStreams {
    shared: Arc<CudaState>,
    /// Makes the stream of a GPU at its first use.
    stream: fn(&Gpu) -> Result<Arc<Stream>>,
    streams: Vec<CopyStream>,
    /// Copies are timed.
    measured: bool,
}

/// The copy stream of one GPU.
pub(super) struct CopyStream {
    pub gpu: Arc<Gpu>,
    pub stream: Arc<Stream>,
    /// True if something was queued, or is held back, since the last mark.
    pub moved: bool,
    /// Copies to the host that are held back.
    pub held: Copies,
    timer: CopyTimer,
}

impl CopyStreams {
    /// Makes the copy streams of this thread, and lets it query events while other threads capture graphs.
    pub fn new(shared: Arc<CudaState>, stream: fn(&Gpu) -> Result<Arc<Stream>>) -> Result<Self> {
        let home = shared.gpu(shared.home)?;
        home.context.make_current()?;
        home.context.relax_capture()?;
        Ok(Self { shared, stream, streams: Vec::new(), measured: false })
    }

    /// Returns the stream of device `ordinal`, and makes its context current in this thread.
    pub fn of(&mut self, ordinal: u32) -> Result<&mut CopyStream> {
        let found = self.streams.iter().position(|copy_stream| copy_stream.gpu.context.ordinal == ordinal);
        let index = match found {
            Some(index) => index,
            None => {
                let gpu = self.shared.gpu(ordinal)?;
                let stream = (self.stream)(&gpu)?;
                let mut timer = CopyTimer::default();
                timer.measure(self.measured);
                self.streams.push(CopyStream { gpu, stream, moved: false, held: Copies::default(), timer });
                self.streams.len() - 1
            }
        };
        let copy_stream = &mut self.streams[index];
        // Set each time: sources that are read or dropped in this thread run users' code, which may leave
        // another context current.
        copy_stream.gpu.context.make_current()?;
        Ok(copy_stream)
    }

    /// Turns the timing of the next save's copies on or off.
    pub fn measure(&mut self, on: bool) {
        self.measured = on;
        self.streams.iter_mut().for_each(|copy_stream| copy_stream.timer.measure(on));
    }

    /// Makes everything queued from now on wait for `dependency`.
    pub fn wait(&mut self, dependency: &Dependency) -> Result<()> {
        for event in events_of(dependency)? {
            self.of(event.context().ordinal)?.stream.wait(event)?;
        }
        Ok(())
    }

    /// Queues the copies that are held back.
    pub fn flush(&mut self) -> Result<()> {
        self.each_moved(CopyStream::flush)
    }

    /// For each GPU that had something queued since the last mark, records one event behind that work. Passes
    /// the event to `keep`, with the beginning of those copies if they are timed.
    pub fn event(&mut self, mut keep: impl FnMut(PooledEvent, Option<Begun>)) -> Result<()> {
        self.each_moved(|copy_stream| {
            copy_stream.flush()?;
            let event = copy_stream.next_event()?;
            event.record(copy_stream.stream.handle())?;
            copy_stream.moved = false;
            keep(event, copy_stream.timer.take());
            Ok(())
        })
    }

    /// Runs `run` for each stream in which something was queued since the last mark, with its context
    /// current.
    fn each_moved(&mut self, mut run: impl FnMut(&mut CopyStream) -> Result<()>) -> Result<()> {
        for at in 0..self.streams.len() {
            if self.streams[at].moved {
                run(self.of(self.streams[at].gpu.context.ordinal)?)?;
            }
        }
        Ok(())
    }

    /// Drops the copies that are held back, and waits until no queued work runs any more. Returns false if
    /// some work may still run at `deadline`.
    pub fn quiesce(&mut self, deadline: Instant) -> bool {
        if !mutant::on(Mutant::BatchKept) {
            self.streams.iter_mut().for_each(|copy_stream| copy_stream.held.clear());
        }
        // A lost context does no more work: the driver has stopped all of it, or gives no answer.
        let ended = |copy_stream: &CopyStream| {
            // As in `of`, users' code may have changed the context. If the driver refuses this, it refuses
            // the query too.
            _ = copy_stream.gpu.context.make_current();
            copy_stream.stream.is_idle().unwrap_or(false) || copy_stream.gpu.context.lost()
        };
        while !self.streams.iter().all(ended) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(POLL_INTERVAL);
        }
        true
    }
}

impl CopyStream {
    /// Called before a copy is queued. Records when the first copy since the last mark begins, if copies are
    /// timed.
    pub fn begin(&mut self) {
        if self.timer.is_on() {
            self.timer.begin(&self.gpu, &self.stream);
        }
    }

    fn next_event(&self) -> Result<PooledEvent> {
        let timed = if self.timer.is_on() { self.gpu.timed_event().ok() } else { None };
        timed.map_or_else(|| self.gpu.event(), Ok)
    }

    /// Queues the copies that are held back. The context must be current.
    fn flush(&mut self) -> Result<()> {
        if self.held.len() > 0 {
            self.begin();
        }
        // SAFETY: the caller of `push` vouched for each copy until a later mark, and `quiesce` drops the
        // others.
        let queued = unsafe { self.stream.copy_all_to_host(&self.held) };
        self.held.clear();
        queued
    }
}
