//! What a device does when a save is asked for, in the order of the streams that wrote the tensors: it captures small tensors, so
//! that they may change before the fence, and for the first saves digests the others, so that a forgotten fence is found out.
//!
//! A captured tensor is from then on read where it was put, in the *capture pool*; everybody else sees a tensor of the device as any other.
//! An allocation of the pool is kept by its save until no copy from it is queued, no kernel of a fence will read it and what is to be
//! written there has been; allocations that are kept do not overlap, and the program knows no address in the pool.

use crate::device::{Digests, Kernels, Piece, Pieces, Queued, View};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::state::{Capture, Layout, Place, StateDict, Tensor};
use crate::sync::{Mutex, lock};
use smallvec::SmallVec;
use std::sync::Arc;

/// Tensors of at most this many bytes are captured at `save` while the pool has space.
const SMALL: u64 = 128 << 10;
/// Where tensors begin in the pool.
const ALIGN: u64 = 16;

/// Tensors, and the digests of them that a device was asked for.
type Asked = Vec<(Vec<usize>, Arc<dyn Digests>)>;

/// What a device did at `save`.
#[derive(Default)]
pub(crate) struct OnDevice {
    /// Some tensor is left to the fence.
    pub left: bool,
    /// Small tensors left to the fence because the pool had no space.
    pub over_budget: usize,
    expected: Asked,
    /// Where captured tensors are. Kept until nothing reads them any more, which may be later than their sources are dropped.
    pub allocation: Option<Allocation>,
    /// Some tensor is not digested that was to be.
    pub blind: bool,
    /// What was queued in streams of the program, and reads sources until it has run.
    pub queued: Vec<Arc<dyn Queued>>,
}

impl OnDevice {
    /// The digests at `save` of tensors that are left to the fence, by their index in the state dict, once it is staged.
    ///
    /// # Errors
    /// `Device`: it told none, or is lost by now.
    pub fn expected(&self) -> Result<Vec<(usize, Digest)>> {
        let mut all = Vec::new();
        for (tensors, digests) in &self.expected {
            all.extend(tensors.iter().copied().zip(digests.take()?));
        }
        Ok(all)
    }
}

/// Refuses what only kernels could do, where there are none.
///
/// # Errors
/// `Invalid`, naming the tensor and `why`.
pub(crate) fn without_kernels(state: &StateDict<'_>, why: &str, done: &mut OnDevice) -> Result<()> {
    let on_device = |tensor: &Tensor<'_>| tensor.place.stream().is_some();
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

/// Has the device capture what is to be captured of `state`, and with `detect` digest the rest. What was queued is in `done` also
/// where this fails.
///
/// # Errors
/// `Invalid`, naming the tensor, when it cannot be packed, or a capture that was asked for is not possible; `Busy` when there will be
/// room for it later; `Device`.
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
        // Also where that failed: what was queued is still to be written there.
        done.queued[before..].iter().for_each(|queued| allocation.wait_for(queued.clone()));
        queued?;
        for (index, end) in captured {
            let tensor = &mut state.tensors[index];
            tensor.captured_at = Some(pool.start + end - tensor.place.bytes());
        }
        done.allocation = Some(allocation);
    }
    if detect && let Err(error) = digest(kernels, state, done) {
        if error.kind() != ErrorKind::Device {
            return Err(error);
        }
        done.blind = true;
        tracing::warn!(
            error = format_args!("{error:#}"),
            "tensors of a device are not digested; a forgotten fence would not be noticed"
        );
    }
    Ok(())
}

/// Refuses tensors that lie apart where nothing can put them together.
fn refuse_apart(ordinal: u32, room: u64, state: &StateDict<'_>) -> Result<()> {
    for (name, tensor) in &state.tensors {
        let Place::Device { bytes, stream } = tensor.place else { continue };
        if bytes > 0 && tensor.strides().is_some() && (stream.ordinal != ordinal || room == 0) {
            let (why, device) = ("cannot be gathered on its device, make it contiguous", stream.ordinal);
            return Err(Error::invalid(format!("{why} device=cuda:{device} gather={room} tensor={name:?}")));
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
            if tensor.place.stream() == Some(*stream) {
                let to = pool.start + end - tensor.place.bytes();
                pieces.add(name, tensor, Part { at: 0, bytes: tensor.place.bytes(), to, chunk: 0 })?;
            }
        }
        if !pieces.list.is_empty() {
            kernels.capture(*stream, &pieces, queued)?;
        }
    }
    Ok(())
}

/// Which tensors are captured, and where the place of each in the pool ends; those that were asked for come first.
fn choose(
    ordinal: u32,
    room: u64,
    span: (u64, u64),
    state: &StateDict<'_>,
    done: &mut OnDevice,
) -> Result<Vec<(usize, u64)>> {
    let (mut end, last) = (span.0, span.0 + span.1);
    let asks = |tensor: &&Tensor<'_>| {
        let home = tensor.place.stream().is_some_and(|stream| stream.ordinal == ordinal);
        home && tensor.capture == Some(Capture::AtSave)
    };
    let bytes = |tensor: &Tensor<'_>| tensor.place.bytes().next_multiple_of(ALIGN);
    let wanted = state.tensors.values().filter(asks).fold(0_u64, |sum, tensor| sum.saturating_add(bytes(tensor)));
    let (mut chosen, mut left) = (Vec::new(), 0);
    for asked in [true, false] {
        for (index, (name, tensor)) in state.tensors.iter().enumerate() {
            let Place::Device { bytes, stream } = tensor.place else { continue };
            if asked != (tensor.capture == Some(Capture::AtSave)) || bytes == 0 {
                continue;
            }
            let home = stream.ordinal == ordinal;
            let after = Some(end.next_multiple_of(ALIGN)).and_then(|at| at.checked_add(bytes)).filter(|&at| at <= last);
            match after.filter(|_| home) {
                Some(after) if asked || (bytes <= SMALL && tensor.capture.is_none()) => {
                    chosen.push((index, after));
                    end = after;
                }
                None if asked && home => {
                    let free = last - end;
                    let wrong = format!("cannot be captured at save: no room on the device bytes={bytes} free={free}");
                    // What earlier saves hold comes back.
                    let kind = if wanted <= room && free < room { ErrorKind::Busy } else { ErrorKind::Invalid };
                    return Err(Error::new(kind, format!("{wrong} asked={wanted} gather={room} tensor={name:?}")));
                }
                None if asked => {
                    let device = stream.ordinal;
                    let wrong = "cannot be captured at save on another device than that of the executor";
                    return Err(Error::invalid(format!("{wrong} device=cuda:{device} tensor={name:?}")));
                }
                fits => {
                    left += 1;
                    let small = bytes <= SMALL && tensor.capture.is_none();
                    done.over_budget += usize::from(home && small && room > 0 && fits.is_none());
                }
            }
        }
    }
    done.left = left > 0;
    Ok(chosen)
}

/// Asks for digests of all tensors that are left to the fence, in the order of their streams.
fn digest(kernels: &dyn Kernels, state: &StateDict<'_>, done: &mut OnDevice) -> Result<()> {
    for stream in state.streams.iter().filter(|stream| stream.ordinal == kernels.ordinal()) {
        let (mut pieces, mut tensors) = (Pieces::default(), Vec::new());
        for (index, (name, tensor)) in state.tensors.iter().enumerate() {
            if tensor.place.stream() == Some(*stream) && tensor.captured_at.is_none() && tensor.place.bytes() > 0 {
                let (bytes, chunk) = (tensor.place.bytes(), tensors.len());
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

/// Part of a tensor: where it begins and how long it is, and where it goes.
pub(super) struct Part {
    pub at: u64,
    pub bytes: u64,
    pub to: u64,
    pub chunk: usize,
}

impl Pieces {
    /// Adds part of a tensor of a device.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, when no kernel knows how it lies.
    pub(super) fn add(&mut self, name: &str, tensor: &Tensor<'_>, part: Part) -> Result<()> {
        let Part { at, bytes, to, chunk } = part;
        let view = match tensor.strides() {
            None => None,
            Some(strides) => {
                let wrong = |why: &str| Error::invalid(format!("{why}, make it contiguous tensor={name:?}"));
                let view = view(&tensor.layout, strides).ok_or_else(|| wrong("too many dimensions that lie apart"))?;
                if !at.is_multiple_of(u64::from(view.item)) {
                    return Err(wrong("elements would be cut"));
                }
                if self.views.last() != Some(&view) {
                    self.views.push(view);
                }
                Some(self.views.len() as u32 - 1)
            }
        };
        let before = self.list.len();
        tensor.read(&mut |from| {
            let from = from.addr() as u64;
            let (from, skip) = if view.is_some() { (from, at) } else { (from + at, 0) };
            self.list.push(Piece { from, skip, to, bytes, view, chunk });
        });
        if self.list.len() == before + 1 {
            return Ok(());
        }
        Err(Error::invalid(format!("a source did not hand out its bytes tensor={name:?}")))
    }
}

/// How a strided tensor lies, in as few dimensions as it takes.
fn view(layout: &Layout, strides: &[i64]) -> Option<View> {
    let mut dims: SmallVec<[(u64, i64); 4]> = SmallVec::new();
    for (&size, &stride) in layout.shape.iter().zip(strides).filter(|(size, _)| **size != 1) {
        let size = size as u64;
        match dims.last_mut() {
            // Rows that follow each other as their elements do are longer rows.
            Some((outer, step)) if i64::try_from(size).is_ok_and(|n| stride.checked_mul(n) == Some(*step)) => {
                (*outer, *step) = (*outer * size, stride);
            }
            _ => dims.push((size, stride)),
        }
    }
    let item = layout.item()? as u32;
    (dims.len() <= View::DIMS && item > 0).then_some(View { item, dims })
}

/// Memory of the device for captured tensors, in allocations of saves.
pub(crate) struct CapturePool {
    start: u64,
    len: u64,
    allocations: Mutex<Vec<Taken>>,
}

/// An allocation, from `begin` to `end` of its pool.
struct Taken {
    begin: u64,
    end: u64,
    /// Nobody will read it any more.
    over: bool,
    /// What writes it.
    writing: Vec<Arc<dyn Queued>>,
}

impl std::fmt::Debug for CapturePool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CapturePool({} bytes)", self.len)
    }
}

impl CapturePool {
    pub fn new(room: std::ops::Range<u64>) -> Arc<Self> {
        Arc::new(Self { start: room.start, len: room.end - room.start, allocations: Mutex::default() })
    }

    /// The longest part that is free: its begin and length. The whole pool when no save needs any: the same addresses again and
    /// again keep the lists of the device the same.
    fn span(&self) -> (u64, u64) {
        let mut allocations = lock(&self.allocations);
        allocations.retain_mut(|taken| !taken.free());
        allocations.sort_unstable_by_key(|taken| taken.begin);
        let ends = std::iter::once(0).chain(allocations.iter().map(|taken| taken.end));
        let begins = allocations.iter().map(|taken| taken.begin).chain(std::iter::once(self.len));
        let gaps = ends.zip(begins).map(|(end, begin)| (end, begin - end));
        gaps.max_by_key(|(_, len)| *len).unwrap_or((0, 0))
    }
}

impl Taken {
    /// Nobody reads it, and what was to be written there is: a save may fail before its tensors are captured.
    fn free(&mut self) -> bool {
        self.writing.retain(|queued| !queued.over());
        self.over && self.writing.is_empty()
    }
}

/// Part of the pool, until it is dropped.
pub(crate) struct Allocation {
    pool: Arc<CapturePool>,
    begin: u64,
}

impl Allocation {
    /// From the begin of a part that is free up to `end`. Regions are taken by one save at a time.
    fn take(pool: &Arc<CapturePool>, begin: u64, end: u64) -> Self {
        let over = mutant::on(Mutant::RoomEarly);
        lock(&pool.allocations).push(Taken { begin, end, over, writing: Vec::new() });
        Self { pool: pool.clone(), begin }
    }

    /// Stays until this has run.
    fn wait_for(&self, queued: Arc<dyn Queued>) {
        self.change(|taken| taken.writing.push(queued));
    }

    fn change(&self, change: impl FnOnce(&mut Taken)) {
        let mut allocations = lock(&self.pool.allocations);
        allocations.iter_mut().find(|taken| taken.begin == self.begin).map(change);
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        self.change(|taken| taken.over = true);
    }
}
