//! Whether cudarc can be asked: it panics where it finds no driver, or where the driver lacks a function.
//!
//! The bindings are those of the newest CUDA that cudarc knows. A driver that returns a code that even they do not know would be
//! undefined behaviour in them, which is why the library calls it through a table of its own.
//!
//! # Safety argument
//! The library that is opened is the system's driver by its name, whose initialisers any program may run; symbols are only asked
//! for.
#![expect(unsafe_code, reason = "opens a C library; argument above")]

use ashore::{Error, ErrorKind, Result};
use cudarc::driver::{DriverError, sys};

/// What cudarc calls for this program.
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

/// What the driver that cudarc has found can do.
pub struct Driver {
    /// It stands in for one in tests: no time that is measured on it means anything.
    pub simulated: bool,
    /// It can say how long a stream took, as those from CUDA 12.8 on can in the way that cudarc asks.
    pub measures: bool,
}

impl Driver {
    /// Asks for everything that cudarc will call.
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

/// The error of a `call` that the driver refused.
pub fn refused(call: &str) -> impl FnOnce(DriverError) -> Error {
    move |error| {
        let said = error.error_string().map_or("an unknown error".into(), |text| text.to_string_lossy());
        let code = error.0 as u32;
        Error::new(ErrorKind::Device, format!("the CUDA driver refused a call: {said} call={call} code={code}"))
    }
}
