//! Where a tensor's bytes live until they are staged.
//!
//! # Safety argument
//! The only unsafe things here are the contract of [`Source`], its implementations, and the making of a [`DeviceStream`], whose
//! caller promises that the driver knows it. Each source holds a stable host allocation (`Arc`, `Vec`, `Box`, a borrowed slice)
//! that no safe code can write while the source is alive, or a raw pointer for which the caller of [`RawHost::new`] or
//! [`RawDevice::new`] made the promises.
#![expect(unsafe_code, reason = "the contract between memory owners and asynchronous copies; argument above")]

use super::dtype::{Dtype, Element, Layout, Shape};
use crate::error::Result;
use smallvec::SmallVec;
use std::any::Any;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;
use std::task::{Poll, Waker};

/// A stream of a device, as the program that made it knows it, which lives for `'s` at least. Here it is only handed on.
///
/// The driver takes any number for a stream and reads what it finds there, so that a stream is named by unsafe code:
/// ```compile_fail,E0133
/// let stream = ashore::DeviceStream::new(0, 0xdead_beef);
/// ```
/// Adapters borrow it from the library that made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceStream<'s> {
    pub(crate) ordinal: u32,
    pub(crate) handle: usize,
    lives: PhantomData<&'s ()>,
}

impl DeviceStream<'static> {
    /// The legacy default stream of device `ordinal`, which is always there.
    pub fn legacy(ordinal: u32) -> Self {
        Self { ordinal, handle: 0, lives: PhantomData }
    }
}

impl DeviceStream<'_> {
    /// The stream `handle`, a `CUstream` as a number, of device `ordinal`.
    ///
    /// # Safety
    /// For the lifetime of what is returned, `handle` is a stream of that device's primary context, or 0.
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

    /// The same stream for as long as the caller promises.
    ///
    /// # Safety
    /// As for [`DeviceStream::new`].
    pub(crate) unsafe fn promised(self) -> DeviceStream<'static> {
        DeviceStream { ordinal: self.ordinal, handle: self.handle, lives: PhantomData }
    }
}

/// Where a source's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// Host memory.
    Host {
        /// How many bytes there are.
        bytes: u64,
        /// True when the program can write the memory while the source is alive. Such a source is watched for forgotten
        /// fences, and captured at `save` when it is small.
        writable: bool,
    },
    /// Memory of a device, which the program can write as soon as its streams get there.
    Device {
        /// How many bytes there are.
        bytes: u64,
        /// The stream that wrote them, and that will free them. It lives as long as the source.
        stream: DeviceStream<'static>,
    },
}

impl Place {
    /// How many bytes there are.
    pub fn bytes(&self) -> u64 {
        match *self {
            Place::Host { bytes, .. } | Place::Device { bytes, .. } => bytes,
        }
    }

    /// True when the program can write the memory while the source is alive.
    pub fn writable(&self) -> bool {
        match *self {
            Place::Host { writable, .. } => writable,
            Place::Device { .. } => true,
        }
    }

    /// The producer's stream, for memory of a device.
    pub fn stream(&self) -> Option<DeviceStream<'static>> {
        match *self {
            Place::Host { .. } => None,
            Place::Device { stream, .. } => Some(stream),
        }
    }
}

/// A tensor's bytes, held by whoever owns them until they are staged.
///
/// # Safety
/// Until the source is dropped, the memory that it describes stays allocated at the same address. [`Source::read`] calls
/// `copy` exactly once, with a pointer to all bytes of the tensor in row-major order, and nothing writes those bytes while
/// `read` runs. Copies that were begun inside `read` may still be read from the memory until the source is dropped; a
/// write in that time must not be undefined behaviour beyond the value of the bytes read. The pointer of a source with
/// [`Place::Device`] is an address of that device, never read on the host; what its stream had done when the source was
/// handed to `save` is what is read.
pub unsafe trait Source: Send + Sync {
    /// Dtype and shape. Must not change.
    fn layout(&self) -> Layout;

    /// Where the bytes are, and how many. Must not change.
    fn place(&self) -> Place;

    /// Hands `copy` a pointer to the bytes.
    fn read(&self, copy: &mut dyn FnMut(*const u8));

    /// For memory of a device whose elements do not lie together: the stride of each dimension, in bytes. [`Source::read`] then
    /// hands out where the element with all indices 0 is, and [`Place::Device`] has the bytes of the packed tensor. Must not
    /// change.
    fn strides(&self) -> Option<&[i64]> {
        None
    }

    /// What keeps the stream of [`Place::Device`] alive after the source was dropped. A scope holds on to it, because at its end
    /// it makes that stream wait.
    fn stream_owner(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        None
    }

    /// Whether these bytes, of all of the tensor's, are there to be read. If they are not, `waker` is woken once they are, or
    /// once they never will be; an error fails the save. Always ready, unless it says otherwise.
    fn poll_ready(&self, _bytes: Range<u64>, _waker: &Waker) -> Poll<Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A source that several state dicts hold.
#[derive(Clone)]
pub(crate) struct Shared<'a>(Arc<dyn Source + 'a>);

impl<'a> Shared<'a> {
    pub fn new(source: Box<dyn Source + 'a>) -> Self {
        Self(source.into())
    }
}

// SAFETY: passed on; the source is dropped after the last who shares it.
unsafe impl Source for Shared<'_> {
    fn layout(&self) -> Layout {
        self.0.layout()
    }

    fn place(&self) -> Place {
        self.0.place()
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

/// A tensor in host memory that cannot change while it is held: `Arc<Vec<T>>`, `Arc<[T]>`, `Vec<T>`, `Box<[T]>` or `&[T]`.
#[derive(Clone, Debug)]
pub struct HostTensor<O> {
    owner: O,
    layout: Layout,
}

impl<O: HostOwner> HostTensor<O> {
    /// A tensor of `shape` over the elements of `owner`. Its length is checked when it is put into a state dict.
    pub fn new(owner: O, shape: impl AsRef<[usize]>) -> Self {
        Self { owner, layout: Layout::new(O::DTYPE, shape) }
    }

    /// A tensor whose elements have a dtype without a Rust type, over bytes laid out as `dtype` wants them.
    pub fn with_dtype(owner: O, dtype: Dtype, shape: impl AsRef<[usize]>) -> Self {
        Self { owner, layout: Layout::new(dtype, shape) }
    }
}

/// Owners of host memory that stays put and cannot be written while the owner lives. Sealed.
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
        // SAFETY: elements are plain data without interior mutability, and the owner is held or borrowed, so the
        // allocation stays and nothing can write it; `bytes` hands out all of it.
        unsafe impl<$($generics)*> Source for $owner {
            fn layout(&self) -> Layout {
                Layout { dtype: T::DTYPE, shape: Shape::from(&[self.len()][..]) }
            }
            fn place(&self) -> Place {
                Place::Host { bytes: HostOwner::bytes(self).len() as u64, writable: false }
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

// SAFETY: as for the owner itself; only the layout differs.
unsafe impl<O: HostOwner> Source for HostTensor<O> {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn place(&self) -> Place {
        Place::Host { bytes: self.owner.bytes().len() as u64, writable: false }
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        copy(self.owner.bytes().as_ptr());
    }
}

/// Host memory that the program writes between a fence and the next save: torch and candle tensors, C buffers.
pub struct RawHost {
    pointer: *const u8,
    bytes: u64,
    layout: Layout,
    _keep_alive: Box<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is only read, in `read`, under the promises made to `RawHost::new`, which hold on any thread.
unsafe impl Send for RawHost {}
// SAFETY: as above; `read` takes no exclusive access.
unsafe impl Sync for RawHost {}

impl RawHost {
    /// A tensor at `pointer`, of `bytes` bytes, kept allocated by `keep_alive`.
    ///
    /// # Safety
    /// `pointer` is valid for reads of `bytes` bytes until `keep_alive` is dropped, and nothing writes them between a
    /// `save` of this source and the next `fence` that returns `Ok`, or the resolution of that save's `staged()`.
    pub unsafe fn new(
        pointer: *const u8,
        bytes: u64,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        Self { pointer, bytes, layout: Layout::new(dtype, shape), _keep_alive: Box::new(keep_alive) }
    }
}

// SAFETY: passed on to the caller of `RawHost::new`.
unsafe impl Source for RawHost {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn place(&self) -> Place {
        Place::Host { bytes: self.bytes, writable: true }
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        copy(self.pointer);
    }
}

/// Memory of a device: tensors of torch and candle, C buffers.
pub struct RawDevice {
    address: u64,
    bytes: u64,
    layout: Layout,
    /// None: the elements lie together.
    strides: Option<SmallVec<[i64; 4]>>,
    stream: DeviceStream<'static>,
    _keep_alive: Box<dyn Any + Send + Sync>,
}

impl RawDevice {
    /// A tensor at the device address `address`, of `bytes` bytes, written by `stream` and kept allocated by `keep_alive`.
    ///
    /// # Safety
    /// `address` is valid for reads of `bytes` bytes on the device of `stream`, in its primary context, until `keep_alive` is
    /// dropped; if that frees the memory in stream order, then in the order of `stream`. `stream` stays valid as long, and until the end
    /// of the scope that it is saved in. All work that writes the bytes was queued in `stream`, or ordered before it, when the source is handed to `save`; nothing writes
    /// them between that save and the next `fence` or `fence_on` that returns `Ok`, or the resolution of that save's `staged()`:
    /// after `fence_on`, only streams that were given to it, or that are ordered after those.
    pub unsafe fn new(
        address: u64,
        bytes: u64,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        stream: DeviceStream<'_>,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        // SAFETY: the caller promises that it is valid as long as the source.
        let (layout, stream) = (Layout::new(dtype, shape), unsafe { stream.promised() });
        Self { address, bytes, layout, strides: None, stream, _keep_alive: Box::new(keep_alive) }
    }

    /// A tensor whose elements do not lie together: the one with all indices 0 is at `address`, and `strides` has for each
    /// dimension how many bytes further the next one is; negative strides, and 0, are fine. It is saved packed, in row-major
    /// order, by a kernel of the device that gathers its elements; where there is none, `save` refuses it.
    ///
    /// # Safety
    /// As [`RawDevice::new`], for all bytes of all elements.
    pub unsafe fn strided(
        address: u64,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[i64]>,
        stream: DeviceStream<'_>,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        // SAFETY: as in `new`.
        let (layout, stream) = (Layout::new(dtype, shape), unsafe { stream.promised() });
        let bytes = layout.bytes().unwrap_or(0);
        let strides = Some(SmallVec::from_slice(strides.as_ref())).filter(|strides| !layout.is_packed(strides));
        Self { address, bytes, layout, strides, stream, _keep_alive: Box::new(keep_alive) }
    }
}

// SAFETY: passed on to the caller of `RawDevice::new`.
unsafe impl Source for RawDevice {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn place(&self) -> Place {
        Place::Device { bytes: self.bytes, stream: self.stream }
    }

    fn strides(&self) -> Option<&[i64]> {
        self.strides.as_deref()
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        copy(std::ptr::without_provenance(self.address as usize));
    }
}
