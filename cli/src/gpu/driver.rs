//! Finds the CUDA driver and checks it, because cudarc panics if there is none, or if it lacks a function.
//!
//! The bindings are those of the newest CUDA that cudarc knows. A driver that returns a code unknown even to
//! them would cause undefined behaviour in them, which is why the library calls the driver through its own
//! table.
//!
//! # Safety argument
//! The opened library is the system's driver by name, whose initialisers any program may run. Symbols are
//! only looked up, not called.
#![expect(unsafe_code, reason = "opens a C library; argument above")]

use ashore::{Error, ErrorKind, Result};
use cudarc::driver::{DriverError, sys};

/// The driver functions that cudarc calls for this program.
const FUNCTIONS: [&str; 40] = [
    "cuCtxGetCurrent",
    "cuCtxSetCurrent",
    "cuCtxSynchronize",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAllocAsync",
    "cuMemAlloc_v2",
    "cuMemFreeAsync",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuMemsetD8Async",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuStreamWaitEvent",
];

/// What the driver found by cudarc supports.
pub struct Driver {
    /// The simulated driver of the tests, on which times mean nothing.
    pub simulated: bool,
    /// It can measure a stream's time as cudarc does: CUDA 12.8 or newer.
    pub measures: bool,
}

impl Driver {
    /// Looks up everything that cudarc will call.
    ///
    /// # Errors
    /// `Unavailable`, naming what is missing.
    pub fn find() -> Result<Self> {
        let missing = |what: &str| Error::new(ErrorKind::Unavailable, format!("no CUDA driver: {what}"));
        // SAFETY: see the safety argument.
        if !unsafe { sys::is_culib_present() } {
            return Err(missing("no library can be opened"));
        }
        // SAFETY: as above.
        let library = unsafe { sys::culib() };
        // SAFETY: as above.
        let has = |name: &str| unsafe { library.get::<*const ()>(name.as_bytes()) }.is_ok();
        if let Some(symbol) = FUNCTIONS.iter().find(|name| !has(name)) {
            return Err(missing(&format!("it lacks {symbol}")));
        }
        Ok(Self { simulated: has("fakecuda_live"), measures: has("cuEventElapsedTime_v2") })
    }
}

/// Returns the error of a `call` that the driver refused.
pub fn refused(call: &str) -> impl FnOnce(DriverError) -> Error {
    move |error| {
        let said = error.error_string().map_or("an unknown error".into(), |text| text.to_string_lossy());
        let code = error.0 as u32;
        Error::new(ErrorKind::Device, format!("the CUDA driver refused a call: {said} call={call} code={code}"))
    }
}
