//! Device memory, and host memory that the device may write.
//!
//! # Safety argument
//! A [`Span`] keeps the slice that contains it; the slice's stream frees it, after the work queued there. The
//! host waits for work on a span in another stream before the span is dropped: a [`Pinned`] keeps what it
//! copies from and to until its stream has ended, and a graph keeps its spans. The contents of a span are
//! device bytes, not Rust memory. Pinned memory is freed after the only stream that copies to and from it has
//! ended; if that is unknown, the memory stays until the process ends. References to pinned bytes exist only
//! after the stream has ended, and borrow the memory, so that nothing is queued meanwhile.
#![expect(unsafe_code, reason = "calls of a C library, and memory that it writes; argument above")]

use super::Stream;
use super::driver::refused;
use ashore::adapters::cudarc::CudaTensor;
use ashore::{Dtype, Error, ErrorKind, Result};
use cudarc::driver::{CudaSlice, DevicePtr, result, sys};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::sync::Arc;

/// Allocates `bytes` of uninitialised memory as one span, which `stream` writes and frees.
///
/// # Errors
/// `Device`, usually because there is not enough memory.
pub fn allocate(stream: &Stream, bytes: u64) -> Result<Span> {
    // SAFETY: any bytes are valid, and only the device reads them before they are written.
    let slice = unsafe { stream.inner.alloc::<u8>(bytes.max(1) as usize) }.map_err(|error| {
        let error = refused("cuMemAllocAsync")(error);
        Error::new(error.kind(), format!("{} bytes={bytes}", error.message()))
    })?;
    let (address, _) = slice.device_ptr(&stream.inner);
    Ok(Span { slice: Arc::new(slice), address, from: 0, bytes })
}

/// A part of a slice. It keeps the slice alive.
#[derive(Clone)]
pub struct Span {
    slice: Arc<CudaSlice<u8>>,
    /// The address of the slice.
    address: u64,
    from: u64,
    pub bytes: u64,
}

impl Span {
    /// Returns the `bytes` bytes from offset `from`.
    ///
    /// # Errors
    /// `Internal` when the span is too short.
    pub fn part(&self, from: u64, bytes: u64) -> Result<Self> {
        if from.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let why = format!("a part is outside its device memory from={from} bytes={bytes} of={}", self.bytes);
            return Err(Error::new(ErrorKind::Internal, why));
        }
        Ok(Self { from: self.from + from, bytes, ..self.clone() })
    }

    pub fn address(&self) -> u64 {
        self.address + self.from
    }
}

/// Returns a tensor for a save: the bytes of `span`, which the span's stream writes.
///
/// # Errors
/// Those of [`CudaTensor`].
pub fn source(span: &Span, dtype: Dtype, shape: &[usize]) -> Result<CudaTensor<Arc<CudaSlice<u8>>>> {
    let range = span.from as usize..(span.from + span.bytes) as usize;
    CudaTensor::part_with_dtype(span.slice.clone(), dtype, range, shape)
}

impl Stream {
    /// Queues zeros.
    ///
    /// # Errors
    /// `Device`.
    pub fn zero(&self, to: &Span) -> Result<()> {
        self.gpu().enter()?;
        // SAFETY: the memory is within the span, which keeps it; unordered accesses can only make
        // values wrong.
        unsafe { result::memset_d8_async(to.address(), 0, to.bytes as usize, self.inner.cu_stream()) }
            .map_err(refused("cuMemsetD8Async"))
    }

    /// Queues a copy of as many bytes as fit both spans.
    ///
    /// # Errors
    /// `Device`.
    pub fn copy(&self, to: &Span, from: &Span) -> Result<()> {
        let bytes = to.bytes.min(from.bytes) as usize;
        self.gpu().enter()?;
        // SAFETY: as in `zero`, at both ends.
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), bytes, self.inner.cu_stream()) }
            .map_err(refused("cuMemcpyDtoDAsync"))
    }
}

/// Host memory that a stream copies to and from. cudarc's own type is write-combined by default, and copies
/// cannot use parts of it.
pub struct Pinned {
    stream: Stream,
    base: *mut c_void,
    len: u64,
    /// True if mapped and registered by this program, like the library's arena; false if allocated by the
    /// driver.
    registered: bool,
    /// Device memory that copies may be using.
    used: Vec<Arc<CudaSlice<u8>>>,
}

impl Pinned {
    /// Allocates memory from the driver.
    ///
    /// # Errors
    /// `Device`.
    pub fn allocated(stream: &Stream, len: u64) -> Result<Self> {
        stream.gpu().enter()?;
        // SAFETY: no flags are set, so that the CPU reads it at full speed.
        let base = unsafe { result::malloc_host(len.max(1) as usize, 0) }.map_err(refused("cuMemHostAlloc"))?;
        // SAFETY: `len` bytes that no other code uses.
        unsafe { std::ptr::write_bytes(base.cast::<u8>(), 0, len as usize) };
        Ok(Self { stream: stream.clone(), base, len, registered: false, used: Vec::new() })
    }

    /// Maps memory with huge pages, touches it, and registers it.
    ///
    /// # Errors
    /// `Device`; `Io` when there is not enough memory.
    pub fn registered(stream: &Stream, len: u64) -> Result<Self> {
        let (bytes, access) = (len.max(1) as usize, ProtFlags::READ | ProtFlags::WRITE);
        let failed = |e: rustix::io::Errno| Error::io("cannot map memory to be pinned", e.into());
        stream.gpu().enter()?;
        // SAFETY: a fresh mapping changes no existing memory.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }.map_err(failed)?;
        // SAFETY: our own mapping of `bytes` bytes, which no other code uses.
        unsafe {
            let _ = madvise(base, bytes, Advice::LinuxHugepage);
            std::ptr::write_bytes(base.cast::<u8>(), 1, bytes);
        }
        // SAFETY: as above; it is unregistered before it is unmapped.
        if let Err(error) = unsafe { sys::cuMemHostRegister_v2(base, bytes, 0) }.result() {
            // SAFETY: as above, and the driver has not registered it.
            let _ = unsafe { munmap(base, bytes) };
            return Err(refused("cuMemHostRegister")(error));
        }
        Ok(Self { stream: stream.clone(), base, len, registered: true, used: Vec::new() })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// Returns the stream of its copies.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Queues a copy of `from` to offset `at`.
    ///
    /// # Errors
    /// `Device`; `Internal` when it does not fit.
    pub fn fetch(&mut self, at: u64, from: &Span) -> Result<()> {
        let (to, stream) = (self.place(at, from)?, self.stream.inner.cu_stream());
        // SAFETY: both ends have this many bytes, and stay valid until the stream has ended.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to, from.address(), from.bytes as usize, stream) }
            .result()
            .map_err(refused("cuMemcpyDtoHAsync"))
    }

    /// Queues a copy from offset `at` to `to`.
    ///
    /// # Errors
    /// As [`Pinned::fetch`].
    pub fn send(&mut self, at: u64, to: &Span) -> Result<()> {
        let (from, stream) = (self.place(at, to)?, self.stream.inner.cu_stream());
        // SAFETY: as in `fetch`.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.address(), from, to.bytes as usize, stream) }
            .result()
            .map_err(refused("cuMemcpyHtoDAsync"))
    }

    /// Waits for the stream, then returns the bytes.
    ///
    /// # Errors
    /// `Device`.
    pub fn bytes(&mut self) -> Result<&mut [u8]> {
        self.stream.wait()?;
        self.used.clear();
        // SAFETY: `len` initialised bytes, borrowed from `self`, and no copy is in progress.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.base.cast(), self.len as usize) })
    }

    /// Returns the address of offset `at` for a copy of `span`. Keeps the span until the stream has ended,
    /// and makes the context current.
    fn place(&mut self, at: u64, span: &Span) -> Result<*mut c_void> {
        self.stream.gpu().enter()?;
        if at.checked_add(span.bytes).is_none_or(|end| end > self.len) {
            let why = format!("a part is outside its pinned memory at={at} bytes={} of={}", span.bytes, self.len);
            return Err(Error::new(ErrorKind::Internal, why));
        }
        if !self.used.last().is_some_and(|last| Arc::ptr_eq(last, &span.slice)) {
            self.used.push(span.slice.clone());
        }
        Ok(self.base.wrapping_byte_add(at as usize))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.stream.wait().is_err() {
            std::mem::forget(std::mem::take(&mut self.used));
            return;
        }
        if !self.registered {
            // SAFETY: allocated here, and no copy is in progress.
            let _ = unsafe { result::free_host(self.base) };
        // SAFETY: registered here, and no copy is in progress.
        } else if unsafe { sys::cuMemHostUnregister(self.base) }.result().is_ok() {
            // SAFETY: mapped here, with this length.
            let _ = unsafe { munmap(self.base, self.len.max(1) as usize) };
        }
    }
}
