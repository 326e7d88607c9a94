//! The GPU side of a training program without the library: its own memory, streams, kernels and graphs,
//! through cudarc. It shares only the device's primary context with the library, as any framework does.

mod driver;
mod kernels;
mod memory;
mod stream;

pub use memory::{Pinned, Span, allocate, source};
pub use stream::{Event, Graph, Stream, timed};

use ashore::Result;
use cudarc::driver::CudaContext;
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use driver::{Driver, refused};
use std::sync::Arc;

/// A device, its primary context, and the kernels of a training step.
pub struct Gpu {
    driver: Driver,
    context: Arc<CudaContext>,
    /// The number of thread blocks that fill the GPU.
    blocks: u32,
    kernels: kernels::Kernels,
}

impl Gpu {
    /// Opens device `ordinal`, after the library has found a driver.
    ///
    /// # Errors
    /// `Unavailable` without a driver; `Device`.
    pub fn open(ordinal: u32) -> Result<Arc<Self>> {
        let driver = Driver::find()?;
        let context = CudaContext::new(ordinal as usize).map_err(refused("cuDevicePrimaryCtxRetain"))?;
        let processors = context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
        let processors = processors.map_err(refused("cuDeviceGetAttribute"))?;
        let kernels = kernels::Kernels::load(&context)?;
        Ok(Arc::new(Self { driver, context, blocks: 4 * processors.max(1) as u32, kernels }))
    }

    /// True for the simulated driver of the tests.
    pub fn simulated(&self) -> bool {
        self.driver.simulated
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(refused("cuCtxSetCurrent"))
    }
}
