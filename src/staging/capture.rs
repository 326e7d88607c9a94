//! Reads writable host memory in the call of `save`. Captures small tensors, which may then change before the
//! fence, and digests the others, to detect a forgotten fence.
//!
//! # Safety argument
//! The thread that calls `save` reads bytes inside [`Source::read`](crate::state::Source::read). A source
//! promises that nothing writes the bytes then.
#![expect(unsafe_code, reason = "reads from raw sources; argument above")]

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::plan::Plan;
use crate::state::{Capture, StateDict, Tensor};
use std::collections::HashMap;
use std::ops::Range;

/// Length of the pieces in which a strided tensor is packed for its digest.
const PIECE: usize = 1 << 20;

/// Tensors of at most this many bytes are captured at `save`.
const SMALL_TENSOR_BYTES: u64 = 4 << 10;

/// The tensors captured and the digests computed at `save`.
#[derive(Default)]
pub(crate) struct Captured {
    bytes: Vec<u8>,
    /// Ranges of `bytes` by tensor, ascending.
    tensors: Vec<(usize, Range<usize>)>,
    /// Digests at `save` of tensors that are left to the fence.
    pub expected: Vec<(usize, Digest)>,
    /// Some writable tensor is left to the fence.
    pub writable: bool,
    /// Small tensors left to the fence because the budget was used up.
    pub over_budget: usize,
}

impl Captured {
    /// Captures at most `budget` bytes of `state`; with `detect`, digests the other writable tensors.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, when a requested capture is not possible.
    pub fn take(state: &StateDict<'_>, budget: u64, detect: bool) -> Result<Self> {
        let (mut captured, mut packed) = (Self::default(), Vec::new());
        // Requested captures come first, because captures by default must not use up their budget.
        let asked = |index: &&usize| state.tensors[**index].capture == Some(Capture::AtSave);
        let (asked, usual): (Vec<_>, Vec<_>) = state.writable.iter().partition(asked);
        for index in asked.into_iter().chain(usual).copied() {
            let (name, tensor) = state.tensors.get_index(index).expect("an index of this dict");
            let (size, capture_memory) = (tensor.location.bytes(), budget - captured.bytes.len() as u64);
            let fits = size <= SMALL_TENSOR_BYTES && size <= capture_memory;
            match tensor.capture {
                Some(Capture::AtFence) => captured.leave(index, tensor, detect, &mut packed),
                Some(Capture::AtSave) if !fits => {
                    return Err(Error::invalid(format!(
                        "cannot be captured at save bytes={size} limit={SMALL_TENSOR_BYTES} budget_left={capture_memory} tensor={name:?}"
                    )));
                }
                None if !fits => {
                    captured.over_budget += usize::from(size <= SMALL_TENSOR_BYTES);
                    captured.leave(index, tensor, detect, &mut packed);
                }
                _ => {
                    let begin = captured.bytes.len();
                    read(tensor, &mut packed, |bytes| captured.bytes.extend_from_slice(bytes));
                    captured.tensors.push((index, begin..captured.bytes.len()));
                }
            }
        }
        captured.tensors.sort_unstable_by_key(|(index, _)| *index);
        if captured.over_budget > 0 {
            let tensors = captured.over_budget;
            tracing::warn!(tensors, budget, "the capture budget is used up; tensors are taken at the fence instead");
        }
        Ok(captured)
    }

    /// Digests the tensors in host memory that other ranks write, to compare them with the bytes that those
    /// ranks write.
    pub fn replicas(&self, state: &StateDict<'_>, plan: &Plan) -> Vec<(u32, Digest)> {
        if plan.replicas.is_empty() {
            return Vec::new();
        }
        let known: HashMap<usize, Digest> = self.expected.iter().copied().collect();
        let (mut digests, mut packed) = (Vec::new(), Vec::new());
        for &(index, replica) in &plan.replicas {
            let (_, tensor) = state.tensors.get_index(index).expect("an index of this dict");
            if plan.places.get(index).is_none_or(Option::is_some) || tensor.location.stream().is_some() {
                continue;
            }
            match (self.get(index), known.get(&index)) {
                (Some(bytes), _) => digests.push((replica, Digest::of(bytes))),
                (None, Some(digest)) => digests.push((replica, *digest)),
                (None, None) => digests.extend(digest(tensor, &mut packed).map(|digest| (replica, digest))),
            }
        }
        digests
    }

    fn leave(&mut self, index: usize, tensor: &Tensor<'_>, detect: bool, packed: &mut Vec<u8>) {
        self.writable = true;
        if detect {
            self.expected.extend(digest(tensor, packed).map(|digest| (index, digest)));
        }
    }

    /// The captured bytes of a tensor.
    pub fn get(&self, tensor: usize) -> Option<&[u8]> {
        let found = self.tensors.binary_search_by_key(&tensor, |(index, _)| *index).ok()?;
        self.bytes.get(self.tensors[found].1.clone())
    }
}

/// Digests a tensor. None if its source hands out no bytes.
fn digest(tensor: &Tensor<'_>, packed: &mut Vec<u8>) -> Option<Digest> {
    let mut digest = None;
    read(tensor, packed, |bytes| {
        digest = Some(digest.unwrap_or(Digest::EMPTY).then(Digest::of(bytes), bytes.len() as u64));
    });
    digest
}

/// Passes the bytes of a tensor to `take`, all at once. If they first have to be packed, passes them in
/// pieces, through the buffer `packed`.
fn read(tensor: &Tensor<'_>, packed: &mut Vec<u8>, mut take: impl FnMut(&[u8])) {
    let len = tensor.location.bytes() as usize;
    if len == 0 {
        return take(&[]);
    }
    let strided = tensor.strided_on_host();
    tensor.read(&mut |from| {
        let Some(strided) = &strided else {
            // SAFETY: the source hands out all its bytes, and nothing writes them while `read` runs.
            return take(unsafe { std::slice::from_raw_parts(from, len) });
        };
        packed.resize(packed.len().max(len.min(PIECE)), 0);
        for at in (0..len).step_by(PIECE) {
            let piece = &mut packed[..PIECE.min(len - at)];
            // SAFETY: the source hands out all its elements, and nothing writes them while `read` runs.
            unsafe { strided.gather(from, at..at + piece.len(), piece.as_mut_ptr()) };
            take(piece);
        }
    });
}
