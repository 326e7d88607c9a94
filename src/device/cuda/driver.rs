//! The CUDA driver, found at run time. Nobody outside this folder calls it: here is its table of functions, in `context` what is
//! asked of a device, in `owned` what it lends, in `batch` a function that a driver may lack.
//!
//! A library that is absent, a symbol that it lacks, a driver without a device: each is an error that names it, never a panic.
//! A result code is a plain number, because a newer driver may return ones that nobody here knows.
//!
//! **Failure.** A code after which a context is lost is sticky: from then on every call on that context fails
//! with the same error and the driver is not called any more, not even to give things back. A context also
//! counts as lost when the driver refuses to say how far work is, and does not stop refusing. **Exit, fork.**
//! A driver that the end of the process has taken down already is no error for whoever gives something back;
//! a forked child never calls it.
//!
//! # Safety argument
//! The signatures are those of `cuda.h` for the symbols named, which the driver keeps stable, and the library is never unloaded.
//! Handles are made here and destroyed once, by the owner that wraps them. Pointers to results are to locals of the call. What
//! a call reads or writes later, in stream order, is what the caller of an `unsafe fn` vouches for.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

mod batch;
mod context;
mod owned;

pub(super) use batch::Copies;
pub(super) use context::Context;
pub(super) use owned::{Event, Memory, Module, Registered, Stream};

use crate::error::{Error, ErrorKind, Result};
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::Arc;

/// A `CUstream`, `CUevent`, `CUcontext`, `CUfunction`: opaque, and harmless as a number.
type Handle = usize;
/// An address of a device.
pub(super) type Address = u64;

/// Codes that mean something here; any other is only a number.
mod code {
    pub const SUCCESS: i32 = 0;
    pub const DEINITIALIZED: i32 = 4;
    pub const STUB: i32 = 34;
    pub const NO_DEVICE: i32 = 100;
    pub const NOT_READY: i32 = 600;
    /// Errors of stream capture lie together.
    pub const CAPTURE: std::ops::RangeInclusive<i32> = 900..=908;
    pub const INVALID_CONTEXT: i32 = 201;
    pub const INVALID_HANDLE: i32 = 400;
    /// After these nothing on the context works any more, whatever was called. Other errors may pass; what is
    /// made of those that do not is in `context`.
    pub const STICKY: [i32; 21] = [
        DEINITIALIZED,
        46,
        214,
        220,
        226,
        700,
        702,
        709,
        710,
        714,
        715,
        716,
        717,
        718,
        719,
        721,
        805,
        806,
        810,
        911,
        999,
    ];
    pub const NAMES: [(i32, &str); 26] = [
        (1, "invalid value"),
        (2, "out of memory"),
        (3, "not initialized"),
        (DEINITIALIZED, "deinitialized"),
        (STUB, "the library is the stub of a toolkit, not a driver"),
        (46, "device unavailable"),
        (NO_DEVICE, "no device"),
        (101, "invalid device"),
        (200, "invalid image"),
        (INVALID_CONTEXT, "invalid context"),
        (214, "uncorrectable memory error"),
        (218, "invalid kernel text"),
        (222, "kernel text of a newer toolkit"),
        (INVALID_HANDLE, "invalid handle"),
        (700, "illegal address"),
        (702, "launch timeout"),
        (709, "the context was destroyed"),
        (712, "host memory registered already"),
        (719, "launch failed"),
        (803, "driver and library do not fit"),
        (805, "no connection to the server of MPS"),
        (806, "a call of the server of MPS failed"),
        (809, "the server of MPS has no connections left"),
        (810, "ended by the server of MPS"),
        (911, "an error of a device outside CUDA"),
        (999, "unknown"),
    ];
}

macro_rules! table {
    (
        $($name:ident = $symbol:literal ($($argument:ty),* $(,)?);)*
        $(? $extra:ident = $extra_symbol:literal ($($extra_argument:ty),* $(,)?);)*
    ) => {
        /// The functions of the library; those with a question mark it may lack.
        struct Table {
            // SAFETY: types of pointers, which promise nothing and do nothing.
            $($name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            // SAFETY: as above.
            $($extra: Option<unsafe extern "C" fn($($extra_argument),*) -> c_int>,)*
        }

        impl Table {
            /// Looks every symbol up, once.
            ///
            /// # Safety
            /// `library` is a CUDA driver.
            unsafe fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $(
                        // SAFETY: the caller says that it is a driver; the signature is that of `cuda.h`.
                        $name: unsafe { *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| $symbol)? },
                    )*
                    $(
                        // SAFETY: as above.
                        $extra: unsafe { library.get(concat!($extra_symbol, "\0").as_bytes()).ok().map(|found| *found) },
                    )*
                })
            }
        }
    };
}

table! {
    init = "cuInit"(c_uint);
    version = "cuDriverGetVersion"(*mut c_int);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    device_pci_id = "cuDeviceGetPCIBusId"(*mut c_char, c_int, c_int);
    retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    get_current = "cuCtxGetCurrent"(*mut Handle);
    set_current = "cuCtxSetCurrent"(Handle);
    priorities = "cuCtxGetStreamPriorityRange"(*mut c_int, *mut c_int);
    exchange_capture = "cuThreadExchangeStreamCaptureMode"(*mut c_uint);
    stream_create = "cuStreamCreateWithPriority"(*mut Handle, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2"(Handle);
    stream_query = "cuStreamQuery"(Handle);
    stream_wait = "cuStreamWaitEvent"(Handle, Handle, c_uint);
    stream_capturing = "cuStreamIsCapturing"(Handle, *mut c_uint);
    event_create = "cuEventCreate"(*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2"(Handle);
    event_record = "cuEventRecord"(Handle, Handle);
    event_query = "cuEventQuery"(Handle);
    register = "cuMemHostRegister_v2"(*mut c_void, usize, c_uint);
    unregister = "cuMemHostUnregister"(*mut c_void);
    to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, Address, usize, Handle);
    to_device = "cuMemcpyHtoDAsync_v2"(Address, *const c_void, usize, Handle);
    allocate = "cuMemAlloc_v2"(*mut Address, usize);
    free = "cuMemFree_v2"(Address);
    allocate_host = "cuMemHostAlloc"(*mut Address, usize, c_uint);
    free_host = "cuMemFreeHost"(Address);
    fill = "cuMemsetD8Async"(Address, u8, usize, Handle);
    module_load = "cuModuleLoadData"(*mut Handle, *const c_char);
    module_unload = "cuModuleUnload"(Handle);
    module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    launch = "cuLaunchKernel"(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *const *const c_void, *const *const c_void
    );
    ? write_value = "cuStreamWriteValue64_v2"(Handle, Address, u64, c_uint);
    ? wait_number = "cuStreamWaitValue32_v2"(Handle, Address, u32, c_uint);
    ? write_number = "cuStreamWriteValue32_v2"(Handle, Address, u32, c_uint);
}

/// The driver of this machine.
pub(super) struct Driver {
    table: Table,
    batch: Option<batch::Batch>,
    version: i32,
}

impl Driver {
    /// The driver that the system's loader finds.
    ///
    /// # Errors
    /// `Unavailable`, naming what is missing.
    pub fn find() -> Result<Arc<Self>> {
        let mut missing = None;
        // The first is the driver's own name; toolkits carry stubs under the second.
        for name in ["libcuda.so.1", "libcuda.so"] {
            match Self::open(Path::new(name)) {
                Err(error) if error.kind() == ErrorKind::NotFound => missing = missing.or(Some(error)),
                found => return found,
            }
        }
        let missing = missing.unwrap_or_else(|| Error::internal("no library was looked for"));
        Err(missing.with_kind(ErrorKind::Unavailable))
    }

    /// The driver in the library `path`.
    ///
    /// # Errors
    /// `NotFound` when it cannot be loaded; `Unavailable`, naming what is missing, when it is no driver that works.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let named = || format!("library={path:?}");
        // SAFETY: a driver's initialisers are meant to be run by any program; the caller named a driver.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
            Error::new(ErrorKind::NotFound, format!("no CUDA driver is installed {}", named())).with_source(error)
        })?;
        // Never unloaded: drivers have threads.
        let library = std::mem::ManuallyDrop::new(library);
        // SAFETY: the library was named as that of a driver.
        let table = unsafe { Table::find(&library) };
        let unavailable = |why: String| Error::new(ErrorKind::Unavailable, why);
        let table = table
            .map_err(|symbol| unavailable(format!("the CUDA driver is too old or none symbol={symbol} {}", named())))?;
        // SAFETY: as above.
        let batch = unsafe { batch::Batch::find(&library) };
        let mut driver = Self { table, batch, version: 0 };
        // SAFETY: no arguments but a reserved zero.
        driver.start("cuInit", unsafe { (driver.table.init)(0) })?;
        let mut version = 0;
        // SAFETY: writes one number.
        driver.start("cuDriverGetVersion", unsafe { (driver.table.version)(&mut version) })?;
        driver.version = version;
        if driver.devices()? == 0 {
            return Err(unavailable("the CUDA driver has no device".into()));
        }
        Ok(Arc::new(driver))
    }

    /// How many devices there are.
    pub fn devices(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one number.
        self.start("cuDeviceGetCount", unsafe { (self.table.device_count)(&mut count) })?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The version of CUDA that it speaks: 12040 is 12.4.
    pub fn version(&self) -> i32 {
        self.version
    }

    fn start(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == code::SUCCESS { Ok(()) } else { Err(refused(call, code).with_kind(ErrorKind::Unavailable)) }
    }
}

/// The error for a function that an older driver lacks.
fn absent(symbol: &str) -> Error {
    Error::new(ErrorKind::Unavailable, format!("the CUDA driver is too old symbol={symbol}"))
}

/// The error of a call that returned `code`.
fn refused(call: &str, code: c_int) -> Error {
    if code::CAPTURE.contains(&code) {
        return Error::invalid(format!("a stream is being captured into a graph call={call} code={code}"));
    }
    let name = code::NAMES.iter().find(|(known, _)| *known == code).map_or("unnamed", |(_, name)| name);
    Error::new(ErrorKind::Device, format!("the CUDA driver refused: {name} call={call} code={code}"))
}
