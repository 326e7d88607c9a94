//! What a program that trains on a GPU does there itself, beside the library: its own memory, streams, kernels and graphs. The two
//! share nothing but the device's primary context, as with any framework.
//!
//! # Safety argument
//! Handles are made here and destroyed once, by the owner that wraps them. Pointers to results are to locals of the call.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

mod driver;
mod kernels;
mod memory;
mod stream;

pub use memory::{Pinned, Span, allocate, source};
pub use stream::{Event, Graph, Stream, timed};

use ashore::Result;
use driver::{Driver, Handle, call};
use std::sync::Arc;

/// A device, its primary context, and the kernels of a training step.
pub struct Gpu {
    driver: Driver,
    pub ordinal: u32,
    context: Handle,
    /// How many blocks of threads fill it.
    blocks: u32,
    kernels: kernels::Kernels,
}

impl Gpu {
    /// Device `ordinal`; its context is current in this thread from now on.
    ///
    /// # Errors
    /// `Unavailable` without a driver; `Device`.
    pub fn open(ordinal: u32) -> Result<Arc<Self>> {
        const MULTIPROCESSORS: i32 = 16;
        let (mut device, mut context, mut processors) = (0, 0, 0);
        let mut gpu =
            Self { driver: Driver::find()?, ordinal, context: 0, blocks: 1, kernels: kernels::Kernels::default() };
        let wanted = i32::try_from(ordinal).unwrap_or(i32::MAX);
        // SAFETY: writes one number.
        unsafe { call!(gpu, cuDeviceGet(&mut device, wanted)) }?;
        // SAFETY: writes one number.
        unsafe { call!(gpu, cuDeviceGetAttribute(&mut processors, MULTIPROCESSORS, device)) }?;
        // Never released: others in this process use it without having retained it.
        // SAFETY: writes one handle.
        unsafe { call!(gpu, cuDevicePrimaryCtxRetain(&mut context, device)) }?;
        (gpu.context, gpu.blocks) = (context, 4 * processors.max(1) as u32);
        gpu.enter()?;
        gpu.kernels = kernels::Kernels::load(&gpu)?;
        Ok(Arc::new(gpu))
    }

    /// True of the driver of the tests.
    pub fn simulated(&self) -> bool {
        self.driver.simulated
    }

    /// Makes the context current in this thread.
    ///
    /// # Errors
    /// `Device`.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: the context is retained for as long as the process lives.
        unsafe { call!(self, cuCtxSetCurrent(self.context)) }
    }

    /// Waits for everything that was queued in the context, by anybody.
    fn synchronize(&self) -> Result<()> {
        self.enter()?;
        // SAFETY: no arguments.
        unsafe { call!(self, cuCtxSynchronize()) }
    }
}
