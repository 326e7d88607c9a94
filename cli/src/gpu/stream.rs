//! Streams, events and graphs.
//!
//! # Safety argument
//! Handles belong to the owner that wraps them and are destroyed once; the driver puts that off until what was queued has ended.
//! What work touches stays because spans keep it, also in a graph, or until it has ended (`memory`).
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use super::driver::{Handle, call};
use super::{Gpu, Span};
use ashore::{DeviceStream, Error, ErrorKind, Result};
use std::sync::Arc;

/// A stream that is ordered with no other. Clones are the same stream.
#[derive(Clone)]
pub struct Stream(Arc<Owned>);

struct Owned {
    gpu: Arc<Gpu>,
    handle: Handle,
}

impl Stream {
    /// # Errors
    /// `Device`.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        const NON_BLOCKING: u32 = 1;
        let mut handle = 0;
        gpu.enter()?;
        // SAFETY: writes one handle.
        unsafe { call!(gpu, cuStreamCreate(&mut handle, NON_BLOCKING)) }?;
        Ok(Self(Arc::new(Owned { gpu: gpu.clone(), handle })))
    }

    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.0.gpu
    }

    pub(super) fn handle(&self) -> Handle {
        self.0.handle
    }

    /// As the library knows it.
    pub fn device_stream(&self) -> DeviceStream<'_> {
        // SAFETY: this stream, which is destroyed when it is dropped.
        unsafe { DeviceStream::new(self.gpu().ordinal, self.handle()) }
    }

    /// Waits for everything that was queued in it.
    ///
    /// # Errors
    /// `Device`.
    pub fn wait(&self) -> Result<()> {
        self.gpu().enter()?;
        // SAFETY: a live stream.
        unsafe { call!(self.gpu(), cuStreamSynchronize(self.handle())) }
    }

    /// Zeros.
    ///
    /// # Errors
    /// `Device`.
    pub fn zero(&self, to: &Span) -> Result<()> {
        self.gpu().enter()?;
        // SAFETY: within memory that the span keeps, which is freed only when everything has ended.
        unsafe { call!(self.gpu(), cuMemsetD8Async(to.address(), 0, to.bytes as usize, self.handle())) }
    }

    /// Copies as many bytes as there are in both.
    ///
    /// # Errors
    /// `Device`.
    pub fn copy(&self, to: &Span, from: &Span) -> Result<()> {
        let bytes = to.bytes.min(from.bytes) as usize;
        self.gpu().enter()?;
        // SAFETY: as for zeros, at both ends.
        unsafe { call!(self.gpu(), cuMemcpyDtoDAsync_v2(to.address(), from.address(), bytes, self.handle())) }
    }

    /// What `queue` puts into the stream, as a graph, which keeps `spans`: all that it touches.
    ///
    /// # Errors
    /// `Device`.
    pub fn capture(&self, spans: Vec<Span>, queue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        const OF_THIS_THREAD: u32 = 1;
        let gpu = self.gpu();
        let (mut graph, mut executable) = (0, 0);
        gpu.enter()?;
        // SAFETY: a live stream, whose capture ends below.
        unsafe { call!(gpu, cuStreamBeginCapture_v2(self.handle(), OF_THIS_THREAD)) }?;
        let queued = queue();
        // SAFETY: writes one handle.
        unsafe { call!(gpu, cuStreamEndCapture(self.handle(), &mut graph)) }?;
        // SAFETY: writes one handle; the graph is live.
        let made = unsafe { call!(gpu, cuGraphInstantiateWithFlags(&mut executable, graph, 0)) };
        // SAFETY: made above, used no more: the executable is a copy.
        unsafe { call!(gpu, cuGraphDestroy(graph)) }?;
        made?;
        let graph = Graph { gpu: gpu.clone(), executable, _spans: spans };
        queued.map(|()| graph)
    }

    /// Queues a graph.
    ///
    /// # Errors
    /// `Device`.
    pub fn replay(&self, graph: &Graph) -> Result<()> {
        self.gpu().enter()?;
        // SAFETY: a live graph, which keeps what it touches; it is destroyed when everything has ended.
        unsafe { call!(self.gpu(), cuGraphLaunch(graph.executable, self.handle())) }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.gpu.enter();
        // SAFETY: made here, and no clone is left.
        let _ = unsafe { call!(self.gpu, cuStreamDestroy_v2(self.handle)) };
    }
}

/// A point in a stream, and when it was passed.
pub struct Event {
    gpu: Arc<Gpu>,
    handle: Handle,
}

impl Event {
    /// # Errors
    /// `Device`.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let mut handle = 0;
        gpu.enter()?;
        // SAFETY: writes one handle.
        unsafe { call!(gpu, cuEventCreate(&mut handle, 0)) }?;
        Ok(Self { gpu: gpu.clone(), handle })
    }

    /// From now on it is the point behind everything in the stream.
    ///
    /// # Errors
    /// `Device`.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.gpu.enter()?;
        // SAFETY: live handles.
        unsafe { call!(self.gpu, cuEventRecord(self.handle, stream.handle())) }
    }

    /// Waits until it is passed.
    ///
    /// # Errors
    /// `Device`.
    pub fn wait(&self) -> Result<()> {
        self.gpu.enter()?;
        // SAFETY: a live handle.
        unsafe { call!(self.gpu, cuEventSynchronize(self.handle)) }
    }

    /// Seconds from `before` to this, both of them passed.
    ///
    /// # Errors
    /// `Device`.
    pub fn since(&self, before: &Self) -> Result<f64> {
        let mut milliseconds = f32::NAN;
        self.gpu.enter()?;
        // SAFETY: live handles; writes one number.
        unsafe { call!(self.gpu, cuEventElapsedTime(&mut milliseconds, before.handle, self.handle)) }?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = self.gpu.enter();
        // SAFETY: made here.
        let _ = unsafe { call!(self.gpu, cuEventDestroy_v2(self.handle)) };
    }
}

/// Work that is queued as one.
pub struct Graph {
    gpu: Arc<Gpu>,
    executable: Handle,
    _spans: Vec<Span>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.synchronize().is_ok() {
            // SAFETY: made here, and nothing runs any more.
            let _ = unsafe { call!(self.gpu, cuGraphExecDestroy(self.executable)) };
        }
    }
}

/// Seconds that `work` takes in the stream, by events.
///
/// # Errors
/// Those of `work`, and `Device`.
pub fn timed(stream: &Stream, work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let (begin, end) = (Event::new(stream.gpu())?, Event::new(stream.gpu())?);
    begin.record(stream)?;
    work()?;
    end.record(stream)?;
    end.wait()?;
    let seconds = end.since(&begin)?;
    if seconds.is_finite() { Ok(seconds) } else { Err(Error::new(ErrorKind::Device, "an event has no time")) }
}
