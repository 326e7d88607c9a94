//! Memory of the device, and of the host where the device may write.
//!
//! # Safety argument
//! Work queued by this module and `stream` touches device memory within spans, which keep their buffer, and host memory within
//! a [`Pinned`]. A buffer is freed after everything in the context has ended; pinned memory after its one stream has, in which
//! alone copies to and from it are queued. Where that cannot be known the memory is left to the end of the process. References to
//! pinned bytes are given out only when the stream has ended, and borrow the memory, so that nothing is queued meanwhile.
#![expect(unsafe_code, reason = "calls of a C library, and memory that it writes; argument above")]

use super::driver::{Address, call};
use super::{Gpu, Stream};
use ashore::{Dtype, Error, ErrorKind, RawDevice, Result};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};
use std::ffi::c_void;
use std::sync::Arc;

/// An allocation on the device.
struct Buffer {
    gpu: Arc<Gpu>,
    address: Address,
}

/// `bytes` of memory, all of it as one span. What is in it is not said.
///
/// # Errors
/// `Device`, above all when there is not so much.
pub fn allocate(gpu: &Arc<Gpu>, bytes: u64) -> Result<Span> {
    let mut address = 0;
    gpu.enter()?;
    // SAFETY: writes one address.
    unsafe { call!(gpu, cuMemAlloc_v2(&mut address, bytes.max(1) as usize)) }
        .map_err(|e| Error::new(e.kind(), format!("{} bytes={bytes}", e.message())))?;
    Ok(Span { buffer: Arc::new(Buffer { gpu: gpu.clone(), address }), from: 0, bytes })
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.gpu.synchronize().is_ok() {
            // SAFETY: allocated here, no span is left, and nothing is queued any more.
            let _ = unsafe { call!(self.gpu, cuMemFree_v2(self.address)) };
        }
    }
}

/// Part of a buffer, which it keeps.
#[derive(Clone)]
pub struct Span {
    buffer: Arc<Buffer>,
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
        Ok(Self { buffer: self.buffer.clone(), from: self.from + from, bytes })
    }

    pub fn address(&self) -> Address {
        self.buffer.address + self.from
    }
}

/// Host memory that a stream copies to and from.
pub struct Pinned {
    stream: Stream,
    base: *mut c_void,
    len: u64,
    /// Mapped by this program and registered, as the library's arena is; otherwise the driver's own.
    registered: bool,
}

impl Pinned {
    /// Memory that the driver allocates.
    ///
    /// # Errors
    /// `Device`.
    pub fn allocated(stream: &Stream, len: u64) -> Result<Self> {
        let (gpu, mut base) = (stream.gpu(), std::ptr::null_mut());
        gpu.enter()?;
        // SAFETY: writes one pointer. Flags: none, so that the processor reads it at full speed.
        unsafe { call!(gpu, cuMemHostAlloc(&mut base, len.max(1) as usize, 0)) }?;
        // SAFETY: `len` bytes that nobody else knows of.
        unsafe { std::ptr::write_bytes(base.cast::<u8>(), 0, len as usize) };
        Ok(Self { stream: stream.clone(), base, len, registered: false })
    }

    /// A mapping with huge pages, touched and then registered.
    ///
    /// # Errors
    /// `Device`; `Io` when there is no memory.
    pub fn registered(stream: &Stream, len: u64) -> Result<Self> {
        let gpu = stream.gpu();
        let (bytes, access) = (len.max(1) as usize, ProtFlags::READ | ProtFlags::WRITE);
        let failed = |e: rustix::io::Errno| Error::io("cannot map memory to be pinned", e.into());
        gpu.enter()?;
        // SAFETY: a fresh mapping touches nothing that exists.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, access, MapFlags::PRIVATE) }.map_err(failed)?;
        // SAFETY: our own mapping, which nobody else knows of, of so many bytes.
        unsafe {
            let _ = madvise(base, bytes, Advice::LinuxHugepage);
            std::ptr::write_bytes(base.cast::<u8>(), 1, bytes);
        }
        // SAFETY: as above; it is unregistered before it is unmapped.
        if let Err(error) = unsafe { call!(gpu, cuMemHostRegister_v2(base, bytes, 0)) } {
            // SAFETY: as above, and the driver does not have it.
            let _ = unsafe { munmap(base, bytes) };
            return Err(error);
        }
        Ok(Self { stream: stream.clone(), base, len, registered: true })
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
        let (gpu, to) = (self.stream.gpu(), self.place(at, from.bytes)?);
        // SAFETY: both ends hold so many bytes, and stay until the stream has ended.
        unsafe { call!(gpu, cuMemcpyDtoHAsync_v2(to, from.address(), from.bytes as usize, self.stream.handle())) }
    }

    /// Queues a copy from the byte `at` to `to`.
    ///
    /// # Errors
    /// As [`Pinned::fetch`].
    pub fn send(&mut self, at: u64, to: &Span) -> Result<()> {
        let (gpu, from) = (self.stream.gpu(), self.place(at, to.bytes)?);
        // SAFETY: as there.
        unsafe { call!(gpu, cuMemcpyHtoDAsync_v2(to.address(), from, to.bytes as usize, self.stream.handle())) }
    }

    /// The bytes, when the stream has ended.
    ///
    /// # Errors
    /// `Device`.
    pub fn bytes(&mut self) -> Result<&mut [u8]> {
        self.stream.wait()?;
        // SAFETY: so many initialised bytes, borrowed from `self`, and no copy is under way.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.base.cast(), self.len as usize) })
    }

    fn place(&self, at: u64, bytes: u64) -> Result<*mut c_void> {
        self.stream.gpu().enter()?;
        if at.checked_add(bytes).is_none_or(|end| end > self.len) {
            let why = format!("a part of pinned memory that is not there at={at} bytes={bytes} of={}", self.len);
            return Err(Error::new(ErrorKind::Internal, why));
        }
        Ok(self.base.wrapping_byte_add(at as usize))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let gpu = self.stream.gpu();
        if self.stream.wait().is_err() {
            return;
        }
        if !self.registered {
            // SAFETY: allocated here, and no copy is under way.
            let _ = unsafe { call!(gpu, cuMemFreeHost(self.base)) };
        // SAFETY: registered here, and no copy is under way.
        } else if unsafe { call!(gpu, cuMemHostUnregister(self.base)) }.is_ok() {
            // SAFETY: mapped here, with this length.
            let _ = unsafe { munmap(self.base, self.len.max(1) as usize) };
        }
    }
}

/// A tensor of a save: these bytes, which `stream` writes.
pub fn source(span: &Span, dtype: Dtype, shape: &[usize], stream: &Stream) -> RawDevice {
    let keep = (span.clone(), stream.clone());
    // SAFETY: the span keeps the memory, and its buffer is freed only when the context has nothing left to do; the stream is kept
    // as long, and is what all work of this program on the span is queued in. Whoever writes it before the fence tears the
    // checkpoint and nothing else: only the device reads it.
    unsafe { RawDevice::new(span.address(), span.bytes, dtype, shape, stream.device_stream(), keep) }
}
