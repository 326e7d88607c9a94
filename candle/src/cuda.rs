//! Tensors in GPU memory, through candle's CUDA backend.
//!
//! # Safety argument
//! An address lies in a slice that the caller's tensor keeps, and the elements were checked to lie within the
//! slice. Only the slice's device reads or writes at the address. The stream is that of the slice, and is
//! kept beside the address. Memory that a restore may still write after its deadline is leaked.
#![expect(unsafe_code, reason = "addresses and streams of a device; argument above")]

use crate::tensor::extent;
use crate::{dtype, invalid};
use ashore::adapters::cudarc::cudarc::driver::{CudaStream, DevicePtr};
use ashore::{Checkpoint, DeviceStream, DeviceTarget, ErrorKind, MemoryLocation, Result, Targets};
use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::{Layout, Storage, Var};
use std::any::Any;
use std::sync::Arc;

/// Where the elements of a tensor are.
#[derive(Debug)]
pub(crate) struct Place {
    /// The address of the first element.
    address: u64,
    stream: Arc<CudaStream>,
}

impl Place {
    /// Finds the elements of a tensor with the layout `at` in `storage`.
    pub(crate) fn of(storage: &CudaStorage, at: &Layout) -> Result<Self> {
        let stream = storage.device.cuda_stream();
        usable(&stream)?;
        macro_rules! memory {
            ($($kind:ident),*) => { match &storage.slice {
                $(CudaStorageSlice::$kind(slice) => {
                    let (address, read) = slice.device_ptr(&stream);
                    drop(read);
                    (address, slice.num_bytes())
                })*
            } };
        }
        let (address, bytes) = memory!(U8, U32, I16, I32, I64, BF16, F16, F32, F64, F8E4M3, F6E2M3, F6E3M2, F4, F8E8M0);
        let context = stream.context();
        context.check_err().map_err(|error| {
            let device = context.ordinal();
            ashore::Error::new(
                ErrorKind::Device,
                format!("candle met an error error={:?} device=cuda:{device}", error.0),
            )
        })?;
        let elements = extent(at, storage.dtype(), bytes)?;
        Ok(Self { address: address + elements.start as u64, stream })
    }

    /// The memory location of `bytes` bytes.
    pub(crate) fn location(&self, bytes: u64) -> MemoryLocation {
        let stream = DeviceStream::from(&self.stream);
        // SAFETY: the stream is the one just borrowed, and the source keeps it.
        let stream = unsafe { DeviceStream::new(stream.ordinal(), stream.handle()) };
        MemoryLocation::Device { bytes, stream }
    }

    /// The address of the first element. The host never reads it.
    pub(crate) fn pointer(&self) -> *const u8 {
        std::ptr::without_provenance(self.address as usize)
    }

    pub(crate) fn stream_owner(&self) -> Arc<dyn Any + Send + Sync> {
        self.stream.clone()
    }

    /// Makes the context current in this thread, because candle frees memory in the current context.
    pub(crate) fn enter_context(&self) {
        let context = self.stream.context();
        context.record_err(context.bind_to_thread());
    }
}

/// Refuses streams whose handle means a different stream in another thread, and contexts that the engine does
/// not know.
fn usable(stream: &CudaStream) -> Result<()> {
    const PER_THREAD: usize = 2;
    let (context, found) = (stream.context(), DeviceStream::from(stream));
    let why = if !context.is_primary() {
        "a tensor is not of a primary context: use the device's primary context"
    } else if found.handle() == PER_THREAD {
        "a tensor is of the per-thread default stream, which Device::new_cuda uses: use Device::new_cuda_with_stream"
    } else {
        return Ok(());
    };
    Err(invalid(format!("{why} device=cuda:{}", context.ordinal())))
}

/// Reads the tensors of these names into the memory of their Vars. The caller has compared dtypes and shapes.
pub(crate) fn load(checkpoint: &Checkpoint, vars: &[(&str, &Var)]) -> Result<()> {
    let mut places = Vec::with_capacity(vars.len());
    for (name, var) in vars {
        let found = match &*var.storage_and_layout().0 {
            Storage::Cuda(storage) => Place::of(storage, var.layout()),
            _ => Err(invalid("a Var is not in GPU memory")),
        };
        let place = found.map_err(|e| crate::vars::named(name, e))?;
        if !var.is_contiguous() {
            return Err(invalid(format!("a Var is not contiguous tensor={name:?}")));
        }
        places.push(place);
    }
    let mut targets = Targets::new();
    for ((name, var), place) in vars.iter().zip(&places) {
        let (bytes, dtype) = (var.elem_count() * var.dtype().size_in_bytes(), dtype::stored(var.dtype())?);
        // SAFETY: the borrowed Vars keep the memory until this function returns, and after a deadline a
        // leaked clone keeps it. `places` keeps the stream.
        let target = unsafe { DeviceTarget::new(place.address, bytes as u64, (&place.stream).into()) };
        targets = targets.device(*name, target.with_dtype(dtype));
    }
    let loaded = checkpoint.read_into(targets);
    if loaded.as_ref().is_err_and(|error| error.kind() == ErrorKind::Deadline) {
        for (_, var) in vars {
            std::mem::forget((*var).clone());
        }
    }
    loaded
}
