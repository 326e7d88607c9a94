//! Sources: the memory that a tensor's bytes are read from until they are staged.
//!
//! # Safety argument
//! The unsafe code here is the contract of [`Source`], its implementations, and the construction of a
//! [`DeviceStream`], whose caller promises that the driver knows it. Each source holds a stable host
//! allocation (`Arc`, `Vec`, `Box`, a borrowed slice) that no safe code can write while the source is alive,
//! or a raw pointer whose promises the caller of [`RawHost::new`] or [`RawDevice::new`] made.
//!
//! [`OwnedBytes`] keeps a slice beside the owner that lent it. `AsRef` lends the slice for as long as the owner
//! is borrowed, and the owner is borrowed as long as the source lives: it lies in an `Arc`, which does not move
//! its value and gives no `&mut` to it that safe code could take, and it has no borrow of its own that could
//! end (`'static`). So the slice is one that `&'a self` could have returned for that whole time.
#![expect(unsafe_code, reason = "the contract between memory owners and asynchronous copies; argument above")]

use super::dtype::{Dtype, Element, Layout, Shape};
use crate::error::Result;
use smallvec::SmallVec;
use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, Waker};

/// A stream of the program, valid for at least `'s`. This module only passes it on.
///
/// The driver dereferences any number that it gets as a stream, so only unsafe code creates one:
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
        /// The stream that wrote the bytes, and that will free them. It lives as long as the source.
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
/// [`Source::read`] calls `copy` exactly once, with a pointer to all bytes of the tensor in row-major order, or
/// where [`Source::strides`] says; nothing writes those bytes while `read` runs. Copies that began inside `read` may still read the
/// memory until the source is dropped; a write in that time must not be undefined behaviour beyond the value
/// of the bytes read. The pointer of a source with [`MemoryLocation::Device`] is an address of that device,
/// never read on the host; a save reads the bytes as the stream has written them when the source is passed to
/// `save`.
pub unsafe trait Source: Send + Sync {
    /// Dtype and shape. Must not change.
    fn layout(&self) -> Layout;

    /// The location and number of bytes. Must not change.
    fn location(&self) -> MemoryLocation;

    /// Calls `copy` once with a pointer to the bytes.
    fn read(&self, copy: &mut dyn FnMut(*const u8));

    /// The stride of each dimension in bytes, for memory that is not packed. [`Source::read`] then passes the
    /// address of the element with all indices 0, and the element with the indices `i` is at that address plus
    /// the sum of `i[d] * strides[d]`; [`MemoryLocation`] has the size of the packed tensor. Strides may be
    /// negative or 0. Bytes between elements are never read. Must not change.
    fn strides(&self) -> Option<&[i64]> {
        None
    }

    /// An owner that keeps the stream of [`MemoryLocation::Device`] alive after the source is dropped. A
    /// scope keeps it, because the end of the scope makes that stream wait.
    fn stream_owner(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        None
    }

    /// Polls whether the given range of the tensor's bytes is ready to be read. If pending, the source wakes
    /// `waker` once the bytes are ready or never will be; an error fails the save. The default is always
    /// ready.
    fn poll_ready(&self, _bytes: Range<u64>, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

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

    fn poll_ready(&self, bytes: Range<u64>, waker: &Waker) -> Poll<Result<()>> {
        self.0.poll_ready(bytes, waker)
    }
}

/// A tensor in host memory that cannot change while the source exists: `Arc<Vec<T>>`, `Arc<[T]>`, `Vec<T>`,
/// `Box<[T]>`, `&[T]`, or the bytes of another owner ([`HostTensor::from_owner`]).
///
/// ```
/// use ashore::{Dtype, HostTensor, StateDict};
/// let mut state = StateDict::new();
/// state.tensor("weights", HostTensor::new(vec![0.0_f32; 6], [2, 3]))?;
/// state.tensor("scales", HostTensor::with_dtype(vec![0_u8; 4], Dtype::F8_E4M3, [4]))?;
/// assert_eq!(state.bytes(), 28);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct HostTensor<O> {
    owner: O,
    layout: Layout,
}

impl<O: HostOwner> HostTensor<O> {
    /// A tensor of `shape` over the elements of `owner`. [`StateDict::tensor`](crate::StateDict::tensor)
    /// checks the length.
    pub fn new(owner: O, shape: impl AsRef<[usize]>) -> Self {
        Self { owner, layout: Layout::new(O::DTYPE, shape) }
    }

    /// A tensor of a dtype that has no Rust type, over bytes in the layout of `dtype`.
    pub fn with_dtype(owner: O, dtype: Dtype, shape: impl AsRef<[usize]>) -> Self {
        Self { owner, layout: Layout::new(dtype, shape) }
    }
}

impl HostTensor<OwnedBytes> {
    /// A tensor over the bytes of any owner: a memory map, a `bytes::Bytes`, a buffer of another library. The
    /// bytes are in the layout of `dtype`, row-major, at any alignment.
    ///
    /// The owner is moved to the heap and dropped with the source, on any thread. `as_ref` is called once, in
    /// this call, and a panic in it is the caller's. [`StateDict::tensor`](crate::StateDict::tensor) checks the
    /// length.
    ///
    /// ```
    /// use ashore::{Dtype, HostTensor, StateDict};
    /// struct Message(Vec<u8>);
    /// impl AsRef<[u8]> for Message {
    ///     fn as_ref(&self) -> &[u8] {
    ///         &self.0[8..] // after a header
    ///     }
    /// }
    /// let mut state = StateDict::new();
    /// state.tensor("weights", HostTensor::from_owner(Message(vec![0; 32]), Dtype::F32, [2, 3]))?;
    /// let error = state.tensor("bias", HostTensor::from_owner(Message(vec![0; 32]), Dtype::F32, [7])).unwrap_err();
    /// assert!(error.message().contains("expected_bytes=28 found_bytes=24") && error.message().contains("bias"));
    /// # Ok::<(), ashore::Error>(())
    /// ```
    pub fn from_owner<O: AsRef<[u8]> + Send + Sync + 'static>(
        owner: O,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
    ) -> Self {
        Self { owner: OwnedBytes::new(owner), layout: Layout::new(dtype, shape) }
    }
}

/// Bytes of an owner of any type, which is kept with them: see [`HostTensor::from_owner`]. Clones share the
/// owner.
#[derive(Clone)]
pub struct OwnedBytes {
    bytes: *const [u8],
    _owner: Arc<dyn Any + Send + Sync>,
}

impl OwnedBytes {
    fn new<O: AsRef<[u8]> + Send + Sync + 'static>(owner: O) -> Self {
        let owner = Arc::new(owner);
        Self { bytes: O::as_ref(&owner), _owner: owner }
    }
}

impl fmt::Debug for OwnedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OwnedBytes({} bytes)", self.bytes.len())
    }
}

// SAFETY: the bytes are shared and only read, and their owner may be dropped on any thread.
unsafe impl Send for OwnedBytes {}
// SAFETY: as above.
unsafe impl Sync for OwnedBytes {}

impl sealed::Sealed for OwnedBytes {}

impl HostOwner for OwnedBytes {
    const DTYPE: Dtype = Dtype::U8;

    fn bytes(&self) -> &[u8] {
        // SAFETY: the owner, which `self` keeps, lent the slice for as long as it is borrowed; see the
        // argument above.
        unsafe { &*self.bytes }
    }
}

/// An owner of host memory at a stable address that cannot be written while the owner lives. Sealed.
pub trait HostOwner: Send + Sync + sealed::Sealed {
    /// The dtype of the elements.
    const DTYPE: Dtype;

    /// The memory.
    fn bytes(&self) -> &[u8];
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! owners {
    ($([$($generics:tt)*] $owner:ty => $access:expr),* $(,)?) => { $(
        impl<$($generics)*> sealed::Sealed for $owner {}
        impl<$($generics)*> HostOwner for $owner {
            const DTYPE: Dtype = T::DTYPE;
            fn bytes(&self) -> &[u8] {
                let access: fn(&Self) -> &[T] = $access;
                bytemuck::cast_slice(access(self))
            }
        }
        // SAFETY: elements are plain data without interior mutability, and the owner is owned or borrowed, so
        // the allocation stays and nothing can write it; `bytes` returns all of it.
        unsafe impl<$($generics)*> Source for $owner {
            fn layout(&self) -> Layout {
                Layout { dtype: T::DTYPE, shape: Shape::from(&[self.len()][..]) }
            }
            fn location(&self) -> MemoryLocation {
                MemoryLocation::Host { bytes: HostOwner::bytes(self).len() as u64, writable: false }
            }
            fn read(&self, copy: &mut dyn FnMut(*const u8)) {
                copy(HostOwner::bytes(self).as_ptr());
            }
        }
    )* };
}
owners! {
    [T: Element] Arc<Vec<T>> => |o| o,
    [T: Element] Arc<[T]> => |o| o,
    [T: Element] Vec<T> => |o| o,
    [T: Element] Box<[T]> => |o| o,
    ['a, T: Element] &'a [T] => |o| o,
    ['a, T: Element] &'a Vec<T> => |o| o,
}

// SAFETY: the argument of the owner itself holds; only the layout differs.
unsafe impl<O: HostOwner> Source for HostTensor<O> {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn location(&self) -> MemoryLocation {
        MemoryLocation::Host { bytes: self.owner.bytes().len() as u64, writable: false }
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        copy(self.owner.bytes().as_ptr());
    }
}

/// Host memory that the program writes between a fence and the next save: torch and candle tensors, C
/// buffers.
///
/// ```
/// use ashore::{Dtype, RawHost, StateDict};
/// let memory = std::sync::Arc::new([0_u8; 24]);
/// // SAFETY: `memory` keeps the 24 bytes allocated, and nothing writes them.
/// let weights = unsafe { RawHost::new(memory.as_ptr(), 24, Dtype::F32, [2, 3], memory.clone()) };
/// let mut state = StateDict::new();
/// state.tensor("weights", weights)?;
/// # Ok::<(), ashore::Error>(())
/// ```
pub struct RawHost {
    pointer: *const u8,
    bytes: u64,
    layout: Layout,
    /// None: the elements are packed.
    strides: Option<SmallVec<[i64; 4]>>,
    _keep_alive: Box<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is only read, in `read`, under the promises made to `RawHost::new`, which hold on any
// thread.
unsafe impl Send for RawHost {}
// SAFETY: `read` only reads, so threads may share the source.
unsafe impl Sync for RawHost {}

impl RawHost {
    /// A tensor at `pointer`, of `bytes` bytes, kept allocated by `keep_alive`.
    ///
    /// # Safety
    /// `pointer` is valid for reads of `bytes` bytes until `keep_alive` is dropped, and nothing writes them
    /// between a `save` of this source and the next `fence` that returns `Ok`, or the resolution of that
    /// save's `staged()`.
    pub unsafe fn new(
        pointer: *const u8,
        bytes: u64,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        let layout = Layout::new(dtype, shape);
        Self { pointer, bytes, layout, strides: None, _keep_alive: Box::new(keep_alive) }
    }

    /// A tensor that is not packed: the element with all indices 0 is at `pointer`, and `strides` has the byte
    /// distance of neighbours for each dimension; strides may be negative or 0. The tensor is saved packed, in
    /// row-major order: its elements are copied straight to their places in the arena.
    ///
    /// ```
    /// use ashore::{Dtype, RawHost, StateDict};
    /// // Two rows of three elements; saved is the transposed tensor.
    /// let memory = std::sync::Arc::new([1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0]);
    /// let pointer = memory.as_ptr().cast();
    /// // SAFETY: `memory` keeps the six elements allocated, and nothing writes them.
    /// let transposed = unsafe { RawHost::strided(pointer, Dtype::F32, [3, 2], [4, 12], memory.clone()) };
    /// let mut state = StateDict::new();
    /// state.tensor("weights", transposed)?;
    /// # let dir = tempfile::tempdir().unwrap();
    /// let executor = ashore::CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?;
    /// executor.save(1, state)?.wait(std::time::Duration::from_secs(60))?;
    /// assert_eq!(executor.checkpoint(1)?.read_as::<f32>("weights")?, [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// [`StateDict::tensor`](crate::StateDict::tensor) checks that there is a stride for each dimension, and
    /// that elements are whole bytes.
    ///
    /// # Safety
    /// The promises of [`RawHost::new`], for the bytes of all elements: with `n` elements in a dimension of
    /// stride `s`, they lie between `pointer` plus the sum of all `(n - 1) * s` that are negative, and `pointer`
    /// plus the sum of all that are positive, plus one element. Bytes of that extent which are no element's
    /// are never read: they may be written at any time, and need not be allocated.
    pub unsafe fn strided(
        pointer: *const u8,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[i64]>,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        let layout = Layout::new(dtype, shape);
        let (bytes, strides) = (layout.bytes().unwrap_or(0), layout.unpacked(strides.as_ref()));
        Self { pointer, bytes, layout, strides, _keep_alive: Box::new(keep_alive) }
    }
}

// SAFETY: the caller of `RawHost::new` made the promises.
unsafe impl Source for RawHost {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn location(&self) -> MemoryLocation {
        MemoryLocation::Host { bytes: self.bytes, writable: true }
    }

    fn strides(&self) -> Option<&[i64]> {
        self.strides.as_deref()
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        copy(self.pointer);
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
    /// `keep_alive` is dropped; if that frees the memory in stream order, then in the order of `stream`.
    /// `stream` stays valid as long, and until the end of the scope in which the tensor is saved. All work
    /// that writes the bytes was queued in `stream`, or ordered before it, when the source is passed to
    /// `save`; nothing writes them between that save and the next `fence` or `fence_on` that returns `Ok`, or
    /// the resolution of that save's `staged()`: after `fence_on`, only the given streams, or streams ordered
    /// after those, write them.
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

    /// A tensor that is not packed: the element with all indices 0 is at `address`, and `strides` has the
    /// byte distance of neighbours for each dimension; strides may be negative or 0. A kernel gathers the
    /// elements, and the tensor is saved packed, in row-major order; `save` refuses the tensor if the device
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
