//! Reading tensor data: whole tensors, slices, many at once; every byte is checked before it is handed out.
//!
//! **Protocol.** What is wanted becomes *parts*, each checked by one digest (a tensor, or a block of a longer one);
//! small neighbours become *pieces* of at most 2 MiB. A thread brings a piece by aligned reads into its own buffer, and
//! copies and digests each run of bytes while it is in the cache. **Completion.** `Ok` when all targets are filled and
//! every digest is right. **Errors.** The first error wins and the other threads stop; nobody knows then what the targets
//! hold, and what a call would have returned is dropped. **Memory.** One buffer of 2 MiB per thread, and what is returned.

mod piece;
mod region;
mod verify;

pub use verify::{Damage, Report};

use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::manifest::{BLOCK, SliceEntry, TensorEntry};
use crate::mutant::{self, Mutant};
use crate::state::{Dtype, Element};
use piece::{Part, Piece, Window, coalesce, file_at, pass, visit_all, zeroed};
use region::Region;
use std::ops::Range;

/// Where tensors are to be read to: any number of them, read together.
///
/// ```
/// let (mut weights, mut bias) = (vec![0.0_f32; 6], [0_u8; 8]);
/// let targets = ashore::Targets::new().elements("weights", &mut weights).bytes("bias", &mut bias);
/// # drop(targets);
/// ```
#[derive(Default)]
pub struct Targets<'t>(Vec<Target<'t>>);

struct Target<'t> {
    name: String,
    /// None: raw bytes, whatever the dtype.
    dtype: Option<Dtype>,
    /// None: the whole tensor.
    slice: Option<Vec<Range<usize>>>,
    to: &'t mut [u8],
}

impl<'t> Targets<'t> {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The bytes of tensor `name`, into memory of exactly that length.
    #[must_use]
    pub fn bytes(mut self, name: impl Into<String>, to: &'t mut [u8]) -> Self {
        self.0.push(Target { name: name.into(), dtype: None, slice: None, to });
        self
    }

    /// The elements of tensor `name`, into memory of exactly that length; the dtype must be that of `T`.
    #[must_use]
    pub fn elements<T: Element>(mut self, name: impl Into<String>, to: &'t mut [T]) -> Self {
        let to = bytemuck::cast_slice_mut(to);
        self.0.push(Target { name: name.into(), dtype: Some(T::DTYPE), slice: None, to });
        self
    }

    /// The bytes of a slice of tensor `name`, row-major, into memory of exactly that length; see
    /// [`Checkpoint::read_slice`].
    #[must_use]
    pub fn slice(mut self, name: impl Into<String>, slice: &[Range<usize>], to: &'t mut [u8]) -> Self {
        self.0.push(Target { name: name.into(), dtype: None, slice: Some(slice.to_vec()), to });
        self
    }
}

impl Checkpoint {
    /// The bytes of tensor `name`: elements in row-major order, little-endian.
    ///
    /// # Errors
    /// `NotFound` when there is no such tensor; `Corrupt`, naming file, tensor and range of bytes, when they are not what
    /// was written; `Busy` when there is no memory for them.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let len = self.tensor(name)?.bytes;
        self.fill(len, |bytes| Targets::new().bytes(name, bytes))
    }

    /// The elements of tensor `name` in row-major order.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and `Invalid`, naming the tensor and both dtypes, when its dtype is not that of `T`.
    pub fn read_as<T: Element>(&self, name: &str) -> Result<Vec<T>> {
        let entry = self.entry(name)?;
        self.expect_dtype(entry, T::DTYPE)?;
        let len = self.tensor(name)?.bytes / size_of::<T>() as u64;
        self.fill(len, |elements| Targets::new().elements(name, elements))
    }

    /// The bytes of a slice of tensor `name`, row-major: one range of indices for each dimension. Only the blocks of
    /// 8 MiB that the slice touches are read and checked.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and `Invalid` when the slice does not fit the tensor, or cuts a byte of elements that
    /// are smaller than one.
    pub fn read_slice(&self, name: &str, slice: &[Range<usize>]) -> Result<Vec<u8>> {
        let len = self.region(self.entry(name)?, Some(slice))?.len();
        self.fill(len, |bytes| Targets::new().slice(name, slice, bytes))
    }

    /// Fills every target, in parallel; see [`Checkpoint::with_threads`].
    ///
    /// # Errors
    /// As [`Checkpoint::read`], [`Checkpoint::read_as`] and [`Checkpoint::read_slice`], and `Invalid`, naming the tensor,
    /// when a target has another length. Nothing is read unless every target fits.
    pub fn read_into(&self, targets: Targets<'_>) -> Result<()> {
        let mut parts = Vec::new();
        for target in targets.0 {
            self.plan(target, &mut parts)?;
        }
        let visit = |window: &mut Window, mut piece: Piece<Wanted<'_, '_>>| {
            pass(window, file_at(&self.opened.files, piece.file)?, &mut piece).map_err(|error| {
                let first = piece.parts.first().map(|part| part.tensor.name.as_str());
                let wrong = format!("cannot read tensors first={first:?} range={:?}", piece.range);
                self.in_file(Error::new(error.kind(), wrong).with_source(error), piece.file)
            })?;
            match piece.parts.iter().find(|part| !matches(part.found, part.digest)) {
                None => Ok(()),
                Some(Wanted { tensor, range, .. }) => {
                    let name = &tensor.name;
                    let wrong = format!("a tensor is not what was written tensor={name:?} range={range:?}");
                    Err(self.in_file(Error::corrupt(wrong), piece.file))
                }
            }
        };
        visit_all(coalesce(parts), self.threads, visit)
    }

    fn fill<T: bytemuck::Zeroable>(&self, len: u64, targets: impl FnOnce(&mut [T]) -> Targets<'_>) -> Result<Vec<T>> {
        let mut out = zeroed(usize::try_from(len).unwrap_or(usize::MAX)).map_err(|e| self.place(e))?;
        self.read_into(targets(&mut out))?;
        Ok(out)
    }

    /// Adds the parts that fill `target`, each with its own share of the target's memory.
    fn plan<'c, 't>(&'c self, target: Target<'t>, parts: &mut Vec<Wanted<'c, 't>>) -> Result<()> {
        let tensor = self.entry(&target.name)?;
        if let Some(dtype) = target.dtype {
            self.expect_dtype(tensor, dtype)?;
        }
        let region = self.region(tensor, target.slice.as_deref())?;
        let mut to = target.to;
        if to.len() as u64 != region.len() {
            let (expected, found) = (region.len(), to.len());
            let wrong = format!("a target has the wrong length tensor={:?} expected={expected}", tensor.name);
            return Err(self.place(Error::invalid(format!("{wrong} found={found}"))));
        }
        let slice = self.only_slice(tensor)?;
        let mut done = 0;
        for (index, (range, digest)) in blocks(slice).enumerate() {
            let origin = index as u64 * BLOCK;
            let end = region.before(origin + (range.end - range.start));
            if end > done {
                let (share, rest) = std::mem::take(&mut to).split_at_mut((end - done) as usize);
                to = rest;
                let region = region.clone();
                let (file, found) = (slice.file, Digest::EMPTY);
                parts.push(Wanted { file, range, digest, found, tensor, region, origin, place: done, to: share });
                done = end;
            }
        }
        Ok(())
    }

    fn region(&self, tensor: &TensorEntry, slice: Option<&[Range<usize>]>) -> Result<Region> {
        let region = match slice {
            None => return Ok(Region::whole(self.only_slice(tensor)?.length)),
            Some(ranges) => Region::slice(tensor.dtype.bitsize(), &tensor.shape, ranges),
        };
        region.map_err(|e| self.place(Error::invalid(format!("{} tensor={:?}", e.message(), tensor.name))))
    }

    fn only_slice<'c>(&self, tensor: &'c TensorEntry) -> Result<&'c SliceEntry> {
        match &tensor.slices[..] {
            [slice] => Ok(slice),
            slices => {
                let wrong = format!("a tensor in several slices cannot be read yet tensor={:?}", tensor.name);
                Err(self.place(Error::invalid(format!("{wrong} slices={}", slices.len()))))
            }
        }
    }

    fn expect_dtype(&self, tensor: &TensorEntry, asked: Dtype) -> Result<()> {
        if tensor.dtype == asked {
            return Ok(());
        }
        let (name, stored) = (&tensor.name, tensor.dtype);
        let wrong = format!("a tensor has another dtype tensor={name:?} stored={stored} asked={asked}");
        Err(self.place(Error::invalid(wrong)))
    }

    fn in_file(&self, error: Error, file: usize) -> Error {
        let name = self.opened.manifest.files.get(file).map_or("", |entry| &entry.name);
        error.with_step(self.step()).with_path(self.path().join(name))
    }
}

/// The one place where stored bytes are compared with what was written.
fn matches(found: Digest, written: Digest) -> bool {
    mutant::on(Mutant::DigestCheck) || found == written
}

/// The runs of a slice that have a digest of their own, as ranges of its file.
fn blocks(slice: &SliceEntry) -> impl Iterator<Item = (Range<u64>, Digest)> {
    let whole = slice.blocks.is_empty().then_some(slice.digest);
    let end = slice.offset + slice.length;
    slice.blocks.iter().copied().chain(whole).enumerate().map(move |(index, digest)| {
        let start = slice.offset + index as u64 * BLOCK;
        (start..end.min(start + BLOCK), digest)
    })
}

/// A part with the share of a target that it fills.
struct Wanted<'c, 't> {
    file: usize,
    range: Range<u64>,
    digest: Digest,
    /// The digest of what was read so far.
    found: Digest,
    tensor: &'c TensorEntry,
    region: Region,
    /// Where `range` begins in the tensor.
    origin: u64,
    /// Where `to` begins in the region.
    place: u64,
    /// What is still to be filled.
    to: &'t mut [u8],
}

impl Part for Wanted<'_, '_> {
    fn file(&self) -> usize {
        self.file
    }

    fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    fn take(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let start = self.origin + (at - self.range.start);
        let end = start + bytes.len() as u64;
        while !self.to.is_empty() {
            let (source, together) = self.region.at(self.place);
            if source >= end {
                break;
            }
            let from = source.checked_sub(start).and_then(|skip| bytes.get(skip as usize..)).unwrap_or_default();
            let len = self.to.len().min(from.len()).min(usize::try_from(together).unwrap_or(usize::MAX));
            if len == 0 {
                return Err(Error::internal("a slice was looked for outside its block"));
            }
            let (now, later) = std::mem::take(&mut self.to).split_at_mut(len);
            now.copy_from_slice(&from[..len]);
            (self.place, self.to) = (self.place + len as u64, later);
        }
        self.found = self.found.then(Digest::of(bytes), bytes.len() as u64);
        Ok(())
    }
}
