//! The work of a device in a call of `save`, in the order of the streams that wrote the tensors. The device
//! captures small tensors, which may then change before the fence. For the first saves it digests the others,
//! to detect a forgotten fence.
//!
//! From then on a captured tensor is read from the *capture pool*. Later code treats it like any other device
//! tensor.

use super::capture_pool::{Allocation, CapturePool};
use super::pieces::Part;
use crate::device::{Digests, Kernels, Pieces, Queued};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::state::{Capture, MemoryLocation, StateDict, Tensor};
use std::sync::Arc;

/// Tensors of at most this many bytes are captured at `save` while the pool has space.
const SMALL_TENSOR_BYTES: u64 = 128 << 10;
/// The alignment of tensors in the pool.
const ALIGN: u64 = 16;

/// Tensors, and their digests that were requested from a device.
type DeviceDigests = Vec<(Vec<usize>, Arc<dyn Digests>)>;

/// The results of a device at `save`.
#[derive(Default)]
pub(crate) struct OnDevice {
    /// Some tensor is left to the fence.
    pub left: bool,
    /// Small tensors left to the fence because the pool had no space.
    pub over_budget: usize,
    expected: DeviceDigests,
    /// Memory of the captured tensors, kept until nothing reads it any more. That may be after the sources
    /// are dropped.
    pub allocation: Option<Allocation>,
    /// Some tensor that needs a digest has none.
    pub digests_missing: bool,
    /// Work queued in streams of the program, which reads sources until it has run.
    pub queued: Vec<Arc<dyn Queued>>,
}

impl OnDevice {
    /// The digests at `save` of tensors that are left to the fence, by their index in the state dict.
    /// Available once the save is staged.
    ///
    /// # Errors
    /// `Device` if the device returned no digests, or is lost by now.
    pub fn expected(&self) -> Result<Vec<(usize, Digest)>> {
        let mut all = Vec::new();
        for (tensors, digests) in &self.expected {
            all.extend(tensors.iter().copied().zip(digests.take()?));
        }
        Ok(all)
    }
}

/// Refuses tensors that need kernels, on a device that has none.
///
/// # Errors
/// `Invalid`, naming the tensor and `why`.
pub(crate) fn without_kernels(state: &StateDict<'_>, why: &str, done: &mut OnDevice) -> Result<()> {
    let on_device = |tensor: &Tensor<'_>| tensor.location.stream().is_some();
    for (name, tensor) in state.tensors.iter().filter(|(_, tensor)| on_device(tensor)) {
        if tensor.capture == Some(Capture::AtSave) {
            return Err(Error::invalid(format!("cannot be captured at save tensor={name:?} reason={why:?}")));
        }
        if tensor.strides().is_some() {
            return Err(Error::invalid(format!(
                "cannot be gathered, make it contiguous tensor={name:?} reason={why:?}"
            )));
        }
    }
    done.left = !state.streams.is_empty();
    Ok(())
}

/// Makes the device capture small and requested tensors of `state`, and with `detect` digest the rest. `done`
/// has the queued work even after an error.
///
/// # Errors
/// `Invalid`, naming the tensor, when it cannot be packed, or a requested capture is not possible; `Busy`
/// when the capture pool will have space later; `Device`.
pub(crate) fn at_save(
    kernels: &dyn Kernels,
    pool: &Arc<CapturePool>,
    state: &mut StateDict<'_>,
    detect: bool,
    done: &mut OnDevice,
) -> Result<()> {
    refuse_apart(kernels.ordinal(), pool.len, state)?;
    let span = pool.span();
    let captured = choose(kernels.ordinal(), pool.len, span, state, done)?;
    if let Some(end) = captured.iter().map(|(_, end)| *end).max() {
        let allocation = Allocation::take(pool, span.0, end);
        let before = done.queued.len();
        let queued = capture(kernels, pool, state, &captured, &mut done.queued);
        // Do this also after an error, because queued work still writes to the allocation.
        done.queued[before..].iter().for_each(|queued| allocation.wait_for(queued.clone()));
        queued?;
        for (index, end) in captured {
            let tensor = &mut state.tensors[index];
            tensor.captured_at = Some(pool.start + end - tensor.location.bytes());
        }
        done.allocation = Some(allocation);
    }
    if detect && let Err(error) = digest(kernels, state, done) {
        if error.kind() != ErrorKind::Device {
            return Err(error);
        }
        done.digests_missing = true;
        tracing::warn!(
            error = format_args!("{error:#}"),
            "tensors of a device are not digested; a forgotten fence would not be noticed"
        );
    }
    Ok(())
}

/// Refuses strided tensors that the device cannot gather.
fn refuse_apart(ordinal: u32, capture_memory: u64, state: &StateDict<'_>) -> Result<()> {
    for (name, tensor) in &state.tensors {
        let MemoryLocation::Device { bytes, stream } = tensor.location else { continue };
        if bytes > 0 && tensor.strides().is_some() && (stream.ordinal != ordinal || capture_memory == 0) {
            let (why, device) = ("cannot be gathered on its device, make it contiguous", stream.ordinal);
            return Err(Error::invalid(format!("{why} device=cuda:{device} gather={capture_memory} tensor={name:?}")));
        }
    }
    Ok(())
}

/// Captures these tensors, in the order of their streams.
fn capture(
    kernels: &dyn Kernels,
    pool: &CapturePool,
    state: &StateDict<'_>,
    captured: &[(usize, u64)],
    queued: &mut Vec<Arc<dyn Queued>>,
) -> Result<()> {
    for stream in &state.streams {
        let mut pieces = Pieces { chunks: 1, ..Pieces::default() };
        for (index, end) in captured {
            let (name, tensor) = state.tensors.get_index(*index).expect("chosen from this dict");
            if tensor.location.stream() == Some(*stream) {
                let to = pool.start + end - tensor.location.bytes();
                pieces.add(name, tensor, Part { at: 0, bytes: tensor.location.bytes(), to, chunk: 0 })?;
            }
        }
        if !pieces.list.is_empty() {
            kernels.capture(*stream, &pieces, queued)?;
        }
    }
    Ok(())
}

/// Chooses the tensors to capture, and where each ends in the pool. Requested captures come first.
fn choose(
    ordinal: u32,
    capture_memory: u64,
    span: (u64, u64),
    state: &StateDict<'_>,
    done: &mut OnDevice,
) -> Result<Vec<(usize, u64)>> {
    let (mut end, last) = (span.0, span.0 + span.1);
    let asks = |tensor: &&Tensor<'_>| {
        let home = tensor.location.stream().is_some_and(|stream| stream.ordinal == ordinal);
        home && tensor.capture == Some(Capture::AtSave)
    };
    let bytes = |tensor: &Tensor<'_>| tensor.location.bytes().next_multiple_of(ALIGN);
    let wanted = state.tensors.values().filter(asks).fold(0_u64, |sum, tensor| sum.saturating_add(bytes(tensor)));
    let (mut chosen, mut left) = (Vec::new(), 0);
    for asked in [true, false] {
        for (index, (name, tensor)) in state.tensors.iter().enumerate() {
            let MemoryLocation::Device { bytes, stream } = tensor.location else { continue };
            if asked != (tensor.capture == Some(Capture::AtSave)) || bytes == 0 {
                continue;
            }
            let home = stream.ordinal == ordinal;
            let after = Some(end.next_multiple_of(ALIGN)).and_then(|at| at.checked_add(bytes)).filter(|&at| at <= last);
            match after.filter(|_| home) {
                Some(after) if asked || (bytes <= SMALL_TENSOR_BYTES && tensor.capture.is_none()) => {
                    chosen.push((index, after));
                    end = after;
                }
                None if asked && home => {
                    let free = last - end;
                    let wrong = format!("cannot be captured at save: no room on the device bytes={bytes} free={free}");
                    // Earlier saves will free their allocations.
                    let kind = if wanted <= capture_memory && free < capture_memory {
                        ErrorKind::Busy
                    } else {
                        ErrorKind::Invalid
                    };
                    return Err(Error::new(
                        kind,
                        format!("{wrong} asked={wanted} gather={capture_memory} tensor={name:?}"),
                    ));
                }
                None if asked => {
                    let device = stream.ordinal;
                    let wrong = "cannot be captured at save on another device than that of the executor";
                    return Err(Error::invalid(format!("{wrong} device=cuda:{device} tensor={name:?}")));
                }
                fits => {
                    left += 1;
                    let small = bytes <= SMALL_TENSOR_BYTES && tensor.capture.is_none();
                    done.over_budget += usize::from(home && small && capture_memory > 0 && fits.is_none());
                }
            }
        }
    }
    done.left = left > 0;
    Ok(chosen)
}

/// Requests digests of all tensors that are left to the fence, in the order of their streams.
fn digest(kernels: &dyn Kernels, state: &StateDict<'_>, done: &mut OnDevice) -> Result<()> {
    for stream in state.streams.iter().filter(|stream| stream.ordinal == kernels.ordinal()) {
        let (mut pieces, mut tensors) = (Pieces::default(), Vec::new());
        for (index, (name, tensor)) in state.tensors.iter().enumerate() {
            if tensor.location.stream() == Some(*stream) && tensor.captured_at.is_none() && tensor.location.bytes() > 0
            {
                let (bytes, chunk) = (tensor.location.bytes(), tensors.len());
                pieces.add(name, tensor, Part { at: 0, bytes, to: 0, chunk })?;
                tensors.push(index);
            }
        }
        pieces.chunks = tensors.len();
        if !tensors.is_empty() {
            let digests = kernels.digest(*stream, &pieces, &mut done.queued)?;
            done.expected.push((tensors, digests));
        }
    }
    Ok(())
}
