//! Targets whose elements are not packed, in host memory and in device memory.
//!
//! Bytes for host memory are copied to their elements as they arrive, as with packed targets. Bytes for a
//! device are sorted into the order in which their elements lie there, after their digest is checked, so that
//! few copies of rows transfer them.
//!
//! # Safety argument
//! The creator of a [`HostTarget`] promises memory at every element for as long as the target lives, and
//! `read_into` owns the target. [`Strides::check`] has found that elements lie apart, so threads that fill
//! different elements never write the same byte; each byte of a tensor is in one part, and each part is
//! filled by one thread. [`HostElements::fill`] refuses bytes beyond the last element.
#![expect(unsafe_code, reason = "writes to raw host memory; argument above")]

use crate::device::RowLayout;
use crate::error::{Error, Result};
use crate::mutant::{self, Mutant};
use crate::state::{Axis, Block, Dtype, Layout, Shape, Step, Strided, lie_apart, rearrange};
use smallvec::SmallVec;
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

/// Host memory at strides that a tensor is read into: a view of torch or NumPy. See
/// [`Targets::host`](super::Targets::host).
///
/// ```
/// use ashore::{CheckpointExecutor, Dtype, HostTarget, HostTensor, StateDict, Targets};
/// # let dir = tempfile::tempdir().unwrap();
/// let executor = CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?;
/// let mut state = StateDict::new();
/// state.tensor("weights", HostTensor::new(vec![1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0], [2, 3]))?;
/// executor.save(1, state)?.wait(std::time::Duration::from_secs(60))?;
///
/// // Columns of a matrix of 3 rows and 4 columns: the elements of a column are 16 bytes apart.
/// let mut matrix = [0.0_f32; 12];
/// // SAFETY: the six elements are in the matrix, which nothing else uses before `read_into` returns.
/// let columns = unsafe { HostTarget::strided(matrix.as_mut_ptr().cast(), Dtype::F32, [2, 3], [4, 16]) };
/// executor.checkpoint(1)?.read_into(Targets::new().host("weights", columns))?;
/// assert_eq!(matrix, [1.0, 4.0, 0.0, 0.0, 2.0, 5.0, 0.0, 0.0, 3.0, 6.0, 0.0, 0.0]);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct HostTarget<'t> {
    pub(super) pointer: HostPointer,
    pub(super) strides: Strides,
    /// The memory is borrowed for `'t`.
    memory: PhantomData<&'t mut ()>,
}

impl HostTarget<'_> {
    /// A target of `shape`: the element with all indices 0 is at `pointer`, and `strides` has the byte
    /// distance of neighbours for each dimension, which may be negative. The tensor or slice must have this
    /// dtype and shape. [`Checkpoint::read_into`](crate::Checkpoint::read_into) refuses any other, and
    /// refuses strides by which elements overlap or dimensions interleave. Each stride must step over all
    /// elements of the dimensions with shorter strides, as in every view of packed memory.
    ///
    /// # Safety
    /// From the call of `read_into` until it returns, the bytes of every element are valid for writes, and
    /// nothing else reads or writes them. [`RawHost::strided`](crate::RawHost::strided) says where elements
    /// lie. Bytes between elements are neither read nor written; another target may use them. The caller
    /// binds the lifetime to that of the memory.
    pub unsafe fn strided(
        pointer: *mut u8,
        dtype: Dtype,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[i64]>,
    ) -> Self {
        let (pointer, strides) = (HostPointer(pointer), Strides::new(dtype, shape, strides));
        Self { pointer, strides, memory: PhantomData }
    }
}

/// The address of an element in host memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct HostPointer(*mut u8);

// SAFETY: the creator of the target promises memory that nothing else uses; see the argument above.
unsafe impl Send for HostPointer {}
// SAFETY: as above; threads fill different elements.
unsafe impl Sync for HostPointer {}

/// Dtype and shape of a target, and its strides in bytes.
#[derive(Clone, Debug)]
pub(super) struct Strides {
    pub dtype: Dtype,
    shape: Shape,
    strides: SmallVec<[i64; 4]>,
}

impl Strides {
    pub fn new(dtype: Dtype, shape: impl AsRef<[usize]>, strides: impl AsRef<[i64]>) -> Self {
        Self { dtype, shape: shape.as_ref().into(), strides: SmallVec::from_slice(strides.as_ref()) }
    }

    /// Checks that a tensor of `shape` fits, and that no two elements share a byte.
    pub fn check(&self, shape: &[usize]) -> Result<()> {
        let (dtype, found, strides) = (self.dtype, &self.shape[..], &self.strides[..]);
        let refuse = |why: String| Err(Error::invalid(format!("{why} dtype={dtype} strides={strides:?}")));
        if found != shape {
            return refuse(format!("a target has the wrong shape expected={shape:?} found={found:?}"));
        }
        match self.item() {
            Some(item) if strides.len() == shape.len() => {
                if lie_apart(item, shape, strides) || mutant::on(Mutant::Overlap) {
                    return Ok(());
                }
                refuse(format!("elements of a target overlap, or its dimensions interleave shape={shape:?}"))
            }
            _ => refuse(format!("only elements of whole bytes have strides, one for each dimension shape={shape:?}")),
        }
    }

    fn item(&self) -> Option<usize> {
        Layout::new(self.dtype, []).item()
    }

    /// Returns the elements of a box of the target, and the offset of the first element. None stands for the
    /// whole target.
    fn part(&self, within: Option<&[Range<usize>]>) -> (i64, Arc<Strided>) {
        let all = |shape: &Shape| shape.iter().map(|&size| 0..size).collect();
        let within: SmallVec<[Range<usize>; 4]> = within.map_or_else(|| all(&self.shape), SmallVec::from);
        let extents: SmallVec<[usize; 4]> = within.iter().map(Range::len).collect();
        // Nothing overflows: `check` has found that every element can be addressed.
        let first = within.iter().zip(&self.strides).map(|(range, stride)| range.start as i64 * stride).sum();
        (first, Arc::new(Strided::new(self.item().unwrap_or(0), &extents, &self.strides)))
    }
}

/// The address of the element of a target whose indices are all 0.
#[derive(Clone, Copy, Debug)]
pub(super) enum Address {
    Host(HostPointer),
    Device { ordinal: u32, address: u64 },
}

impl Address {
    /// Returns the elements of a box within a target, or of all of it, and their length in bytes.
    pub fn elements(self, strides: &Strides, within: Option<&[Range<usize>]>) -> (Elements, u64) {
        let (first, elements) = strides.part(within);
        let bytes = elements.len() as u64;
        let found = match self {
            Self::Host(HostPointer(pointer)) => {
                let pointer = HostPointer(pointer.wrapping_offset(first as isize));
                Elements::Host(HostElements { pointer, elements })
            }
            Self::Device { ordinal, address } => {
                let address = address.wrapping_add_signed(first);
                Elements::Device(DeviceElements { ordinal, address, elements })
            }
        };
        (found, bytes)
    }
}

/// Elements of a target.
pub(super) enum Elements {
    Host(HostElements),
    Device(DeviceElements),
}

/// Elements in host memory.
#[derive(Clone, Debug)]
pub(super) struct HostElements {
    pointer: HostPointer,
    elements: Arc<Strided>,
}

impl HostElements {
    /// Copies `from` to the elements that have the bytes from `place` on of the packed tensor.
    pub fn fill(&self, place: u64, from: &[u8]) -> Result<()> {
        let range = range(&self.elements, place, from.len())?;
        // SAFETY: the argument above; the range is within the tensor, and the file's bytes are in a buffer.
        unsafe { self.elements.scatter(from.as_ptr(), range, self.pointer.0) };
        Ok(())
    }
}

/// Elements in the memory of a device.
#[derive(Clone, Debug)]
pub(super) struct DeviceElements {
    ordinal: u32,
    address: u64,
    elements: Arc<Strided>,
}

/// A copy of rows from a slab to a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct RowCopy {
    /// The offset of the first row in the slab.
    pub from: usize,
    pub ordinal: u32,
    pub to: u64,
    pub layout: RowLayout,
}

impl DeviceElements {
    /// Copies `packed`, the bytes of the packed tensor from `place` on, to `to`, in the order of their
    /// elements in memory. Passes the copies from there to the device to `each`. `to` begins `at` bytes into
    /// a slab.
    pub fn arrange(
        &self,
        place: u64,
        packed: &[u8],
        to: &mut [u8],
        at: usize,
        mut each: impl FnMut(RowCopy),
    ) -> Result<()> {
        let (range, mut inside) = (range(&self.elements, place, packed.len())?, to.len() == packed.len());
        let begin = range.start;
        self.elements.blocks(range, |block| {
            let skip = block.at - begin;
            let Some(to) = to.get_mut(skip..) else { return inside = false };
            let arranged = Arranged::new(block);
            inside &= rearrange(packed, skip + arranged.first, to, arranged.run, arranged.steps());
            let address = self.address.wrapping_add_signed(arranged.place);
            arranged.copies(|from, to, layout| {
                let (from, to) = (at + skip + from, address + to);
                each(RowCopy { from, ordinal: self.ordinal, to, layout });
            });
        });
        if inside { Ok(()) } else { Err(Error::internal("a strided tensor is outside its slab")) }
    }
}

/// A block whose dimensions are in the order of memory, and all run forwards.
struct Arranged {
    /// The offset from the begin of the block, when packed, of the run that is first in memory.
    first: usize,
    /// The offset of that run in memory.
    place: i64,
    run: usize,
    /// Dimensions, innermost first.
    axes: SmallVec<[Axis; 4]>,
}

impl Arranged {
    fn new(Block { place, run, mut axes, .. }: Block) -> Self {
        let (mut first, mut place) = (0, place as i64);
        for axis in axes.iter_mut().filter(|axis| axis.strided < 0) {
            let last = axis.size as isize - 1;
            first += (last * axis.packed) as usize;
            place += (last * axis.strided) as i64;
            (axis.packed, axis.strided) = (-axis.packed, -axis.strided);
        }
        axes.sort_unstable_by_key(|axis| axis.strided);
        Self { first, place, run, axes }
    }

    /// How runs move from the packed tensor to a slab.
    fn steps(&self) -> SmallVec<[Step; 4]> {
        let mut inner = self.run;
        let step = |axis: &Axis| {
            let step = Step { size: axis.size, from: axis.packed, to: inner as isize };
            inner *= axis.size;
            step
        };
        self.axes.iter().map(step).collect()
    }

    /// Passes the copies from the slab to memory to `each`, as two offsets and the rows. The longest
    /// dimension becomes the rows, because each index of the other dimensions takes a copy.
    fn copies(&self, mut each: impl FnMut(usize, u64, RowLayout)) {
        let (mut width, mut apart) = (self.run, self.steps());
        for (step, axis) in apart.iter_mut().zip(&self.axes) {
            (step.from, step.to) = (step.to, axis.strided);
        }
        while apart.first().is_some_and(|step| step.to == width as isize) {
            width *= apart.remove(0).size;
        }
        let pitch = |step: &Step| step.from.max(step.to) as usize <= RowLayout::PITCH_MAX;
        let longest = (0..apart.len()).filter(|&i| pitch(&apart[i])).max_by_key(|&i| apart[i].size);
        let row = Step { size: 1, from: width as isize, to: width as isize };
        let rows = longest.map_or(row, |i| apart.remove(i));
        let layout = RowLayout { width, height: rows.size, from_pitch: rows.from as usize, to_pitch: rows.to as u64 };
        for copy in 0..apart.iter().map(|step| step.size).product() {
            let (mut from, mut to, mut rest) = (0, 0, copy);
            for step in &apart {
                let index = rest % step.size;
                (from, to, rest) =
                    (from + index * step.from as usize, to + index as u64 * step.to as u64, rest / step.size);
            }
            each(from, to, layout);
        }
    }
}

/// Returns the range of `len` bytes from `place` on of packed elements.
fn range(elements: &Strided, place: u64, len: usize) -> Result<Range<usize>> {
    let range = usize::try_from(place).ok().and_then(|place| Some(place..place.checked_add(len)?));
    range
        .filter(|range| range.end <= elements.len())
        .ok_or_else(|| Error::internal(format!("bytes are outside a strided target place={place} len={len}")))
}
