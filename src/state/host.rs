//! Sources in host memory.
//!
//! # Safety argument
//! Each source holds a stable allocation (`Arc`, `Vec`, `Box`, a borrowed slice) that no safe code can write
//! while the source is alive, or a raw pointer whose promises the caller of [`RawHost::new`] made.
//!
//! [`OwnedBytes`] keeps a slice beside the owner that lent it. `AsRef` lends the slice for as long as the
//! owner is borrowed, and the owner is borrowed as long as the source lives. The owner lies in an `Arc`,
//! which does not move its value and gives safe code no `&mut` to it. The owner holds no borrow that could
//! end (`'static`). So `&'a self` could have returned the slice for that whole time.
#![expect(unsafe_code, reason = "sources over memory that their owners keep; argument above")]

use super::dtype::{Dtype, Element, Layout, Shape};
use super::source::{MemoryLocation, Source};
use smallvec::SmallVec;
use std::any::Any;
use std::fmt;
use std::sync::Arc;

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
    /// The owner is moved to the heap and dropped with the source, on any thread. This call calls `as_ref`
    /// once; a panic in `as_ref` propagates to the caller. [`StateDict::tensor`](crate::StateDict::tensor)
    /// checks the length.
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
            fn address(&self) -> Option<*const u8> {
                Some(HostOwner::bytes(self).as_ptr())
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

// SAFETY: the safety argument of the owner holds here, too; only the layout differs.
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

    fn address(&self) -> Option<*const u8> {
        Some(self.owner.bytes().as_ptr())
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

// SAFETY: only `read` uses the pointer, and only to read. The promises made to `RawHost::new` hold on any
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

    /// A tensor that is not packed. The element with all indices 0 is at `pointer`, and `strides` has the
    /// byte distance of neighbours for each dimension. Strides may be negative or 0. The tensor is saved
    /// packed, in row-major order: its elements are copied straight to their places in the arena.
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
    /// The promises of [`RawHost::new`], for the bytes of all elements. With `n` elements in a dimension of
    /// stride `s`, these bytes lie between `pointer` plus the sum of all negative `(n - 1) * s`, and
    /// `pointer` plus the sum of all positive ones, plus one element. Bytes of that extent that belong to no
    /// element are never read: they may be written at any time, and need not be allocated.
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

    fn address(&self) -> Option<*const u8> {
        Some(self.pointer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_an_owner_has_in_itself_stay_when_their_tensor_moves() {
        let tensor = HostTensor::from_owner(*b"twelve bytes", Dtype::F32, [3]);
        let moved = std::thread::spawn(move || Box::new(tensor)).join().unwrap();
        let clone = moved.clone();
        drop(moved);
        assert_eq!(clone.owner.bytes(), b"twelve bytes");
        let mut read = Vec::new();
        // SAFETY: the source hands out all of its bytes.
        clone.read(&mut |from| read.extend_from_slice(unsafe { std::slice::from_raw_parts(from, 12) }));
        assert_eq!(read, b"twelve bytes");
    }
}
