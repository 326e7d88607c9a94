//! Sources: the memory that a tensor's bytes are read from until they are staged.
//!
//! # Safety argument
//! The unsafe code here is the contract of [`Source`], its implementations, and the construction of a
//! [`DeviceStream`], whose caller promises that the driver knows the stream. The caller of [`RawDevice::new`]
//! made the promises for the address that a [`RawDevice`] holds. Sources in host memory are in `host.rs`.
#![expect(unsafe_code, reason = "the contract between memory owners and asynchronous copies; argument above")]

use super::dtype::{Dtype, Layout};
use crate::error::Result;
use smallvec::SmallVec;
use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, Waker};

/// A stream of the program, valid for at least `'s`. This module only passes the stream on.
///
/// The driver dereferences any number that it gets as a stream, so only unsafe code creates a `DeviceStream`:
/// ```compile_fail,E0133
/// let stream = ashore::DeviceStream::new(0, 0xdead_beef);
/// ```
/// Adapters borrow the stream from the library that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceStream<'s> {
    pub(crate) ordinal: u32,
    pub(crate) handle: usize,
    lives: PhantomData<&'s ()>,
}

impl DeviceStream<'static> {
    /// The legacy default stream of device `ordinal`, which always exists.
    pub fn legacy(ordinal: u32) -> Self {
        Self { ordinal, handle: 0, lives: PhantomData }
    }
}

impl DeviceStream<'_> {
    /// The stream `handle`, a `CUstream` as a number, of device `ordinal`.
    ///
    /// # Safety
    /// For the lifetime of the returned stream, `handle` is a stream of that device's primary context, or 0.
    pub unsafe fn new(ordinal: u32, handle: usize) -> Self {
        Self { ordinal, handle, lives: PhantomData }
    }

    /// The device, by its ordinal in this process.
    pub fn ordinal(&self) -> u32 {
        self.ordinal
    }

    /// The driver's handle: a `CUstream` as a number, where 0 is the legacy default stream.
    pub fn handle(&self) -> usize {
        self.handle
    }

    /// Extends the stream's lifetime as the caller promises.
    ///
    /// # Safety
    /// The promise of [`DeviceStream::new`], for the new lifetime.
    pub(crate) unsafe fn promised(self) -> DeviceStream<'static> {
        DeviceStream { ordinal: self.ordinal, handle: self.handle, lives: PhantomData }
    }
}

/// The memory location of a source's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MemoryLocation {
    /// Host memory.
    Host {
        /// Number of bytes.
        bytes: u64,
        /// True when the program can write the memory while the source is alive. The executor checks such a
        /// source for forgotten fences, and captures it at `save` when it is small.
        writable: bool,
    },
    /// Device memory, which the program can write as soon as its streams reach the write.
    Device {
        /// Number of bytes.
        bytes: u64,
        /// The stream that wrote the bytes, and that will free them. The stream lives as long as the source.
        stream: DeviceStream<'static>,
    },
}

impl MemoryLocation {
    /// Number of bytes.
    pub fn bytes(&self) -> u64 {
        match *self {
            MemoryLocation::Host { bytes, .. } | MemoryLocation::Device { bytes, .. } => bytes,
        }
    }

    /// True when the program can write the memory while the source is alive.
    pub fn writable(&self) -> bool {
        match *self {
            MemoryLocation::Host { writable, .. } => writable,
            MemoryLocation::Device { .. } => true,
        }
    }

    /// The stream that wrote the bytes, for device memory.
    pub fn stream(&self) -> Option<DeviceStream<'static>> {
        match *self {
            MemoryLocation::Host { .. } => None,
            MemoryLocation::Device { stream, .. } => Some(stream),
        }
    }
}

/// A tensor's bytes, kept in their owner's memory until they are staged.
///
/// # Safety
/// The memory that the source describes stays allocated at the same address until the source is dropped.
/// [`Source::read`] calls `copy` exactly once, with a pointer to all bytes of the tensor, in row-major order
/// or at the strides of [`Source::strides`]. Nothing writes those bytes while `read` runs. Copies that began
/// inside `read` may still read the memory until the source is dropped; a write in that time must not be
/// undefined behaviour beyond the value of the bytes read. The pointer of a source with
/// [`MemoryLocation::Device`] is an address of that device, which the host never reads. A save reads the
/// bytes that the stream has written when the source is passed to `save`.
pub unsafe trait Source: Send + Sync {
    /// Dtype and shape. Must not change.
    fn layout(&self) -> Layout;

    /// The location and number of bytes. Must not change.
    fn location(&self) -> MemoryLocation;

    /// Calls `copy` once with a pointer to the bytes.
    fn read(&self, copy: &mut dyn FnMut(*const u8));

    /// The stride of each dimension in bytes, for memory that is not packed. [`Source::read`] then passes the
    /// address of the element with all indices 0, and the element with the indices `i` is at that address
    /// plus the sum of `i[d] * strides[d]`; [`MemoryLocation`] has the size of the packed tensor. Strides may
    /// be negative or 0. Bytes between elements are never read. Must not change.
    fn strides(&self) -> Option<&[i64]> {
        None
    }

    /// An owner that keeps the stream of [`MemoryLocation::Device`] alive after the source is dropped. A
    /// scope keeps this owner, because the end of the scope makes that stream wait.
    fn stream_owner(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        None
    }

    /// The address that [`Source::read`] passes, if the bytes can be read without a call. The bytes are then
    /// ready, and copies may begin at any time until the source is dropped, as they may inside `read`. A save
    /// then calls neither `read` nor `poll_ready`, so that it need not touch the owners of small tensors in
    /// host memory. Must not change, not even when the source itself is moved.
    fn address(&self) -> Option<*const u8> {
        None
    }

    /// Polls whether the given range of the tensor's bytes is ready to be read. If pending, the source wakes
    /// `waker` once the bytes are ready or never will be; an error fails the save. The default is always
    /// ready.
    fn poll_ready(&self, _bytes: Range<u64>, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// The result of [`Source::address`], kept beside the source.
#[derive(Clone, Copy)]
pub(crate) struct Address(pub *const u8);

// SAFETY: an address that only copies read, under the promise of `Source::address`, which holds on any
// thread.
unsafe impl Send for Address {}
// SAFETY: as above.
unsafe impl Sync for Address {}

/// A source shared by several state dicts.
#[derive(Clone)]
pub(crate) struct SharedSource<'a>(Arc<dyn Source + 'a>);

impl<'a> SharedSource<'a> {
    pub fn new(source: Box<dyn Source + 'a>) -> Self {
        Self(source.into())
    }
}

// SAFETY: forwards to the inner source, which is dropped after its last sharer.
unsafe impl Source for SharedSource<'_> {
    fn layout(&self) -> Layout {
        self.0.layout()
    }

    fn location(&self) -> MemoryLocation {
        self.0.location()
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        self.0.read(copy);
    }

    fn strides(&self) -> Option<&[i64]> {
        self.0.strides()
    }

    fn stream_owner(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        self.0.stream_owner()
    }

    fn address(&self) -> Option<*const u8> {
        self.0.address()
    }

    fn poll_ready(&self, bytes: Range<u64>, waker: &Waker) -> Poll<Result<()>> {
        self.0.poll_ready(bytes, waker)
    }
}

/// Device memory: tensors of torch and candle, C buffers.
///
/// ```
/// use ashore::{DeviceStream, Dtype, RawDevice, StateDict};
/// # fn example(address: u64, handle: usize, memory: std::sync::Arc<()>) -> ashore::Result<()> {
/// // SAFETY: `handle` is a `CUstream` of device 0 that outlives the save.
/// let stream = unsafe { DeviceStream::new(0, handle) };
/// let mut state = StateDict::new();
/// // SAFETY: `memory` keeps 24 bytes allocated at `address`; they are written in `stream` alone.
/// state.tensor("weights", unsafe { RawDevice::new(address, 24, Dtype::F32, [2, 3], stream, memory) })?;
/// # Ok(())
/// # }
/// # example(1 << 20, 0, Default::default()).unwrap();
/// ```
pub struct RawDevice {
    address: u64,
    bytes: u64,
    layout: Layout,
    /// None: the elements are packed.
    strides: Option<SmallVec<[i64; 4]>>,
    stream: DeviceStream<'static>,
    _keep_alive: Box<dyn Any + Send + Sync>,
}

impl RawDevice {
    /// A tensor at the device address `address`, of `bytes` bytes, written by `stream` and kept allocated by
    /// `keep_alive`.
    ///
    /// # Safety
    /// `address` is valid for reads of `bytes` bytes on the device of `stream`, in its primary context, until
    /// `keep_alive` is dropped. If the drop frees the memory in stream order, it does so in the order of
    /// `stream`. `stream` stays valid as long, and until the end of the scope in which the tensor is saved.
    /// When the source is passed to `save`, all work that writes the bytes was queued in `stream`, or ordered
    /// before it. Nothing writes the bytes between that save and the next `fence` or `fence_on` that returns
    /// `Ok`, or the resolution of that save's `staged()`. After `fence_on`, only the given streams, or
    /// streams ordered after them, write the bytes.
    pub unsafe fn new(
        address: u64,
        bytes: u64,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        stream: DeviceStream<'_>,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        // SAFETY: the caller promises that the stream is valid as long as the source.
        let (layout, stream) = (Layout::new(dtype, shape), unsafe { stream.promised() });
        Self { address, bytes, layout, strides: None, stream, _keep_alive: Box::new(keep_alive) }
    }

    /// A tensor that is not packed. The element with all indices 0 is at `address`, and `strides` has the
    /// byte distance of neighbours for each dimension. Strides may be negative or 0. A kernel gathers the
    /// elements, and the tensor is saved packed, in row-major order. `save` refuses the tensor if the device
    /// has no kernels.
    ///
    /// # Safety
    /// The promises of [`RawDevice::new`], for all bytes of all elements.
    pub unsafe fn strided(
        address: u64,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[i64]>,
        stream: DeviceStream<'_>,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        // SAFETY: the caller promises that the stream is valid as long as the source.
        let (layout, stream) = (Layout::new(dtype, shape), unsafe { stream.promised() });
        let (bytes, strides) = (layout.bytes().unwrap_or(0), layout.unpacked(strides.as_ref()));
        Self { address, bytes, layout, strides, stream, _keep_alive: Box::new(keep_alive) }
    }
}

// SAFETY: the caller of `RawDevice::new` made the promises.
unsafe impl Source for RawDevice {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn location(&self) -> MemoryLocation {
        MemoryLocation::Device { bytes: self.bytes, stream: self.stream }
    }

    fn strides(&self) -> Option<&[i64]> {
        self.strides.as_deref()
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        copy(std::ptr::without_provenance(self.address as usize));
    }
}
