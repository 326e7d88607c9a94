//! Tensors of the program as sources of a state dict.
//!
//! # Safety argument
//! That of the crate: a tensor's description is true, and its memory stays until it is released.

use crate::{array, text};
use ashore::{Capture, DeviceStream, Dtype, Error, ErrorKind, RawDevice, RawHost, Result, Source, StateDict};
use std::ffi::c_char;

/// A tensor: its dtype and shape, its memory location, and the callback for its release.
#[repr(C)]
pub struct Tensor {
    name: *const c_char,
    /// The dtype's name in safetensors: `F32`, `BF16`.
    dtype: *const c_char,
    shape: *const u64,
    rank: u64,
    address: u64,
    bytes: u64,
    /// The stream that wrote it, where a device has it; 0 is the legacy default stream.
    stream: u64,
    /// The device, or -1 for host memory.
    ordinal: i32,
    /// When it is captured: 0 is the default, 1 at the save, 2 at the fence.
    capture: i32,
    /// Called once, in any thread, when the source is dropped. May be null.
    release: Option<extern "C" fn(u64)>,
    token: u64,
}

/// Calls the program's callback.
struct Keep(Option<extern "C" fn(u64)>, u64);

impl Drop for Keep {
    fn drop(&mut self) {
        if let Some(release) = self.0 {
            release(self.1);
        }
    }
}

/// The state dict of these tensors.
///
/// # Safety
/// As the crate says.
pub unsafe fn state(tensors: &[Tensor]) -> Result<StateDict<'static>> {
    // Wraps all tensors first, so that each is released even if a later call fails.
    let keeps: Vec<Keep> = tensors.iter().map(|t| Keep(t.release, t.token)).collect();
    let mut state = StateDict::with_capacity(tensors.len());
    for (tensor, keep) in tensors.iter().zip(keeps) {
        // SAFETY: passed on.
        let (name, dtype, shape) =
            unsafe { (text(tensor.name)?, text(tensor.dtype)?, array(tensor.shape, tensor.rank)?) };
        let dtype: Dtype = serde_json::from_value(dtype.into()).map_err(|e| {
            Error::new(ErrorKind::Invalid, format!("no such dtype dtype={dtype:?} tensor={name:?}")).with_source(e)
        })?;
        let shape: Vec<usize> = shape.iter().map(|&dim| dim as usize).collect();
        if let Ok(ordinal) = u32::try_from(tensor.ordinal) {
            // SAFETY: passed on.
            let stream = unsafe { DeviceStream::new(ordinal, tensor.stream as usize) };
            // SAFETY: passed on.
            let source = unsafe { RawDevice::new(tensor.address, tensor.bytes, dtype, shape, stream, keep) };
            put(&mut state, name, source, tensor.capture)?;
        } else {
            let at = std::ptr::with_exposed_provenance(tensor.address as usize);
            // SAFETY: passed on.
            let source = unsafe { RawHost::new(at, tensor.bytes, dtype, shape, keep) };
            put(&mut state, name, source, tensor.capture)?;
        }
    }
    Ok(state)
}

fn put(state: &mut StateDict<'static>, name: &str, source: impl Source + 'static, capture: i32) -> Result<()> {
    match capture {
        0 => state.tensor(name, source),
        1 => state.tensor_captured(name, source, Capture::AtSave),
        2 => state.tensor_captured(name, source, Capture::AtFence),
        other => Err(Error::new(ErrorKind::Invalid, format!("no such capture capture={other} tensor={name:?}"))),
    }
    .map(drop)
}
