//! The kernels of a training step: `kernels/training.cu`, whose structures are mirrored here.
//!
//! # Safety argument
//! Each function is launched with the structure that its source declares, by value, and accesses device
//! memory only within spans whose lengths are checked here. `memory` explains how long they stay valid.
#![expect(unsafe_code, reason = "launches kernels; argument above")]

use super::driver::refused;
use super::{Span, Stream};
use crate::adamw::Rates;
use ashore::{Error, ErrorKind, Result};
use cudarc::driver::{CudaContext, CudaFunction, DeviceRepr, LaunchConfig, PushKernelArg};
use std::sync::Arc;

// A link in the repository; a file in the published package.
const PTX: &str = include_str!("../../kernels/training.ptx");
const THREADS: u32 = 256;

/// The entry points. Each keeps the module loaded.
pub struct Kernels {
    adamw: CudaFunction,
    fill: CudaFunction,
    busy: CudaFunction,
}

#[repr(C)]
struct Adamw {
    tensors: [u64; 4],
    count: u64,
    rate: f32,
    unbias: f32,
    beta_first: f32,
    beta_second: f32,
    epsilon: f32,
    decay: f32,
}

#[repr(C)]
struct Fill {
    to: u64,
    count: u64,
    seed: u64,
    scale: f32,
    unused: u32,
}

#[repr(C)]
struct Busy {
    out: u64,
    rounds: u64,
}

// SAFETY: structures of numbers, laid out as in C, without padding.
unsafe impl DeviceRepr for Adamw {}
// SAFETY: as above.
unsafe impl DeviceRepr for Fill {}
// SAFETY: as above.
unsafe impl DeviceRepr for Busy {}

impl Kernels {
    pub(super) fn load(context: &Arc<CudaContext>) -> Result<Self> {
        let module = context.load_module(PTX.into()).map_err(refused("cuModuleLoadData"))?;
        let find = |name| module.load_function(name).map_err(refused("cuModuleGetFunction"));
        Ok(Self { adamw: find("adamw")?, fill: find("fill")?, busy: find("busy")? })
    }
}

impl Stream {
    /// Queues one step of AdamW in place: parameters, first and second moments, gradients, all fp32.
    ///
    /// # Errors
    /// `Device`; `Internal` when the lengths differ.
    pub fn adamw(&self, tensors: [&Span; 4], rates: Rates) -> Result<()> {
        let bytes = tensors[0].bytes;
        if tensors.iter().any(|tensor| tensor.bytes != bytes) {
            return Err(Error::new(ErrorKind::Internal, "AdamW needs tensors of equal length"));
        }
        let Rates { rate, unbias, beta_first, beta_second, epsilon, decay } = rates;
        let tensors = tensors.map(Span::address);
        let argument = Adamw { tensors, count: bytes / 4, rate, unbias, beta_first, beta_second, epsilon, decay };
        self.launch(&self.gpu().kernels.adamw, &argument)
    }

    /// Queues numbers between -`scale` and `scale`, the same for the same seed.
    ///
    /// # Errors
    /// `Device`.
    pub fn fill(&self, to: &Span, seed: u64, scale: f32) -> Result<()> {
        let argument = Fill { to: to.address(), count: to.bytes / 4, seed, scale, unused: 0 };
        self.launch(&self.gpu().kernels.fill, &argument)
    }

    /// Keeps the device busy for `rounds` rounds of arithmetic. Writes nothing to `out`, which has one
    /// number.
    ///
    /// # Errors
    /// `Device`; `Internal` when `out` is shorter.
    pub fn busy(&self, out: &Span, rounds: u64) -> Result<()> {
        let argument = Busy { out: out.part(0, 4)?.address(), rounds };
        self.launch(&self.gpu().kernels.busy, &argument)
    }

    fn launch<T: DeviceRepr>(&self, function: &CudaFunction, argument: &T) -> Result<()> {
        let (grid_dim, block_dim) = ((self.gpu().blocks, 1, 1), (THREADS, 1, 1));
        let mut launch = self.inner.launch_builder(function);
        // SAFETY: the argument is the function's structure and is copied during the call; see the safety
        // argument.
        let launched =
            unsafe { launch.arg(argument).launch(LaunchConfig { grid_dim, block_dim, shared_mem_bytes: 0 }) };
        launched.map(drop).map_err(refused("cuLaunchKernel"))
    }
}
