//! A tensor of candle as a source. The save reads it in place, under candle's own lock.
//!
//! # Safety argument
//! A [`CandleTensor`] keeps the tensor, and so keeps the allocation, whose address candle never changes. On
//! the host `read` holds the read lock of the storage while it copies the bytes. Every write of candle
//! (`Var::set`, an operation in place) takes the write lock, so no thread writes while another reads. The
//! range of bytes is checked against the allocation at each read, because safe code can make a tensor whose
//! shape exceeds its storage. Memory of a GPU is not Rust memory: a race of its streams could change only the
//! values of bytes, and the tensor keeps the memory and the stream.
#![expect(unsafe_code, reason = "sources over memory that candle allocated; argument above")]

use crate::{dtype, from_candle, invalid};
use ashore::{Checkpoint, Layout, MemoryLocation, Result, Source};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use half::{bf16, f16};
use std::any::Any;
use std::ops::Range;
use std::sync::Arc;

/// A tensor of candle as an [`ashore::Source`], read in place until it is staged. It keeps the storage alive.
///
/// The save sees the tensor's values at the *fence*, not at `save`. Call
/// [`fence`](ashore::CheckpointExecutor::fence) before the next `Var::set`, or let [`Fenced`](crate::Fenced)
/// call it. A forgotten fence is not undefined behaviour: writes wait for a running copy of a chunk, and the
/// first saves detect the difference and fail, naming the tensor. Tensors of at most 4 KiB, in GPU memory 128
/// KiB, are copied at `save`, while there is space: see [`Settings`](ashore::Settings).
///
/// ```
/// use ashore::StateDict;
/// use ashore_candle::CandleTensor;
/// use candle_core::{Device, Tensor};
///
/// let weights = Tensor::arange(0_f32, 6.0, &Device::Cpu)?.reshape((2, 3))?;
/// let mut state = StateDict::new();
/// state.tensor("weights", CandleTensor::new(&weights)?)?;
/// assert_eq!(state.bytes(), 24);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CandleTensor {
    tensor: Tensor,
    layout: Layout,
    /// Strides in bytes. None means that the tensor is packed.
    strides: Option<Vec<i64>>,
    memory: Memory,
}

#[derive(Debug)]
enum Memory {
    /// The bytes of the storage from the first element to the last one.
    Host(Range<usize>),
    #[cfg(feature = "cuda")]
    Device(crate::cuda::Place),
}

impl CandleTensor {
    /// Makes a source of `tensor`, which may be a view. A transposed view is saved in its visible order,
    /// packed.
    ///
    /// # Errors
    /// `Invalid` for a dtype that is smaller than a byte, a tensor of a Metal device, and, on a GPU, a tensor
    /// of the per-thread default stream. `Device::new_cuda` uses that stream, `Device::new_cuda_with_stream`
    /// does not.
    pub fn new(tensor: &Tensor) -> Result<Self> {
        let layout = Layout::new(dtype::stored(tensor.dtype())?, tensor.dims());
        let (storage, at) = tensor.storage_and_layout();
        let memory = match &*storage {
            Storage::Cpu(storage) => Memory::Host(extent(at, tensor.dtype(), host_bytes(storage).len())?),
            #[cfg(feature = "cuda")]
            Storage::Cuda(storage) => Memory::Device(crate::cuda::Place::of(storage, at)?),
            _ => return Err(invalid(format!("tensors of this device cannot be saved device={:?}", tensor.device()))),
        };
        let size = tensor.dtype().size_in_bytes();
        let strides = || at.stride().iter().map(|stride| (stride * size) as i64).collect();
        let strides = (!at.is_contiguous()).then(strides);
        drop(storage);
        Ok(Self { tensor: tensor.clone(), layout, strides, memory })
    }
}

/// Returns the range of bytes from the first element of a tensor to the end of its last element, in a storage
/// of `there` bytes.
///
/// # Errors
/// `Invalid` when the range is not within the storage: safe code can make such a tensor.
pub(crate) fn extent(at: &candle_core::Layout, dtype: DType, there: usize) -> Result<Range<usize>> {
    let size = dtype.size_in_bytes();
    if at.dims().contains(&0) {
        return Ok(0..0);
    }
    let reach = |end: usize, (&dim, &stride): (&usize, &usize)| end.checked_add((dim - 1).checked_mul(stride)?);
    let last = at.dims().iter().zip(at.stride()).try_fold(at.start_offset(), reach);
    let end = last.and_then(|last| last.checked_add(1)?.checked_mul(size));
    match end {
        Some(end) if end <= there => Ok(at.start_offset() * size..end),
        _ => {
            let what = "a tensor has elements outside of its storage";
            Err(invalid(format!("{what} shape={:?} strides={:?} storage_bytes={there}", at.dims(), at.stride())))
        }
    }
}

// SAFETY: see the safety argument of the module.
unsafe impl Source for CandleTensor {
    fn layout(&self) -> Layout {
        self.layout.clone()
    }

    fn location(&self) -> MemoryLocation {
        let bytes = self.layout.bytes().unwrap_or(0);
        match &self.memory {
            Memory::Host(_) => MemoryLocation::Host { bytes, writable: true },
            #[cfg(feature = "cuda")]
            Memory::Device(place) => place.location(bytes),
        }
    }

    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        match &self.memory {
            Memory::Host(bytes) => match &*self.tensor.storage_and_layout().0 {
                Storage::Cpu(storage) => copy(host_bytes(storage)[bytes.clone()].as_ptr()),
                _ => unreachable!("a tensor has moved to another device"),
            },
            #[cfg(feature = "cuda")]
            Memory::Device(place) => copy(place.pointer()),
        }
    }

    fn strides(&self) -> Option<&[i64]> {
        self.strides.as_deref()
    }

    fn stream_owner(&self) -> Option<Arc<dyn Any + Send + Sync>> {
        match &self.memory {
            Memory::Host(_) => None,
            #[cfg(feature = "cuda")]
            Memory::Device(place) => Some(place.stream_owner()),
        }
    }
}

#[cfg(feature = "cuda")]
impl Drop for CandleTensor {
    fn drop(&mut self) {
        if let Memory::Device(place) = &self.memory {
            // candle may free the storage with this last reference, in the context that is current in the
            // dropping thread.
            place.enter_context();
        }
    }
}

/// All bytes of a storage in host memory.
fn host_bytes(storage: &CpuStorage) -> &[u8] {
    macro_rules! bytes {
        ($($kind:ident),*) => { match storage { $(CpuStorage::$kind(elements) => {
            // SAFETY: the elements are numbers without padding, and are borrowed as long as the bytes.
            unsafe { std::slice::from_raw_parts(elements.as_ptr().cast(), size_of_val(elements.as_slice())) }
        })* } };
    }
    bytes!(U8, U32, I16, I32, I64, BF16, F16, F32, F64, F8E4M3, F6E2M3, F6E3M2, F4, F8E8M0)
}

/// Reads the tensor `name` of a checkpoint into a new tensor on `device`, with the stored dtype and shape.
///
/// # Errors
/// As [`Checkpoint::read`]; `Invalid`, naming the tensor, for a dtype that candle does not have; otherwise
/// the error that candle returned.
pub fn read_tensor(checkpoint: &Checkpoint, name: &str, device: &Device) -> Result<Tensor> {
    let info = checkpoint.tensor(name)?;
    let dtype = dtype::loaded(info.dtype).map_err(|e| invalid(format!("{} tensor={name:?}", e.message())))?;
    let shape = info.shape;
    macro_rules! read {
        ($($kind:ident: $element:ty),*) => { match dtype {
            $(DType::$kind => Tensor::from_vec(checkpoint.read_as::<$element>(name)?, shape, device),)*
            // The engine has no Rust type for these elements, so this makes one more copy.
            _ => Tensor::from_raw_buffer(&checkpoint.read(name)?, dtype, shape, device),
        } };
    }
    read!(U8: u8, U32: u32, I16: i16, I32: i32, I64: i64, BF16: bf16, F16: f16, F32: f32, F64: f64)
        .map_err(|e| from_candle(format!("cannot make a tensor tensor={name:?}"), e))
}
