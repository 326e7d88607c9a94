//! The functions of the CUDA driver that a training program calls. The library has a table of its own, which is not for others;
//! a symbol that is absent is an error here, too, where the well-known bindings panic.
//!
//! # Safety argument
//! The signatures are those of `cuda.h` for the symbols named, which the driver keeps stable; the library is never unloaded.
#![expect(unsafe_code, reason = "symbols of a C library; argument above")]

use ashore::{Error, ErrorKind, Result};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// A `CUcontext`, `CUstream`, `CUevent`, `CUgraph`, `CUfunction`: opaque, and harmless as a number.
pub type Handle = usize;
/// An address of a device.
pub type Address = u64;

macro_rules! table {
    ($($name:ident($($argument:ty),* $(,)?);)*) => {
        /// The functions, by their names in `cuda.h`.
        #[expect(non_snake_case, reason = "the driver's names")]
        // SAFETY: types of pointers, which promise nothing and do nothing.
        pub struct Table { $(pub $name: unsafe extern "C" fn($($argument),*) -> c_int,)* }

        impl Table {
            /// # Safety
            /// `library` is a CUDA driver.
            unsafe fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self { $(
                    // SAFETY: the caller says that it is a driver; the signature is that of `cuda.h`.
                    $name: unsafe {
                        *library.get(concat!(stringify!($name), "\0").as_bytes()).map_err(|_| stringify!($name))?
                    },
                )* })
            }
        }
    };
}

table! {
    cuInit(c_uint);
    cuGetErrorString(c_int, *mut *const c_char);
    cuDeviceGet(*mut c_int, c_int);
    cuDeviceGetAttribute(*mut c_int, c_int, c_int);
    cuDevicePrimaryCtxRetain(*mut Handle, c_int);
    cuCtxSetCurrent(Handle);
    cuCtxSynchronize();
    cuMemAlloc_v2(*mut Address, usize);
    cuMemFree_v2(Address);
    cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
    cuMemFreeHost(*mut c_void);
    cuMemHostRegister_v2(*mut c_void, usize, c_uint);
    cuMemHostUnregister(*mut c_void);
    cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, Handle);
    cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, Handle);
    cuMemcpyDtoDAsync_v2(Address, Address, usize, Handle);
    cuMemsetD8Async(Address, u8, usize, Handle);
    cuStreamCreate(*mut Handle, c_uint);
    cuStreamDestroy_v2(Handle);
    cuStreamSynchronize(Handle);
    cuStreamBeginCapture_v2(Handle, c_uint);
    cuStreamEndCapture(Handle, *mut Handle);
    cuGraphInstantiateWithFlags(*mut Handle, Handle, u64);
    cuGraphLaunch(Handle, Handle);
    cuGraphDestroy(Handle);
    cuGraphExecDestroy(Handle);
    cuEventCreate(*mut Handle, c_uint);
    cuEventDestroy_v2(Handle);
    cuEventRecord(Handle, Handle);
    cuEventSynchronize(Handle);
    cuEventElapsedTime(*mut f32, Handle, Handle);
    cuModuleLoadData(*mut Handle, *const c_char);
    cuModuleGetFunction(*mut Handle, Handle, *const c_char);
    cuLaunchKernel(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *const *const c_void, *const *const c_void,
    );
}

/// The driver of this machine, or what stands in for it in tests.
pub struct Driver {
    pub table: Table,
    /// No time that is measured on it means anything.
    pub simulated: bool,
}

impl Driver {
    /// The driver that the system's loader finds.
    ///
    /// # Errors
    /// `Unavailable`, naming what is missing.
    pub fn find() -> Result<Self> {
        const NAME: &str = "libcuda.so.1";
        let missing = |what: &str| Error::new(ErrorKind::Unavailable, format!("no CUDA driver: {what} library={NAME}"));
        // SAFETY: the file is the system's driver by its name, whose initialisers any program may run.
        let library = unsafe { libloading::Library::new(NAME) };
        let library = std::mem::ManuallyDrop::new(library.map_err(|e| missing("it cannot be opened").with_source(e))?);
        // SAFETY: as above.
        let table = unsafe { Table::find(&library) };
        let table = table.map_err(|symbol| missing(&format!("it lacks {symbol}")))?;
        // SAFETY: only asked for, never called.
        let simulated = unsafe { library.get::<Handle>(b"fakecuda_live\0") }.is_ok();
        let driver = Self { table, simulated };
        // SAFETY: a reserved zero.
        driver.check("cuInit", unsafe { (driver.table.cuInit)(0) })?;
        Ok(driver)
    }

    /// Judges a result code.
    ///
    /// # Errors
    /// `Device`, with the call and what the driver says.
    pub fn check(&self, call: &str, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        let mut text = std::ptr::null();
        // SAFETY: writes one pointer, to a string that stays, or null for a code that it does not know.
        let known = unsafe { (self.table.cuGetErrorString)(code, &mut text) } == 0 && !text.is_null();
        // SAFETY: as above.
        let said = if known { unsafe { CStr::from_ptr(text) }.to_string_lossy() } else { "an unknown error".into() };
        Err(Error::new(ErrorKind::Device, format!("the CUDA driver refused a call: {said} call={call} code={code}")))
    }
}

/// Calls the driver and judges what it returns. Unsafe, as the functions are.
macro_rules! call {
    ($gpu:expr, $name:ident($($argument:expr),* $(,)?)) => {
        $gpu.driver.check(stringify!($name), ($gpu.driver.table.$name)($($argument),*))
    };
}
pub(super) use call;
