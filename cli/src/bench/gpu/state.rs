//! The saved state on a GPU: the tensors of a workload, in one piece of memory that an optimizer changes in
//! place.
//!
//! The memory is one third each of parameters, first moments and second moments, whatever the names of the
//! tensors in it. So every byte of every tensor changes in every step, with the memory traffic of AdamW, and
//! the state after a number of steps is always the same.

use crate::adamw::Rates;
use crate::bench::workload::{Shape, Workload};
use crate::gpu::{Pinned, Span, Stream, allocate, source};
use ashore::internal::digest::Digest;
use ashore::{Dtype, Result, StateDict};

/// Bytes between tensors, so that no two are one copy: allocators of frameworks leave gaps, too.
const GAP: u64 = 512;
/// One gradient is reused for pieces of this size, because a state may fill most of the device.
const PIECE: u64 = 256 << 20;
/// Bytes digested at once.
const SEGMENT: u64 = 8 << 20;

/// The state and the gradient.
pub struct State {
    tensors: Vec<(String, Dtype, Vec<usize>, Span)>,
    all: Span,
    thirds: [Span; 3],
    gradient: Span,
    pub bytes: u64,
}

impl State {
    /// Allocates the memory, which `stream` will change. It is uninitialised before the first `reset`.
    ///
    /// # Errors
    /// `Device`, when there is not enough memory.
    pub fn new(stream: &Stream, workload: Workload, scale: f64) -> Result<Self> {
        Self::of(stream, workload.shapes(scale))
    }

    /// As [`State::new`], of these tensors.
    pub fn of(stream: &Stream, shapes: Vec<Shape>) -> Result<Self> {
        let (mut places, mut at, mut bytes) = (Vec::new(), 0, 0);
        for (name, half, shape) in shapes {
            let (dtype, item) = if half { (Dtype::BF16, 2) } else { (Dtype::F32, 4) };
            let len = shape.iter().product::<usize>() as u64 * item;
            places.push((name, dtype, shape, at, len));
            at = (at + len + GAP).next_multiple_of(GAP);
            bytes += len;
        }
        let all = allocate(stream, at.next_multiple_of(3 * GAP))?;
        let third = all.bytes / 3;
        let gradient = allocate(stream, third.min(PIECE))?;
        let tensors =
            places.into_iter().map(|(name, dtype, shape, at, len)| Ok((name, dtype, shape, all.part(at, len)?)));
        let tensors = tensors.collect::<Result<_>>()?;
        let thirds = [all.part(0, third)?, all.part(third, third)?, all.part(2 * third, third)?];
        Ok(Self { tensors, all, thirds, gradient, bytes })
    }

    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    /// Returns one piece of memory as long as all tensors.
    pub fn stretch(&self) -> Result<Span> {
        self.all.part(0, self.bytes)
    }

    /// Returns all memory that the kernels access.
    pub fn spans(&self) -> Vec<Span> {
        vec![self.all.clone(), self.gradient.clone()]
    }

    /// Queues the state before the first step.
    pub fn reset(&self, stream: &Stream) -> Result<()> {
        stream.fill(&self.thirds[0], 1, 0.02)?;
        stream.zero(&self.thirds[1])?;
        stream.zero(&self.thirds[2])
    }

    /// Queues the gradient of a step.
    pub fn feed(&self, stream: &Stream, step: u64) -> Result<()> {
        stream.fill(&self.gradient, step + 2, 1.0)
    }

    /// Queues the optimizer, with rates that do not depend on the step, so that a graph can contain them.
    pub fn update(&self, stream: &Stream) -> Result<()> {
        let (whole, piece) = (self.thirds[0].bytes, self.gradient.bytes);
        for from in (0..whole).step_by(piece as usize) {
            let len = piece.min(whole - from);
            let part = |third: &Span| third.part(from, len);
            let [p, m, v] = &self.thirds;
            let tensors = [&part(p)?, &part(m)?, &part(v)?, &self.gradient.part(0, len)?];
            stream.adamw(tensors, Rates::at(100))?;
        }
        Ok(())
    }

    /// Returns the state for a save.
    pub fn dict(&self) -> Result<StateDict<'static>> {
        let mut dict = StateDict::with_capacity(self.len());
        for (name, dtype, shape, span) in &self.tensors {
            dict.tensor(name.as_str(), source(span, *dtype, shape)?)?;
        }
        Ok(dict)
    }

    /// Returns the names of the tensors, in the order of their digests.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|(name, ..)| name.as_str())
    }

    /// Returns the digest of every tensor, copied to the host independently of any save. The tensors must not
    /// change meanwhile.
    pub fn digests(&self, pinned: &mut Pinned) -> Result<Vec<Digest>> {
        let mut sums = vec![Digest::EMPTY; self.len()];
        let (mut batch, mut used) = (Vec::new(), 0);
        let segment = SEGMENT.min(pinned.len());
        for (tensor, (.., span)) in self.tensors.iter().enumerate() {
            for from in (0..span.bytes).step_by(segment as usize) {
                let len = segment.min(span.bytes - from);
                if used + len > pinned.len() {
                    digest(pinned, &mut batch, &mut sums)?;
                    used = 0;
                }
                pinned.fetch(used, &span.part(from, len)?)?;
                batch.push((tensor, used as usize, len as usize));
                used += len;
            }
        }
        digest(pinned, &mut batch, &mut sums)?;
        Ok(sums)
    }
}

/// Adds arrived bytes to the digests of their tensors. `batch` has each piece's tensor, offset and length.
fn digest(pinned: &mut Pinned, batch: &mut Vec<(usize, usize, usize)>, sums: &mut [Digest]) -> Result<()> {
    let bytes = &*pinned.bytes()?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    let mut found = vec![Digest::EMPTY; batch.len()];
    let share = batch.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        for (found, batch) in found.chunks_mut(share).zip(batch.chunks(share)) {
            scope.spawn(move || {
                for (found, &(_, at, len)) in found.iter_mut().zip(batch) {
                    *found = Digest::of(&bytes[at..at + len]);
                }
            });
        }
    });
    for ((tensor, _, len), found) in batch.drain(..).zip(found) {
        sums[tensor] = sums[tensor].then(found, len as u64);
    }
    Ok(())
}
