//! The list of driver functions that this crate uses, and the table of the functions that a library has.
//!
//! `proof` compares each function with the bindings of cudarc when the tests are compiled.
//!
//! # Safety argument
//! See the module above: the signatures are those of `cuda.h`.
#![expect(unsafe_code, reason = "symbols of a C library; argument above")]

use super::handles::{Address, ContextHandle, EventHandle, FunctionHandle, ModuleHandle, StreamHandle};
use super::rows::RowCopy;
use std::ffi::{c_char, c_int, c_uint, c_void};

/// Passes the functions, with their names in `cuda.h`, to the macro `$with`. An older driver may lack the
/// functions that are marked with a question mark.
macro_rules! functions {
    ($with:ident) => {
        $with! {
                init = cuInit(c_uint);
                version = cuDriverGetVersion(*mut c_int);
                device_count = cuDeviceGetCount(*mut c_int);
                device_get = cuDeviceGet(*mut c_int, c_int);
                device_name = cuDeviceGetName(*mut c_char, c_int, c_int);
                device_pci_id = cuDeviceGetPCIBusId(*mut c_char, c_int, c_int);
                retain = cuDevicePrimaryCtxRetain(*mut ContextHandle, c_int);
                get_current = cuCtxGetCurrent(*mut ContextHandle);
                current_device = cuCtxGetDevice(*mut c_int);
                set_current = cuCtxSetCurrent(ContextHandle);
                priorities = cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int);
                exchange_capture = cuThreadExchangeStreamCaptureMode(*mut c_uint);
                stream_create = cuStreamCreateWithPriority(*mut StreamHandle, c_uint, c_int);
                stream_destroy = cuStreamDestroy_v2(StreamHandle);
                stream_query = cuStreamQuery(StreamHandle);
                stream_wait = cuStreamWaitEvent(StreamHandle, EventHandle, c_uint);
                stream_capturing = cuStreamIsCapturing(StreamHandle, *mut c_uint);
                event_create = cuEventCreate(*mut EventHandle, c_uint);
                event_destroy = cuEventDestroy_v2(EventHandle);
                event_record = cuEventRecord(EventHandle, StreamHandle);
                event_query = cuEventQuery(EventHandle);
                event_elapsed = cuEventElapsedTime(*mut f32, EventHandle, EventHandle);
                register = cuMemHostRegister_v2(*mut c_void, usize, c_uint);
                unregister = cuMemHostUnregister(*mut c_void);
                to_host = cuMemcpyDtoHAsync_v2(*mut c_void, Address, usize, StreamHandle);
                to_device = cuMemcpyHtoDAsync_v2(Address, *const c_void, usize, StreamHandle);
                rows_to_device = cuMemcpy2DAsync_v2(*const RowCopy, StreamHandle);
                allocate = cuMemAlloc_v2(*mut Address, usize);
                free = cuMemFree_v2(Address);
                allocate_host = cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
                free_host = cuMemFreeHost(*mut c_void);
                fill = cuMemsetD8Async(Address, u8, usize, StreamHandle);
                module_load = cuModuleLoadData(*mut ModuleHandle, *const c_void);
                module_unload = cuModuleUnload(ModuleHandle);
                module_function = cuModuleGetFunction(*mut FunctionHandle, ModuleHandle, *const c_char);
                launch = cuLaunchKernel(
                    FunctionHandle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, StreamHandle, *mut *mut c_void,
                    *mut *mut c_void
                );
                ? write_value = cuStreamWriteValue64_v2(StreamHandle, Address, u64, c_uint);
                ? wait_number = cuStreamWaitValue32_v2(StreamHandle, Address, u32, c_uint);
                ? write_number = cuStreamWriteValue32_v2(StreamHandle, Address, u32, c_uint);
        }
    };
}

macro_rules! table {
    (
        $($name:ident = $symbol:ident($($argument:ty),* $(,)?);)*
        $(? $extra:ident = $extra_symbol:ident($($extra_argument:ty),* $(,)?);)*
    ) => {
        /// The functions of one driver library.
        pub struct Table {
            // SAFETY: a pointer type; nothing is called.
            $(pub $name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            // SAFETY: as above.
            $(pub $extra: Option<unsafe extern "C" fn($($extra_argument),*) -> c_int>,)*
        }

        impl Table {
            /// Looks up every symbol once. The error is the name of a missing one.
            ///
            /// # Safety
            /// `library` is a CUDA driver.
            pub unsafe fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self {
                    $(
                        // SAFETY: the caller vouches that it is a driver; the signature is that of `cuda.h`.
                        $name: unsafe {
                            let symbol = concat!(stringify!($symbol), "\0");
                            *library.get(symbol.as_bytes()).map_err(|_| stringify!($symbol))?
                        },
                    )*
                    $(
                        // SAFETY: as above.
                        $extra: unsafe {
                            let symbol = concat!(stringify!($extra_symbol), "\0");
                            library.get(symbol.as_bytes()).ok().map(|found| *found)
                        },
                    )*
                })
            }
        }
    };
}
functions!(table);

#[cfg(all(test, not(any(loom, miri))))]
pub(super) use functions;
