//! Result codes of the driver's functions, and flags that they take.

use crate::error::{Error, ErrorKind};
use std::ffi::c_int;

pub const SUCCESS: c_int = 0;
pub const NOT_READY: c_int = 600;
pub const INVALID_CONTEXT: c_int = 201;
pub const INVALID_HANDLE: c_int = 400;
/// The contiguous range of errors of stream capture.
pub const CAPTURE: std::ops::RangeInclusive<c_int> = 900..=908;

/// Passes the known errors, by their names in `cuda.h`, to the macro `$with`. After a sticky error every call
/// on the context fails. Other errors may pass; `context` handles those that do not pass.
macro_rules! errors {
    ($with:ident) => {
        $with! {
            CUDA_ERROR_INVALID_VALUE = 1, passes, "invalid value";
            CUDA_ERROR_OUT_OF_MEMORY = 2, passes, "out of memory";
            CUDA_ERROR_NOT_INITIALIZED = 3, passes, "not initialized";
            CUDA_ERROR_DEINITIALIZED = 4, sticky, "deinitialized";
            CUDA_ERROR_STUB_LIBRARY = 34, passes, "the library is the stub of a toolkit, not a driver";
            CUDA_ERROR_DEVICE_UNAVAILABLE = 46, sticky, "device unavailable";
            CUDA_ERROR_NO_DEVICE = 100, passes, "no device";
            CUDA_ERROR_INVALID_DEVICE = 101, passes, "invalid device";
            CUDA_ERROR_INVALID_IMAGE = 200, passes, "invalid image";
            CUDA_ERROR_INVALID_CONTEXT = 201, passes, "invalid context";
            CUDA_ERROR_ECC_UNCORRECTABLE = 214, sticky, "uncorrectable memory error";
            CUDA_ERROR_INVALID_PTX = 218, passes, "invalid kernel text";
            CUDA_ERROR_NVLINK_UNCORRECTABLE = 220, sticky, "uncorrectable error of NVLink";
            CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222, passes, "kernel text of a newer toolkit";
            CUDA_ERROR_CONTAINED = 226, sticky, "contained memory error";
            CUDA_ERROR_INVALID_HANDLE = 400, passes, "invalid handle";
            CUDA_ERROR_ILLEGAL_ADDRESS = 700, sticky, "illegal address";
            CUDA_ERROR_LAUNCH_TIMEOUT = 702, sticky, "launch timeout";
            CUDA_ERROR_CONTEXT_IS_DESTROYED = 709, sticky, "the context was destroyed";
            CUDA_ERROR_ASSERT = 710, sticky, "an assertion in a kernel failed";
            CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED = 712, passes, "host memory registered already";
            CUDA_ERROR_HARDWARE_STACK_ERROR = 714, sticky, "hardware stack error";
            CUDA_ERROR_ILLEGAL_INSTRUCTION = 715, sticky, "illegal instruction";
            CUDA_ERROR_MISALIGNED_ADDRESS = 716, sticky, "misaligned address";
            CUDA_ERROR_INVALID_ADDRESS_SPACE = 717, sticky, "invalid address space";
            CUDA_ERROR_INVALID_PC = 718, sticky, "invalid program counter";
            CUDA_ERROR_LAUNCH_FAILED = 719, sticky, "launch failed";
            CUDA_ERROR_TENSOR_MEMORY_LEAK = 721, sticky, "tensor memory leak";
            CUDA_ERROR_SYSTEM_DRIVER_MISMATCH = 803, passes, "driver and library do not fit";
            CUDA_ERROR_MPS_CONNECTION_FAILED = 805, sticky, "no connection to the server of MPS";
            CUDA_ERROR_MPS_RPC_FAILURE = 806, sticky, "a call of the server of MPS failed";
            CUDA_ERROR_MPS_MAX_CONNECTIONS_REACHED = 809, passes, "the server of MPS has no connections left";
            CUDA_ERROR_MPS_CLIENT_TERMINATED = 810, sticky, "ended by the server of MPS";
            CUDA_ERROR_EXTERNAL_DEVICE = 911, sticky, "an error of a device outside CUDA";
            CUDA_ERROR_UNKNOWN = 999, sticky, "unknown";
        }
    };
}

struct Known {
    code: c_int,
    sticky: bool,
    text: &'static str,
}

macro_rules! known {
    (@sticky passes) => { false };
    (@sticky sticky) => { true };
    ($($name:ident = $code:literal, $fate:ident, $text:literal;)*) => {
        const KNOWN: &[Known] = &[$(Known { code: $code, sticky: known!(@sticky $fate), text: $text }),*];
    };
}
errors!(known);

#[cfg(all(test, not(any(loom, miri))))]
pub(super) use errors;

/// True for a code after which the context is lost.
pub fn is_sticky(code: c_int) -> bool {
    KNOWN.iter().any(|known| known.sticky && known.code == code)
}

/// Makes the error of a call that returned `code`.
pub fn refused(call: &str, code: c_int) -> Error {
    if CAPTURE.contains(&code) {
        return Error::invalid(format!("a stream is being captured into a graph call={call} code={code}"));
    }
    let text = KNOWN.iter().find(|known| known.code == code).map_or("unnamed", |known| known.text);
    Error::new(ErrorKind::Device, format!("the CUDA driver refused: {text} call={call} code={code}"))
}

/// Makes the error for a function that an older driver lacks.
pub fn absent(symbol: &str) -> Error {
    Error::new(ErrorKind::Unavailable, format!("the CUDA driver is too old symbol={symbol}"))
}

pub mod flag {
    use std::ffi::c_uint;

    /// A stream that does not wait for the legacy default stream.
    pub const STREAM_NON_BLOCKING: c_uint = 1;
    /// An event that remembers when it was reached.
    pub const EVENT_DEFAULT: c_uint = 0;
    pub const EVENT_DISABLE_TIMING: c_uint = 2;
    /// The mode in which a thread may make calls that would break another thread's capture.
    pub const CAPTURE_RELAXED: c_uint = 2;
    pub const NOT_CAPTURING: c_uint = 0;
    /// Host memory that is pinned for all contexts, at one address for host and device.
    pub const HOST_PORTABLE_MAPPED: c_uint = 3;
    pub const REGISTER_PORTABLE: c_uint = 1;
    pub const WRITE_DEFAULT: c_uint = 0;
    pub const WAIT_AT_LEAST: c_uint = 0;
    /// Each copy of a batch reads its source in stream order.
    pub const COPY_IN_STREAM_ORDER: c_uint = 1;
    pub const MEMORY_HOST: c_uint = 1;
    pub const MEMORY_DEVICE: c_uint = 2;
    pub const COPY_DEFAULT: c_uint = 0;
    pub const COPY_PREFER_OVERLAP_WITH_COMPUTE: c_uint = 1;
}
