//! Memory of the device, and of the host where the device may write.
//!
//! # Safety argument
//! A [`Span`] keeps the slice that it is part of, which its stream frees, behind what is queued there. Work on it in another stream
//! is waited for by the host before the span goes: a [`Pinned`] keeps what it copies from and to until its stream has ended, and a
//! graph its own. What is in a span is bytes of the device, which are no memory of Rust's. Pinned memory is freed after its one
//! stream has ended, in which alone copies to and from it are queued; where that cannot be known the memory is left to the end of
//! the process. References to pinned bytes are given out only when the stream has ended, and borrow the memory, so that nothing is
//! queued meanwhile.
#![expect(unsafe_code, reason = "calls of a C library, and memory that it writes; argument above")]

use super::Stream;
use super::driver::refused;
use ashore::adapters::cudarc::CudaTensor;
use ashore::{Dtype, Error, ErrorKind, Result};
use cudarc::driver::{CudaSlice, DevicePtr, result, sys};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::sync::Arc;

/// `bytes` of memory, all of it as one span, which `stream` changes and frees. What is in it is not said.
///
/// # Errors
/// `Device`, above all when there is not so much.
pub fn allocate(stream: &Stream, bytes: u64) -> Result<Span> {
    // SAFETY: any bytes are bytes, and only the device reads them before they are written.
    let slice = unsafe { stream.inner.alloc::<u8>(bytes.max(1) as usize) }.map_err(|error| {
        let error = refused("cuMemAllocAsync")(error);
        Error::new(error.kind(), format!("{} bytes={bytes}", error.message()))
    })?;
    let (address, _) = slice.device_ptr(&stream.inner);
    Ok(Span { slice: Arc::new(slice), address, from: 0, bytes })
}

/// Part of a slice, which it keeps.
#[derive(Clone)]
pub struct Span {
    slice: Arc<CudaSlice<u8>>,
    /// That of the slice.
    address: u64,
    from: u64,
    pub bytes: u64,
}

impl Span {
    /// `bytes` of it, beginning at `from`.
    ///
    /// # Errors
    /// `Internal` when it is not so long.
    pub fn part(&self, from: u64, bytes: u64) -> Result<Self> {
        if from.checked_add(bytes).is_none_or(|end| end > self.bytes) {
            let why = format!("a part of device memory that is not there from={from} bytes={bytes} of={}", self.bytes);
            return Err(Error::new(ErrorKind::Internal, why));
        }
        Ok(Self { from: self.from + from, bytes, ..self.clone() })
    }

    pub fn address(&self) -> u64 {
        self.address + self.from
    }
}

/// A tensor of a save: these bytes, which the stream of the span writes.
///
/// # Errors
/// Those of [`CudaTensor`].
pub fn source(span: &Span, dtype: Dtype, shape: &[usize]) -> Result<CudaTensor<Arc<CudaSlice<u8>>>> {
    let range = span.from as usize..(span.from + span.bytes) as usize;
    CudaTensor::part_with_dtype(span.slice.clone(), dtype, range, shape)
}

impl Stream {
    /// Zeros.
    ///
    /// # Errors
    /// `Device`.
    pub fn zero(&self, to: &Span) -> Result<()> {
        self.gpu().enter()?;
        // SAFETY: within memory that the span keeps; what its stream or the host does not order may change values alone.
        unsafe { result::memset_d8_async(to.address(), 0, to.bytes as usize, self.inner.cu_stream()) }
            .map_err(refused("cuMemsetD8Async"))
    }

    /// Copies as many bytes as there are in both.
    ///
    /// # Errors
    /// `Device`.
    pub fn copy(&self, to: &Span, from: &Span) -> Result<()> {
        let bytes = to.bytes.min(from.bytes) as usize;
        self.gpu().enter()?;
        // SAFETY: as for zeros, at both ends.
        unsafe { result::memcpy_dtod_async(to.address(), from.address(), bytes, self.inner.cu_stream()) }
            .map_err(refused("cuMemcpyDtoDAsync"))
    }
}

/// Host memory that a stream copies to and from. cudarc has a type for that, which is combined for writing unless asked, and whose
/// parts cannot be copied to.
pub struct Pinned {
    stream: Stream,
    base: *mut c_void,
    len: u64,
    /// Mapped by this program and registered, as the library's arena is; otherwise the driver's own.
    registered: bool,
    /// What copies may be using.
    used: Vec<Arc<CudaSlice<u8>>>,
}

impl Pinned {
    /// Memory that the driver allocates.
    ///
    /// # Errors
    /// `Device`.
    pub fn allocated(stream: &Stream, len: u64) -> Result<Self> {
        stream.gpu().enter()?;
        // SAFETY: flags: none, so that the processor reads it at full speed.
        let base = unsafe { result::malloc_host(len.max(1) as usize, 0) }.map_err(refused("cuMemHostAlloc"))?;
        // SAFETY: `len` bytes that no other code knows of.
        unsafe { std::ptr::write_bytes(base.cast::<u8>(), 0, len as usize) };
        Ok(Self { stream: stream.clone(), base, len, registered: false, used: Vec::new() })
    }

    /// A mapping with huge pages, touched and then registered.
    ///
    /// # Errors
    /// `Device`; `Io` when there is no memory.
    pub fn registered(stream: &Stream, len: u64) -> Result<Self> {
        let (bytes, access) = (len.max(1) as usize, ProtFlags::READ | ProtFlags::WRITE);
        let failed = |e: rustix::io::Errno| Error::io("cannot map memory to be pinned", e.into());
        stream.gpu().enter()?;
        // SAFETY: a fresh mapping touches nothing that exists.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }.map_err(failed)?;
        // SAFETY: our own mapping, which no other code knows of, of so many bytes.
        unsafe {
            let _ = madvise(base, bytes, Advice::LinuxHugepage);
            std::ptr::write_bytes(base.cast::<u8>(), 1, bytes);
        }
        // SAFETY: as above; it is unregistered before it is unmapped.
        if let Err(error) = unsafe { sys::cuMemHostRegister_v2(base, bytes, 0) }.result() {
            // SAFETY: as above, and the driver does not have it.
            let _ = unsafe { munmap(base, bytes) };
            return Err(refused("cuMemHostRegister")(error));
        }
        Ok(Self { stream: stream.clone(), base, len, registered: true, used: Vec::new() })
    }

    pub fn len(&self) -> u64 {
        self.len
    }

    /// The stream of its copies.
    pub fn stream(&self) -> &Stream {
        &self.stream
    }

    /// Queues a copy of `from` to the byte `at`.
    ///
    /// # Errors
    /// `Device`; `Internal` when it does not fit.
    pub fn fetch(&mut self, at: u64, from: &Span) -> Result<()> {
        let (to, stream) = (self.place(at, from)?, self.stream.inner.cu_stream());
        // SAFETY: both ends hold so many bytes, and stay until the stream has ended.
        unsafe { sys::cuMemcpyDtoHAsync_v2(to, from.address(), from.bytes as usize, stream) }
            .result()
            .map_err(refused("cuMemcpyDtoHAsync"))
    }

    /// Queues a copy from the byte `at` to `to`.
    ///
    /// # Errors
    /// As [`Pinned::fetch`].
    pub fn send(&mut self, at: u64, to: &Span) -> Result<()> {
        let (from, stream) = (self.place(at, to)?, self.stream.inner.cu_stream());
        // SAFETY: as there.
        unsafe { sys::cuMemcpyHtoDAsync_v2(to.address(), from, to.bytes as usize, stream) }
            .result()
            .map_err(refused("cuMemcpyHtoDAsync"))
    }

    /// The bytes, when the stream has ended.
    ///
    /// # Errors
    /// `Device`.
    pub fn bytes(&mut self) -> Result<&mut [u8]> {
        self.stream.wait()?;
        self.used.clear();
        // SAFETY: so many initialised bytes, borrowed from `self`, and no copy is under way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.base.cast(), self.len as usize) })
    }

    /// Where a copy of `span` begins, which is kept until the stream has ended. The context is current then.
    fn place(&mut self, at: u64, span: &Span) -> Result<*mut c_void> {
        self.stream.gpu().enter()?;
        if at.checked_add(span.bytes).is_none_or(|end| end > self.len) {
            let why = format!("a part of pinned memory that is not there at={at} bytes={} of={}", span.bytes, self.len);
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
            // SAFETY: allocated here, and no copy is under way.
            let _ = unsafe { result::free_host(self.base) };
        // SAFETY: registered here, and no copy is under way.
        } else if unsafe { sys::cuMemHostUnregister(self.base) }.result().is_ok() {
            // SAFETY: mapped here, with this length.
            let _ = unsafe { munmap(self.base, self.len.max(1) as usize) };
        }
    }
}
