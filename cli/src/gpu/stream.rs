//! Streams, events and graphs.

use super::driver::refused;
use super::{Gpu, Span};
use ashore::{DeviceStream, Error, ErrorKind, Result};
use cudarc::driver::sys::{CUevent_flags, CUgraphInstantiate_flags, CUstreamCaptureMode};
use cudarc::driver::{CudaEvent, CudaGraph, CudaStream};
use std::sync::Arc;

/// A stream that is not ordered with any other. Clones are the same stream.
#[derive(Clone)]
pub struct Stream {
    gpu: Arc<Gpu>,
    pub(super) inner: Arc<CudaStream>,
}

impl Stream {
    /// # Errors
    /// `Device`.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let inner = gpu.context.new_stream().map_err(refused("cuStreamCreate"))?;
        Ok(Self { gpu: gpu.clone(), inner })
    }

    pub fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    /// Returns the stream in the library's type.
    pub fn device_stream(&self) -> DeviceStream<'_> {
        (&self.inner).into()
    }

    /// Waits for everything queued in it.
    ///
    /// # Errors
    /// `Device`.
    pub fn wait(&self) -> Result<()> {
        self.inner.synchronize().map_err(refused("cuStreamSynchronize"))
    }

    /// Captures the work that `queue` queues in the stream as a graph. The graph keeps `spans`: all memory
    /// that it accesses.
    ///
    /// # Errors
    /// `Device`.
    pub fn capture(&self, spans: Vec<Span>, queue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        let of_this_thread = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.inner.begin_capture(of_this_thread).map_err(refused("cuStreamBeginCapture"))?;
        let queued = queue();
        let graph = self.inner.end_capture(CUgraphInstantiate_flags(0)).map_err(refused("cuStreamEndCapture"))?;
        let graph = graph.ok_or_else(|| Error::new(ErrorKind::Device, "nothing was captured"))?;
        queued.map(|()| Graph { stream: self.inner.clone(), graph, _spans: spans })
    }
}

/// A CUDA event: a point in a stream, with the time when it is reached.
pub struct Event {
    gpu: Arc<Gpu>,
    inner: CudaEvent,
}

impl Event {
    /// # Errors
    /// `Device`.
    pub fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let inner = gpu.context.new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).map_err(refused("cuEventCreate"))?;
        Ok(Self { gpu: gpu.clone(), inner })
    }

    /// Records the event after everything queued in the stream.
    ///
    /// # Errors
    /// `Device`.
    pub fn record(&self, stream: &Stream) -> Result<()> {
        self.inner.record(&stream.inner).map_err(refused("cuEventRecord"))
    }

    /// Waits until the event is reached.
    ///
    /// # Errors
    /// `Device`.
    pub fn wait(&self) -> Result<()> {
        self.inner.synchronize().map_err(refused("cuEventSynchronize"))
    }

    /// Returns the seconds from `before` to this event.
    ///
    /// # Errors
    /// `Device`; `Unavailable` for a driver older than CUDA 12.8.
    pub fn since(&self, before: &Self) -> Result<f64> {
        const CALL: &str = "cuEventElapsedTime_v2";
        if !self.gpu.driver.measures {
            return Err(Error::new(ErrorKind::Unavailable, format!("the CUDA driver is too old symbol={CALL}")));
        }
        let milliseconds = before.inner.elapsed_ms(&self.inner).map_err(refused(CALL))?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

/// A captured graph, replayed in the stream in which it was captured.
pub struct Graph {
    stream: Arc<CudaStream>,
    // Declared first, to be dropped before the memory that it accesses.
    graph: CudaGraph,
    _spans: Vec<Span>,
}

impl Graph {
    /// Queues the graph.
    ///
    /// # Errors
    /// `Device`.
    pub fn replay(&self) -> Result<()> {
        self.graph.launch().map_err(refused("cuGraphLaunch"))
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // Wait for the graph, because other streams may own the spans and free them.
        self.stream.context().record_err(self.stream.synchronize());
    }
}

/// Returns the seconds that `work` takes in the stream, measured by events.
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
