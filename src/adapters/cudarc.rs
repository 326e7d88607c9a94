//! Sources and targets in memory that [cudarc](https://docs.rs/cudarc) allocated: slices, views of slices,
//! and parts of slices.
//!
//! ```no_run
//! use ashore::adapters::cudarc::CudaTensor;
//! use ashore::{CheckpointExecutor, StateDict};
//! use cudarc::driver::CudaContext;
//! use std::sync::Arc;
//!
//! let executor = CheckpointExecutor::builder("checkpoints").build()?;
//! let stream = CudaContext::new(0)?.new_stream()?;
//! let mut weights = Arc::new(stream.alloc_zeros::<f32>(6)?);
//! let mut state = StateDict::new();
//! state.tensor("weights", CudaTensor::new(weights.clone(), [2, 3])?)?;
//! let save = executor.save(1, state)?;
//! // ... forward and backward: they only read the weights ...
//! executor.fence()?;
//! stream.memset_zeros(Arc::get_mut(&mut weights).expect("the only reference again"))?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Which cudarc
//!
//! Use the version that this crate was built with, 0.19, which is re-exported here as [`cudarc`]. Another
//! version has other types, and mixing them is a compile error. A program that uses
//! `ashore::adapters::cudarc::cudarc` always has the right version.
//!
//! # Order
//!
//! Copies come after all writes to the slice that cudarc has recorded, in any stream. Where cudarc manages
//! the order of streams, making a [`CudaTensor`] makes the slice's own stream wait for the last write. Where
//! it does not (no stream was made by that context, or event tracking is off), copies come only after work
//! that was queued in the slice's own stream, or that was ordered before such work.
//!
//! A shared slice cannot be written safely before its source is dropped. The stager drops the source when the
//! copies have ended, so [`Arc::get_mut`] returns None after a forgotten fence. To write without waiting on
//! the host, borrow the slice in a [`scope`](crate::CheckpointExecutor::scope) that ends with
//! [`Fence::on`](crate::Fence::on): cudarc then records the copies as reads by the slice's stream, and any
//! stream that writes the slice through cudarc waits for them on the GPU. This does not cover kernels that
//! write through a shared reference: name their streams in the fence.
//!
//! # Panics
//! A slice exists only if cudarc has loaded the driver. No function here calls the driver without a slice.
//!
//! # Safety argument
//! A slice stays allocated while it is owned or borrowed, and is freed in its own stream after its copies. A
//! source that owns the slice is dropped when the copies have ended. A source that borrows it is dropped when
//! the slice's stream waits for the copies. A race of streams could change only the values of bytes on the
//! device, which are not Rust memory. A stream is named only while it is borrowed, or by a source whose slice
//! keeps the stream.
#![expect(unsafe_code, reason = "sources over memory of a device; argument above")]

pub use ::cudarc;

use crate::error::{Error, ErrorKind, Result};
use crate::restore::DeviceTarget;
use crate::state::{DeviceStream, Dtype, Element, Layout, MemoryLocation, Source};
use cudarc::driver::{CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// A stream of a primary context, for use with a fence. The fence refuses a stream of another context. The
/// result cannot outlive the stream:
/// ```compile_fail,E0597
/// # use ashore::{CheckpointExecutor, DeviceStream};
/// # use cudarc::driver::CudaContext;
/// # fn demo(executor: &CheckpointExecutor) -> Result<(), Box<dyn std::error::Error>> {
/// let fenced: DeviceStream<'_> = {
///     let stream = CudaContext::new(0)?.new_stream()?;
///     (&stream).into()
/// };
/// executor.fence_on(&[fenced])?;
/// # Ok(()) }
/// ```
impl<'s> From<&'s CudaStream> for DeviceStream<'s> {
    fn from(stream: &'s CudaStream) -> Self {
        let context = stream.context();
        // The driver would accept a stream of another context as one of ours. An invalid ordinal makes sure
        // that it is refused.
        let ordinal = u32::try_from(context.ordinal()).ok().filter(|_| context.is_primary());
        let ordinal = ordinal.unwrap_or(u32::MAX);
        // SAFETY: cudarc destroys the stream on drop, and the stream is borrowed here. It is of a primary
        // context, or it is refused.
        unsafe { Self::new(ordinal, stream.cu_stream() as usize) }
    }
}

impl<'s> From<&'s Arc<CudaStream>> for DeviceStream<'s> {
    fn from(stream: &'s Arc<CudaStream>) -> Self {
        stream.as_ref().into()
    }
}

/// A tensor in GPU memory that cudarc allocated: `Arc<CudaSlice<T>>`, `CudaSlice<T>`, `&CudaSlice<T>` or
/// `CudaView<T>`.
#[derive(Debug)]
pub struct CudaTensor<O: CudaOwner> {
    owner: O,
    address: u64,
    bytes: u64,
    layout: Layout,
    stream: DeviceStream<'static>,
}

impl<O: CudaOwner> CudaTensor<O> {
    /// Makes a tensor of `shape` over the elements of `owner`. The length is checked when the tensor is put
    /// into a state dict.
    ///
    /// # Errors
    /// `Invalid` for a slice whose stream is not of the primary context of its device, or is the per-thread
    /// default stream; `Device` when cudarc has met an error in that context.
    pub fn new(owner: O, shape: impl AsRef<[usize]>) -> Result<Self> {
        Self::with_dtype(owner, O::Element::DTYPE, shape)
    }

    /// Like [`CudaTensor::new`], for a dtype without a Rust type: `owner` has the bytes in the layout of
    /// `dtype`.
    ///
    /// # Errors
    /// As [`CudaTensor::new`].
    pub fn with_dtype(owner: O, dtype: Dtype, shape: impl AsRef<[usize]>) -> Result<Self> {
        let all = 0..owner.memory().len();
        Self::over(owner, all, Layout::new(dtype, shape))
    }

    /// Makes a tensor of `shape` over the elements `range` of `owner`. Several tensors can share an
    /// allocation this way.
    ///
    /// # Errors
    /// As [`CudaTensor::new`]; `Invalid` for a range that is not within the slice.
    pub fn part(owner: O, range: Range<usize>, shape: impl AsRef<[usize]>) -> Result<Self> {
        Self::over(owner, range, Layout::new(O::Element::DTYPE, shape))
    }

    /// Like [`CudaTensor::part`], for a dtype without a Rust type, or a dtype other than that of the slice. A
    /// `CudaSlice<u8>` may have tensors of any dtype. `range` counts elements of `owner`.
    ///
    /// # Errors
    /// As [`CudaTensor::part`].
    pub fn part_with_dtype(owner: O, dtype: Dtype, range: Range<usize>, shape: impl AsRef<[usize]>) -> Result<Self> {
        Self::over(owner, range, Layout::new(dtype, shape))
    }

    fn over(owner: O, range: Range<usize>, layout: Layout) -> Result<Self> {
        let memory = owner.memory();
        let (len, size) = (memory.len(), size_of::<O::Element>() as u64);
        if range.start > range.end || range.end > len {
            return Err(Error::invalid(format!("a part is outside its slice part={range:?} elements={len}")));
        }
        // SAFETY: the slice keeps its stream, and is owned or borrowed while the source lives.
        let stream = unsafe { readable(memory.stream())?.promised() };
        // cudarc records this as a read by the slice's stream, which now comes after the last write of any
        // stream.
        let (address, read) = memory.device_ptr(memory.stream());
        drop(read);
        unfailed(memory.stream().context())?;
        let (address, bytes) = (address + range.start as u64 * size, range.len() as u64 * size);
        Ok(Self { owner, address, bytes, layout, stream })
    }
}

impl<O: CudaOwner> Drop for CudaTensor<O> {
    fn drop(&mut self) {
        let memory = self.owner.memory();
        if O::BORROWED {
            // Records the copies as a read by the slice's stream, so that writers known to cudarc wait for
            // them. The slice's stream comes after the copies by now.
            drop(memory.device_ptr(memory.stream()));
        } else {
            // cudarc frees in the current context, and any thread may drop this last reference.
            let context = memory.stream().context();
            context.record_err(context.bind_to_thread());
        }
    }
}

// SAFETY: see the safety argument; the address is that of the slice, and only its device reads it.
unsafe impl<O: CudaOwner> Source for CudaTensor<O> {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn location(&self) -> MemoryLocation {
        MemoryLocation::Device { bytes: self.bytes, stream: self.stream }
    }

    fn stream_owner(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        Some(self.owner.memory().stream().clone())
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        copy(std::ptr::without_provenance(self.address as usize));
    }
}

/// Owners of memory that cudarc allocated. Sealed.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no memory of the cudarc that ashore was built with",
    label = "not a `CudaSlice`, an `Arc` of one, a reference to one, or a `CudaView`, of cudarc 0.19",
    note = "if it is one, of another version of cudarc: use `ashore::adapters::cudarc::cudarc`, or ask for version 0.19 of cudarc"
)]
pub trait CudaOwner: Send + Sync + sealed::Sealed {
    /// The type of the elements.
    type Element: Element;

    /// True where the memory outlives the owner.
    const BORROWED: bool;

    /// The memory.
    fn memory(&self) -> &dyn DevicePtr<Self::Element>;
}

/// GPU memory of cudarc as the target of a restored tensor: a `CudaSlice<T>` or a `CudaViewMut<T>`, borrowed
/// until [`read_into`](crate::Checkpoint::read_into) has returned. The tensor must have the same number of
/// bytes, and the dtype of `T`.
///
/// ```no_run
/// use ashore::adapters::cudarc::CudaTarget;
/// use ashore::{Catalog, DeviceChoice, Targets};
/// use cudarc::driver::CudaContext;
///
/// let stream = CudaContext::new(0)?.new_stream()?;
/// let mut weights = stream.alloc_zeros::<f32>(6)?;
/// if let Some(newest) = Catalog::open("checkpoints")?.latest()? {
///     let newest = newest.with_device(DeviceChoice::Cuda(0))?;
///     newest.read_into(Targets::new().device("weights", CudaTarget::new(&mut weights)?))?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
/// The program cannot use the memory meanwhile:
/// ```compile_fail,E0505
/// # use ashore::{Checkpoint, Targets, adapters::cudarc::CudaTarget};
/// # fn demo(from: &Checkpoint, mut weights: cudarc::driver::CudaSlice<f32>) -> ashore::Result<()> {
/// let targets = Targets::new().device("weights", CudaTarget::new(&mut weights)?);
/// drop(weights);
/// from.read_into(targets)
/// # }
/// ```
#[derive(Debug)]
pub struct CudaTarget<'t>(DeviceTarget<'t>);

impl<'t> CudaTarget<'t> {
    /// Makes a target of all of `memory`. The restore writes it after all work, in any stream, that cudarc
    /// has recorded as using it.
    ///
    /// # Errors
    /// As [`CudaTensor::new`].
    pub fn new<M: CudaMemory>(memory: &'t mut M) -> Result<Self> {
        let memory = memory.memory();
        let (bytes, owner) = (memory.num_bytes() as u64, memory.stream().clone());
        let stream = readable(&owner)?;
        // cudarc records this as a write by the slice's stream, which now comes after all earlier uses of the
        // memory.
        let (address, written) = memory.device_ptr_mut(&owner);
        drop(written);
        unfailed(owner.context())?;
        // SAFETY: the memory, which keeps its stream, is borrowed for `'t`.
        Ok(Self(unsafe { DeviceTarget::borrowed(address, bytes, stream, M::Element::DTYPE) }))
    }
}

impl<'t> From<CudaTarget<'t>> for DeviceTarget<'t> {
    fn from(target: CudaTarget<'t>) -> Self {
        target.0
    }
}

/// Writable memory that cudarc allocated. Sealed.
pub trait CudaMemory: sealed::Sealed {
    /// The type of the elements.
    type Element: Element;

    /// The memory.
    fn memory(&mut self) -> &mut dyn DevicePtrMut<Self::Element>;
}

impl<T: Element> CudaMemory for CudaSlice<T> {
    type Element = T;
    fn memory(&mut self) -> &mut dyn DevicePtrMut<T> {
        self
    }
}

impl<T: Element> sealed::Sealed for CudaViewMut<'_, T> {}

impl<T: Element> CudaMemory for CudaViewMut<'_, T> {
    type Element = T;
    fn memory(&mut self) -> &mut dyn DevicePtrMut<T> {
        self
    }
}

/// Returns the stream of memory that the executor's device can access, or an error.
fn readable(stream: &Arc<CudaStream>) -> Result<DeviceStream<'_>> {
    const PER_THREAD: usize = 2;
    let (context, found) = (stream.context(), DeviceStream::from(stream));
    let why = if !context.is_primary() {
        "a slice is not of a primary context: use the device's primary context"
    } else if found.handle == PER_THREAD {
        "a slice was allocated in the per-thread default stream: use another stream"
    } else {
        return Ok(found);
    };
    Err(Error::invalid(format!("{why} device=cuda:{}", context.ordinal())))
}

/// Fails when cudarc has recorded an error in this context that no call returned: waits of cudarc may then
/// have had no effect.
fn unfailed(context: &CudaContext) -> Result<()> {
    context.check_err().map_err(|error| {
        let device = context.ordinal();
        Error::new(ErrorKind::Device, format!("cudarc met an error error={:?} device=cuda:{device}", error.0))
    })
}

mod sealed {
    pub trait Sealed {}
}

macro_rules! owners {
    ($([$($generics:tt)*] $owner:ty, $borrowed:literal => $memory:expr;)*) => { $(
        impl<$($generics)*> sealed::Sealed for $owner {}
        impl<$($generics)*> CudaOwner for $owner {
            type Element = T;
            const BORROWED: bool = $borrowed;
            fn memory(&self) -> &dyn DevicePtr<T> {
                let memory: fn(&Self) -> &dyn DevicePtr<T> = $memory;
                memory(self)
            }
        }
    )* };
}
owners! {
    [T: Element] Arc<CudaSlice<T>>, false => |o| o.as_ref();
    [T: Element] CudaSlice<T>, false => |o| o;
    ['a, T: Element] &'a CudaSlice<T>, true => |o| *o;
    ['a, T: Element] CudaView<'a, T>, true => |o| o;
}
