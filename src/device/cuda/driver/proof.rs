//! Compares the driver's functions, codes, flags and structures with the bindings that cudarc generated from
//! `cuda.h`.
//!
//! The compiler does the whole comparison: the tests do not compile if the two differ. The feature
//! `cuda-13040` of cudarc in the dev-dependencies selects the `cuda.h`. Programs that link the library choose
//! their own.
//!
//! A signature is right when it has the same number of arguments and each argument has the same size; when
//! its pointers point to values of the same size and are `const` in both or in neither; and when its handles
//! are of the same kind.
//!
//! # Safety argument
//! Nothing is called: the functions are only cast to their types.

use super::batch::{Attributes, Plain, WithIndex};
use super::codes::{self, errors, flag};
use super::functions::functions;
use super::handles::{Address, ContextHandle, EventHandle, FunctionHandle, ModuleHandle, StreamHandle};
use super::rows::RowCopy;
use cudarc::driver::sys;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::mem::offset_of;

/// The compared properties of a type.
#[derive(Clone, Copy)]
struct Shape {
    bytes: usize,
    /// The kind of handle, if it is one.
    handle: Option<Kind>,
    /// For a pointer that is not a handle: the size and handle kind of its target, and whether the target is
    /// writable.
    to: Option<(usize, Option<Kind>, bool)>,
}

/// The kinds of handles.
#[derive(Clone, Copy)]
enum Kind {
    Context,
    Stream,
    Event,
    Module,
    Function,
}

const fn same_kind(ours: Option<Kind>, theirs: Option<Kind>) -> bool {
    match (ours, theirs) {
        (Some(ours), Some(theirs)) => ours as u8 == theirs as u8,
        (None, None) => true,
        _ => false,
    }
}

impl Shape {
    const fn is(self, theirs: Self) -> bool {
        let leads_to_the_same = match (self.to, theirs.to) {
            (Some(ours), Some(theirs)) => ours.0 == theirs.0 && same_kind(ours.1, theirs.1) && ours.2 == theirs.2,
            (None, None) => true,
            _ => false,
        };
        self.bytes == theirs.bytes && same_kind(self.handle, theirs.handle) && leads_to_the_same
    }
}

/// An argument type, or the type that an argument points to.
trait Argument: Sized {
    const HANDLE: Option<Kind> = None;
    const SHAPE: Shape = Shape { bytes: size_of::<Self>(), handle: Self::HANDLE, to: None };
    /// The kind of handle that a pointer to this type is, if any.
    const POINTED_AT: Option<Kind> = None;
}

impl<T: Argument> Argument for *mut T {
    const HANDLE: Option<Kind> = T::POINTED_AT;
    const SHAPE: Shape = pointer::<T>(true);
}

impl<T: Argument> Argument for *const T {
    const SHAPE: Shape = pointer::<T>(false);
}

const fn pointer<T: Argument>(writes: bool) -> Shape {
    let to = if T::POINTED_AT.is_some() { None } else { Some((size_of::<T>(), T::HANDLE, writes)) };
    Shape { bytes: size_of::<*mut T>(), handle: T::POINTED_AT, to }
}

macro_rules! arguments {
    ($($plain:ty),*; $($ours:ty = $theirs:ty: $kind:ident),*) => {
        $(impl Argument for $plain {})*
        $(
            impl Argument for $ours {
                const HANDLE: Option<Kind> = Some(Kind::$kind);
            }
            impl Argument for $theirs {
                const POINTED_AT: Option<Kind> = Some(Kind::$kind);
            }
        )*
    };
}
arguments! {
    c_int, c_uint, c_char, c_void, f32, u8, u64, usize, Attributes, RowCopy, sys::CUmemcpyAttributes, sys::CUDA_MEMCPY2D, sys::CUstreamCaptureMode,
    sys::CUstreamCaptureStatus;
    ContextHandle = sys::CUctx_st: Context, StreamHandle = sys::CUstream_st: Stream, EventHandle = sys::CUevent_st: Event,
    ModuleHandle = sys::CUmod_st: Module, FunctionHandle = sys::CUfunc_st: Function
}

/// A pointer to a function, of this crate or of cudarc.
trait Signature {
    const ARGUMENTS: &'static [Shape];
    const RESULT: usize;
}

macro_rules! signatures {
    ($([$($argument:ident)*])*) => { $(
        // SAFETY: a pointer type; nothing is called.
        impl<$($argument: Argument,)* R> Signature for unsafe extern "C" fn($($argument),*) -> R {
            const ARGUMENTS: &'static [Shape] = &[$($argument::SHAPE),*];
            const RESULT: usize = size_of::<R>();
        }
        // SAFETY: as above.
        impl<$($argument: Argument,)* R> Signature for unsafe fn($($argument),*) -> R {
            const ARGUMENTS: &'static [Shape] = &[$($argument::SHAPE),*];
            const RESULT: usize = size_of::<R>();
        }
    )* };
}
signatures! {
    [A] [A B] [A B C] [A B C D] [A B C D E] [A B C D E F G H] [A B C D E F G H I] [A B C D E F G H I J K]
}

const fn agree<Ours: Signature, Theirs: Signature>() -> bool {
    let (ours, theirs) = (Ours::ARGUMENTS, Theirs::ARGUMENTS);
    let mut at = 0;
    while at < ours.len() && at < theirs.len() && ours[at].is(theirs[at]) {
        at += 1;
    }
    at == ours.len() && at == theirs.len() && Ours::RESULT == Theirs::RESULT
}

/// Like [`agree`], for a function of cudarc, which is not `extern "C"` but calls such a function.
const fn agree_with<Ours: Signature, Theirs: Signature + Copy>(_theirs: Theirs) -> bool {
    agree::<Ours, Theirs>()
}

macro_rules! infer {
    ($argument:ty) => {
        _
    };
}

macro_rules! prove {
    (
        $($name:ident = $symbol:ident($($argument:ty),* $(,)?);)*
        $(? $extra:ident = $extra_symbol:ident($($extra_argument:ty),* $(,)?);)*
    ) => {
        $(prove!(@ $symbol($($argument),*));)*
        $(prove!(@ $extra_symbol($($extra_argument),*));)*
    };
    // `cuda.h` has this name from CUDA 13 on. This crate uses the older name, which all drivers have.
    (@ cuEventElapsedTime($($argument:ty),*)) => { prove!(@ cuEventElapsedTime_v2($($argument),*)); };
    (@ $symbol:ident($($argument:ty),*)) => {
        const _: () = {
            // SAFETY: a type: it promises nothing and does nothing.
            type Ours = unsafe extern "C" fn($($argument),*) -> c_int;
            // SAFETY: as above.
            let theirs = sys::$symbol as unsafe fn($(infer!($argument)),*) -> _;
            assert!(agree_with::<Ours, _>(theirs), concat!("the signature of ", stringify!($symbol), " is not that of cuda.h"));
        };
    };
}
functions!(prove);

/// `cuMemcpyBatchAsync` as CUDA 12.8 and 12.9 have it: the function of CUDA 13, with the index of a wrong
/// copy before the stream. It is written out here because cudarc is built for one CUDA version and has this
/// form only in its bindings for 12.8 and 12.9.
// SAFETY: a type: it promises nothing and does nothing.
type Batch12 = unsafe extern "C" fn(
    *mut sys::CUdeviceptr,
    *mut sys::CUdeviceptr,
    *mut usize,
    usize,
    *mut sys::CUmemcpyAttributes,
    *mut usize,
    usize,
    *mut usize,
    sys::CUstream,
) -> sys::CUresult;

const _: () = {
    let batch = sys::cuMemcpyBatchAsync_v2 as unsafe fn(_, _, _, _, _, _, _, _) -> _;
    assert!(agree_with::<Plain, _>(batch), "the signature of cuMemcpyBatchAsync_v2 is not that of cuda.h");
    assert!(agree::<WithIndex, Batch12>(), "the signature of cuMemcpyBatchAsync is not that of cuda.h");
};

const _: () = {
    type Theirs = sys::CUmemcpyAttributes;
    assert!(size_of::<Attributes>() == size_of::<Theirs>() && align_of::<Attributes>() == align_of::<Theirs>());
    assert!(offset_of!(Attributes, order) == offset_of!(Theirs, srcAccessOrder));
    assert!(offset_of!(Attributes, hints) == offset_of!(Theirs, srcLocHint));
    assert!(offset_of!(Attributes, flags) == offset_of!(Theirs, flags));
};

macro_rules! same_fields {
    ($($ours:ident$(.$field:ident)? = $theirs:ident,)*) => {
        const _: () = {
            assert!(size_of::<RowCopy>() == size_of::<sys::CUDA_MEMCPY2D>());
            $(assert!(offset_of!(RowCopy, $ours$(.$field)?) == offset_of!(sys::CUDA_MEMCPY2D, $theirs), stringify!($theirs));)*
        };
    };
}
same_fields! {
    from.x = srcXInBytes, from.y = srcY, from.kind = srcMemoryType, from.host = srcHost, from.device = srcDevice,
    from.array = srcArray, from.pitch = srcPitch, to.x = dstXInBytes, to.y = dstY, to.kind = dstMemoryType,
    to.host = dstHost, to.device = dstDevice, to.array = dstArray, to.pitch = dstPitch, width = WidthInBytes,
    height = Height,
}

macro_rules! equal {
    ($($ours:expr, $theirs:expr;)*) => { $(
        const _: () = assert!($ours as i64 == $theirs as i64, concat!(stringify!($theirs), " is another number"));
    )* };
}

macro_rules! same_codes {
    ($($name:ident = $code:literal, $fate:ident, $text:literal;)*) => { equal! { $($code, sys::CUresult::$name;)* } };
}
errors!(same_codes);

equal! {
    codes::SUCCESS, sys::CUresult::CUDA_SUCCESS;
    codes::NOT_READY, sys::CUresult::CUDA_ERROR_NOT_READY;
    codes::INVALID_CONTEXT, sys::CUresult::CUDA_ERROR_INVALID_CONTEXT;
    codes::INVALID_HANDLE, sys::CUresult::CUDA_ERROR_INVALID_HANDLE;
    *codes::CAPTURE.start(), sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    *codes::CAPTURE.end(), sys::CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
    flag::STREAM_NON_BLOCKING, sys::CUstream_flags::CU_STREAM_NON_BLOCKING;
    flag::EVENT_DEFAULT, sys::CUevent_flags::CU_EVENT_DEFAULT;
    flag::EVENT_DISABLE_TIMING, sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
    flag::CAPTURE_RELAXED, sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    flag::NOT_CAPTURING, sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    flag::HOST_PORTABLE_MAPPED, sys::CU_MEMHOSTALLOC_PORTABLE | sys::CU_MEMHOSTALLOC_DEVICEMAP;
    flag::REGISTER_PORTABLE, sys::CU_MEMHOSTREGISTER_PORTABLE;
    flag::WRITE_DEFAULT, sys::CUstreamWriteValue_flags::CU_STREAM_WRITE_VALUE_DEFAULT;
    flag::WAIT_AT_LEAST, sys::CUstreamWaitValue_flags::CU_STREAM_WAIT_VALUE_GEQ;
    flag::MEMORY_HOST, sys::CUmemorytype::CU_MEMORYTYPE_HOST;
    flag::MEMORY_DEVICE, sys::CUmemorytype::CU_MEMORYTYPE_DEVICE;
    flag::COPY_IN_STREAM_ORDER, sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    flag::COPY_DEFAULT, sys::CUmemcpyFlags::CU_MEMCPY_FLAG_DEFAULT;
    flag::COPY_PREFER_OVERLAP_WITH_COMPUTE, sys::CUmemcpyFlags::CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE;
}
