//! Restore: reads tensor data (whole tensors, slices, many at once) and checks every byte before returning
//! it.
//!
//! **Protocol.** The requested bytes are split into *parts*, each checked by one digest (a tensor, or a block
//! of a longer one). A tensor that lies in several boxes contributes the parts of each box that the request
//! overlaps. Small neighbours are merged into *pieces* of at most 2 MiB. A thread reads a piece with aligned
//! reads into its own buffer, and copies and digests each run of bytes while it is in the CPU cache. A
//! storage may ask for longer reads and fewer threads (`Access`). **Completion.** `Ok` when all targets are
//! filled and every digest matches. **Errors.** The first error wins and the other threads stop. The contents
//! of the targets are then undefined, and memory allocated for the result is dropped. **Memory.** One buffer
//! of 2 MiB per thread, and the result. For targets in device memory see `device`: two slabs of 8 MiB for
//! each of at most 8 threads, and 8 MiB of pageable memory more if slices go to a device at strides.

mod device;
mod locate;
mod piece;
mod region;
mod share;
mod strided;
mod verify;
mod wanted;

pub use device::DeviceTarget;
pub use locate::{Again, ChangedElement, Located};
pub use strided::HostTarget;
pub use verify::{Damage, Report};

use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::entries::{SliceEntry, TensorEntry};
use crate::mutant::{self, Mutant};
use crate::state::{DeviceStream, Dtype, Element};
use crate::telemetry::meters;
use piece::{Manner, Part, Piece, Space, Window, file_at, pass, visit_all, zeroed};
use share::Memory;
use std::collections::HashSet;
use std::ops::Range;
use std::time::Instant;
use strided::Address;
use wanted::Wanted;

/// A set of targets: the memory that tensors are read into. All targets are read together.
///
/// ```
/// let (mut weights, mut bias) = (vec![0.0_f32; 6], [0_u8; 8]);
/// let targets = ashore::Targets::new().elements("weights", &mut weights).bytes("bias", &mut bias);
/// # drop(targets);
/// ```
#[derive(Default)]
pub struct Targets<'t> {
    targets: Vec<Target<'t>>,
    /// Fail if the checkpoint has a tensor without a target.
    strict: bool,
    /// The streams of targets in device memory.
    streams: Vec<DeviceStream<'static>>,
    /// At least one target's device memory is borrowed.
    borrowed: bool,
}

struct Target<'t> {
    name: String,
    /// None: raw bytes of any dtype.
    dtype: Option<Dtype>,
    /// None: the whole tensor.
    slice: Option<Vec<Range<usize>>>,
    to: Memory<'t>,
}

impl<'t> Targets<'t> {
    /// Creates an empty set of targets.
    pub fn new() -> Self {
        Self::default()
    }

    fn add(
        mut self,
        name: impl Into<String>,
        dtype: Option<Dtype>,
        slice: Option<&[Range<usize>]>,
        to: Memory<'t>,
    ) -> Self {
        self.targets.push(Target { name: name.into(), dtype, slice: slice.map(<[_]>::to_vec), to });
        self
    }

    /// Adds a target: the bytes of tensor `name`, into memory of exactly that length.
    #[must_use]
    pub fn bytes(self, name: impl Into<String>, to: &'t mut [u8]) -> Self {
        self.add(name, None, None, Memory::Host(to))
    }

    /// Adds a target: the elements of tensor `name`, into memory of exactly that length. The dtype must be
    /// that of `T`.
    #[must_use]
    pub fn elements<T: Element>(self, name: impl Into<String>, to: &'t mut [T]) -> Self {
        self.add(name, Some(T::DTYPE), None, Memory::Host(bytemuck::cast_slice_mut(to)))
    }

    /// Adds a target: the bytes of a slice of tensor `name`, row-major, into memory of exactly that length.
    /// See [`Checkpoint::read_slice`].
    #[must_use]
    pub fn slice(self, name: impl Into<String>, slice: &[Range<usize>], to: &'t mut [u8]) -> Self {
        self.add(name, None, Some(slice), Memory::Host(to))
    }

    /// Adds a target: the elements of a slice of tensor `name`, row-major, into memory of exactly that
    /// length. The dtype must be that of `T`.
    #[must_use]
    pub fn slice_elements<T: Element>(self, name: impl Into<String>, slice: &[Range<usize>], to: &'t mut [T]) -> Self {
        self.add(name, Some(T::DTYPE), Some(slice), Memory::Host(bytemuck::cast_slice_mut(to)))
    }

    /// Adds a target: the elements of tensor `name`, into host memory at strides.
    #[must_use]
    pub fn host(self, name: impl Into<String>, to: HostTarget<'t>) -> Self {
        self.on_host(name, None, to)
    }

    /// Adds a target: the elements of a slice of tensor `name`, into host memory at strides. See
    /// [`Checkpoint::read_slice`].
    #[must_use]
    pub fn host_slice(self, name: impl Into<String>, slice: &[Range<usize>], to: HostTarget<'t>) -> Self {
        self.on_host(name, Some(slice), to)
    }

    fn on_host(self, name: impl Into<String>, slice: Option<&[Range<usize>]>, to: HostTarget<'t>) -> Self {
        let HostTarget { pointer, strides, .. } = to;
        self.add(name, None, slice, Memory::Strided { first: Address::Host(pointer), strides })
    }

    /// Refuses a checkpoint that has tensors without a target, for example a checkpoint of a larger or
    /// another program.
    #[must_use]
    pub fn strict(mut self) -> Self {
        self.strict = true;
        self
    }

    /// Adds a target: the bytes of tensor `name`, into device memory of exactly that length. The checkpoint
    /// needs a device. A checkpoint opened by an executor has the executor's device; others get one from
    /// [`Checkpoint::with_device`].
    #[must_use]
    pub fn device(self, name: impl Into<String>, to: impl Into<DeviceTarget<'t>>) -> Self {
        self.on_device(name, None, to.into())
    }

    /// Adds a target: the bytes of a slice of tensor `name`, row-major, into device memory of exactly that
    /// length, packed or [at strides](DeviceTarget::strided). See [`Targets::device`].
    #[must_use]
    pub fn device_slice(
        self,
        name: impl Into<String>,
        slice: &[Range<usize>],
        to: impl Into<DeviceTarget<'t>>,
    ) -> Self {
        self.on_device(name, Some(slice), to.into())
    }

    fn on_device(mut self, name: impl Into<String>, slice: Option<&[Range<usize>]>, to: DeviceTarget<'t>) -> Self {
        self.borrowed |= to.borrowed;
        if !self.streams.contains(&to.stream) {
            self.streams.push(to.stream);
        }
        let DeviceTarget { address, bytes, stream, dtype, strides, .. } = to;
        let ordinal = stream.ordinal;
        let memory = match strides {
            None => Memory::Device { ordinal, address, bytes },
            Some(strides) => Memory::Strided { first: Address::Device { ordinal, address }, strides },
        };
        self.add(name, dtype, slice, memory)
    }
}

impl Checkpoint {
    /// Reads the bytes of tensor `name`: elements in row-major order, little-endian.
    ///
    /// # Errors
    /// `NotFound` when there is no such tensor. `Corrupt`, naming file, tensor and byte range, when the bytes
    /// are not what was written. `Busy` when there is not enough memory for them.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let len = self.tensor(name)?.bytes;
        self.fill(len, |bytes| Targets::new().bytes(name, bytes))
    }

    /// Reads the elements of tensor `name` in row-major order.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and `Invalid`, naming the tensor and both dtypes, when its dtype is not that
    /// of `T`.
    pub fn read_as<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        let entry = self.entry(name)?;
        self.expect_dtype(entry, T::DTYPE)?;
        let len = self.tensor(name)?.bytes / size_of::<T>() as u64;
        self.fill(len, |elements| Targets::new().elements(name, elements))
    }

    /// Reads the bytes of a slice of tensor `name`, row-major. `slice` has one range of indices per
    /// dimension. Only the 8 MiB blocks that overlap the slice are read and checked.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and `Invalid` when the slice does not fit the tensor, or splits a byte of
    /// elements that are smaller than one byte.
    pub fn read_slice(&self, name: &str, slice: &[Range<usize>]) -> Result<Vec<u8>> {
        let len = self.region(self.entry(name)?, Some(slice))?.len();
        self.fill(len, |bytes| Targets::new().slice(name, slice, bytes))
    }

    /// Reads the elements of a slice of tensor `name`, row-major. `slice` has one range of indices per
    /// dimension.
    ///
    /// # Errors
    /// As [`Checkpoint::read_slice`] and [`Checkpoint::read_as`].
    pub fn read_slice_as<T: Element>(&self, name: &str, slice: &[Range<usize>]) -> Result<Vec<T>> {
        let entry = self.entry(name)?;
        self.expect_dtype(entry, T::DTYPE)?;
        let len = self.region(entry, Some(slice))?.len() / size_of::<T>() as u64;
        self.fill(len, |elements| Targets::new().slice_elements(name, slice, elements))
    }

    /// Returns the boxes in which ranks wrote tensor `name`, each as a slice for [`Checkpoint::read_slice`].
    /// A tensor that was written whole has one box. Together the boxes cover the tensor exactly once.
    ///
    /// # Errors
    /// `NotFound` when there is no such tensor.
    pub fn boxes(&self, name: &str) -> Result<Vec<Vec<Range<usize>>>> {
        let ends =
            |slice: &SliceEntry| slice.at.iter().zip(&slice.shape).map(|(&at, &extent)| at..at + extent).collect();
        Ok(self.entry(name)?.slices.iter().map(ends).collect())
    }

    /// Refuses tensors without a target, for strict targets.
    fn refuse_unasked(&self, targets: &[Target<'_>]) -> Result<()> {
        const NAMED: usize = 8;
        let asked: HashSet<&str> = targets.iter().map(|target| target.name.as_str()).collect();
        let mut unasked = self.tensors()?.map(|tensor| tensor.name).filter(|name| !asked.contains(name));
        let first: Vec<&str> = unasked.by_ref().take(NAMED).collect();
        if first.is_empty() {
            return Ok(());
        }
        let count = first.len() + unasked.count();
        let why = "the checkpoint has tensors that no target asks for";
        Err(self.located(Error::invalid(format!("{why} count={count} first={first:?}"))))
    }

    /// Fills every target, in parallel; see [`Checkpoint::with_threads`]. Targets in device memory are filled
    /// by streams of this library, with bytes that are already checked; see [`DeviceTarget`].
    ///
    /// If a target is in device memory, at most 8 threads read. Each thread has two buffers of 8 MiB that are
    /// pinned for the call, or fewer or smaller ones if little is read. If the buffers cannot be pinned, the
    /// restore is slower, and `tracing` reports that.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], [`Checkpoint::read_as`] and [`Checkpoint::read_slice`]. `Invalid`, naming the
    /// tensor, when it has no target and the targets are [strict](Targets::strict), when a target has another
    /// length or shape, when elements of a target with strides overlap, or when a target is in device memory
    /// and the checkpoint has no device. `Invalid` for a stream that is being captured into a graph. Nothing
    /// is read unless every target fits. `Device` when the device fails. `Deadline` when copies to the device
    /// make no progress for as long as [`Checkpoint::with_timeout`] allows. These copies may still end later.
    /// For borrowed memory the call waits until they end.
    pub fn read_into(&self, targets: Targets<'_>) -> Result<()> {
        let began = Instant::now();
        let bytes = self.fill_all(targets)?;
        meters::restored(bytes, began.elapsed());
        Ok(())
    }

    /// Fills every target, and returns how many bytes they have.
    fn fill_all(&self, targets: Targets<'_>) -> Result<u64> {
        let Targets { targets, strict, streams, borrowed } = targets;
        if strict {
            self.refuse_unasked(&targets)?;
        }
        let on_device = targets.iter().find(|target| target.to.is_on_device());
        let first = on_device.map(|target| target.name.clone());
        let parts = self.plan(targets)?;
        let bytes = parts.iter().map(|part| part.to.len()).sum();
        if let Some(first) = first {
            return self.load(parts, &streams, borrowed, &first).map(|()| bytes);
        }
        let visit = |window: &mut Window, mut piece: Piece<Wanted<'_, '_>>| match self.check(window, &mut piece)? {
            Some(wrong) => Err(wrong),
            None => Ok(()),
        };
        visit_all(parts, self.manner(), visit).map(|()| bytes)
    }

    /// How the files of this step are read.
    fn manner(&self) -> Manner {
        Manner::of(self.opened.reading.access(), self.threads)
    }

    /// Passes the bytes of a piece through `space` and compares the digests of its parts. If a second read
    /// may return other bytes, a piece with a wrong digest is read once more. Returns the error for the first
    /// part that is wrong.
    fn check(&self, space: &mut impl Space, piece: &mut Piece<Wanted<'_, '_>>) -> Result<Option<Error>> {
        let mut again = self.manner().again;
        loop {
            pass(space, file_at(&self.opened.files, piece.file)?, piece).map_err(|e| self.unread(e, piece))?;
            let wrong = piece.parts.iter().find(|part| !matches(part.found, part.digest));
            let Some(error) = wrong.map(|part| self.wrong(part)) else { return Ok(None) };
            if !std::mem::take(&mut again) {
                return Ok(Some(error));
            }
            tracing::warn!(error = format_args!("{error:#}"), "bytes with a wrong digest are read once more");
            piece.parts.iter_mut().for_each(Part::again);
        }
    }

    /// Returns the error for a piece that cannot be read.
    fn unread(&self, error: Error, piece: &Piece<Wanted<'_, '_>>) -> Error {
        let first = piece.parts.first().map(|part| part.tensor.name.as_str());
        let wrong = format!("cannot read tensors first={first:?} range={:?}", piece.range);
        self.in_file(Error::new(error.kind(), wrong).with_source(error), piece.file)
    }

    /// Returns the error for a part that cannot be copied to a device.
    fn unloaded(&self, error: Error, part: &Wanted<'_, '_>) -> Error {
        let wrong = format!("cannot copy a tensor to a device tensor={:?} range={:?}", part.tensor.name, part.range);
        self.in_file(Error::new(error.kind(), wrong).with_source(error), part.file)
    }

    /// Returns the error for a part with a wrong digest.
    fn wrong(&self, part: &Wanted<'_, '_>) -> Error {
        let (name, range) = (&part.tensor.name, &part.range);
        let wrong = format!("the bytes of a tensor are not those that were written tensor={name:?} range={range:?}");
        self.in_file(Error::corrupt(wrong), part.file)
    }

    fn fill<T: bytemuck::Zeroable>(&self, len: u64, targets: impl FnOnce(&mut [T]) -> Targets<'_>) -> Result<Vec<T>> {
        let mut out = zeroed(usize::try_from(len).unwrap_or(usize::MAX)).map_err(|e| self.located(e))?;
        self.read_into(targets(&mut out))?;
        Ok(out)
    }

    fn expect_dtype(&self, tensor: &TensorEntry, asked: Dtype) -> Result<()> {
        if tensor.dtype == asked {
            return Ok(());
        }
        let (name, stored) = (&tensor.name, tensor.dtype);
        let wrong = format!("a tensor has another dtype tensor={name:?} stored={stored} asked={asked}");
        Err(self.located(Error::invalid(wrong)))
    }

    fn in_file(&self, error: Error, file: usize) -> Error {
        let name = self.opened.index.file(file).map_or("", |file| &file.entry.name);
        error.with_step(self.step()).with_path(self.path().join(name))
    }
}

/// The only comparison of stored bytes with their digest.
fn matches(found: Digest, written: Digest) -> bool {
    mutant::on(Mutant::DigestCheck) || found == written
}
