//! The kernels of a training step: `kernels/training.cu`, whose structures are mirrored here.
//!
//! # Safety argument
//! Each function is launched with the structure that its source declares, by value, and touches device memory within spans whose
//! lengths are checked here; `memory` says how long they stay.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use super::driver::{Handle, call};
use super::{Gpu, Span, Stream};
use crate::adamw::Rates;
use ashore::{Error, ErrorKind, Result};
use std::ffi::{CString, c_void};

// A link in the repository; a file in the published package.
const PTX: &str = include_str!("../../kernels/training.ptx");
const THREADS: u32 = 256;

/// The entry points. The module stays loaded.
#[derive(Default)]
pub struct Kernels {
    adamw: Handle,
    fill: Handle,
    busy: Handle,
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

impl Kernels {
    pub(super) fn load(gpu: &Gpu) -> Result<Self> {
        let text = |text: &str| CString::new(text).map_err(|_| Error::new(ErrorKind::Internal, "a zero byte in PTX"));
        let (ptx, mut module) = (text(PTX)?, 0);
        // SAFETY: writes one handle; the text ends in a zero.
        unsafe { call!(gpu, cuModuleLoadData(&mut module, ptx.as_ptr())) }?;
        let find = |name: &str| {
            let (name, mut function) = (text(name)?, 0);
            // SAFETY: writes one handle; the module is loaded and the name ends in a zero.
            unsafe { call!(gpu, cuModuleGetFunction(&mut function, module, name.as_ptr())) }?;
            Ok::<_, Error>(function)
        };
        Ok(Self { adamw: find("adamw")?, fill: find("fill")?, busy: find("busy")? })
    }
}

impl Stream {
    /// One step of AdamW in place: parameters, first and second moments, gradients, all of fp32.
    ///
    /// # Errors
    /// `Device`; `Internal` when they are not of one length.
    pub fn adamw(&self, tensors: [&Span; 4], rates: Rates) -> Result<()> {
        let bytes = tensors[0].bytes;
        if tensors.iter().any(|tensor| tensor.bytes != bytes) {
            return Err(Error::new(ErrorKind::Internal, "AdamW over tensors of different lengths"));
        }
        let Rates { rate, unbias, beta_first, beta_second, epsilon, decay } = rates;
        let tensors = tensors.map(Span::address);
        let argument = Adamw { tensors, count: bytes / 4, rate, unbias, beta_first, beta_second, epsilon, decay };
        self.launch(self.gpu().kernels.adamw, &argument)
    }

    /// Numbers between -`scale` and `scale`, the same for the same seed.
    ///
    /// # Errors
    /// `Device`.
    pub fn fill(&self, to: &Span, seed: u64, scale: f32) -> Result<()> {
        let argument = Fill { to: to.address(), count: to.bytes / 4, seed, scale, unused: 0 };
        self.launch(self.gpu().kernels.fill, &argument)
    }

    /// Keeps the device busy with so many rounds of arithmetic; it writes nothing to `out`, of one number.
    ///
    /// # Errors
    /// `Device`; `Internal` when `out` is shorter.
    pub fn busy(&self, out: &Span, rounds: u64) -> Result<()> {
        let argument = Busy { out: out.part(0, 4)?.address(), rounds };
        self.launch(self.gpu().kernels.busy, &argument)
    }

    fn launch<T>(&self, function: Handle, argument: &T) -> Result<()> {
        let gpu = self.gpu();
        let parameters: [*const c_void; 1] = [std::ptr::from_ref(argument).cast()];
        gpu.enter()?;
        // SAFETY: the argument is the function's structure, and is copied during the call.
        unsafe {
            call!(
                gpu,
                cuLaunchKernel(
                    function,
                    gpu.blocks,
                    1,
                    1,
                    THREADS,
                    1,
                    1,
                    0,
                    self.handle(),
                    parameters.as_ptr(),
                    std::ptr::null()
                )
            )
        }
    }
}
