//! Invariants of every checkpoint, checked before a publish and whenever a checkpoint is opened.
//!
//! A manifest that passes has these properties. It names only plain files of its own directory. Slices of the
//! right size cover every tensor exactly once. The slices in a file are contiguous from the end of its header
//! to its last byte, as safetensors requires. So offsets and lengths of a checked manifest never lead a
//! reader outside the files and tensors, whatever program wrote the manifest.

use super::entries::{FileEntry, MANIFEST, SliceEntry, TensorEntry, block_count};
use super::tiling;
use crate::error::{Error, Result};
use crate::state::Layout;
use std::borrow::Borrow;
use std::collections::HashSet;

/// Maximum length of a shard's header with its prefix.
const MAX_DATA: u64 = 100_000_008;

/// Maximum length of a file that is not a shard.
const MAX_PLAIN: u64 = 1 << 32;

/// Checks files and tensors, which are the same for all saves of one structure.
///
/// # Errors
/// `Corrupt`, with file, tensor and range of the violation.
pub(crate) fn check_layout(files: &[impl Borrow<FileEntry>], tensors: &[impl Borrow<TensorEntry>]) -> Result<()> {
    check_part(files, tensors)?;
    match tensors.iter().find(|tensor| !covers((*tensor).borrow())) {
        Some(tensor) => Err(broken(tensor.borrow(), "slices do not cover a tensor exactly once")),
        None => Ok(()),
    }
}

/// Checks the files and tensors that one of several ranks writes. This rank need not have all of a tensor.
///
/// # Errors
/// As [`check_layout`].
pub(super) fn check_part(files: &[impl Borrow<FileEntry>], tensors: &[impl Borrow<TensorEntry>]) -> Result<()> {
    check_files(files.iter().map(Borrow::borrow))?;
    for pair in tensors.windows(2) {
        if let [a, b] = pair
            && a.borrow().name >= b.borrow().name
        {
            let (a, b) = (&a.borrow().name, &b.borrow().name);
            return Err(Error::corrupt(format!("tensors are not in order tensor={b:?} after={a:?}")));
        }
    }
    for tensor in tensors {
        check_slices(tensor.borrow(), |file| files.get(file).map(Borrow::borrow))?;
    }
    check_ranges(files, tensors)
}

/// Checks a tensor alone: its name, that its slices are inside the files and their digests complete, and that
/// the slices cover the tensor exactly once.
///
/// # Errors
/// `Corrupt`, with tensor, file and range of the violation.
pub(super) fn check_tensor<'f>(tensor: &TensorEntry, file: impl Fn(usize) -> Option<&'f FileEntry>) -> Result<()> {
    check_slices(tensor, file)?;
    if covers(tensor) { Ok(()) } else { Err(broken(tensor, "slices do not cover a tensor exactly once")) }
}

/// Checks a tensor's name, and that its slices are in their files and in the tensor.
fn check_slices<'f>(tensor: &TensorEntry, file: impl Fn(usize) -> Option<&'f FileEntry>) -> Result<()> {
    if tensor.name.is_empty() || tensor.name == "__metadata__" {
        return Err(broken(tensor, "a tensor cannot have this name"));
    }
    for slice in &tensor.slices {
        let missing = || broken(tensor, &format!("a slice is in a file that is not there number={}", slice.file));
        check_slice(file(slice.file).ok_or_else(missing)?, tensor, slice)?;
    }
    Ok(())
}

/// Checks the names and lengths of the files of a step.
///
/// # Errors
/// `Corrupt`, naming the file.
pub(super) fn check_files<'f>(files: impl IntoIterator<Item = &'f FileEntry>) -> Result<()> {
    let mut names = HashSet::new();
    let mut total = 0_u64;
    for file in files {
        let refuse = |why: &str| Err(Error::corrupt(format!("{why} file={:?}", file.name)));
        if !is_plain(&file.name) || file.name == MANIFEST {
            return refuse("a file cannot have this name");
        }
        // A file system that ignores case treats two spellings as one file.
        if !names.insert(file.name.to_ascii_lowercase()) {
            return refuse("two files have the same name");
        }
        // Lengths must add up without overflow. The length of files that are read whole, or have no digests
        // of parts, is bounded.
        let (data, length) = (file.data, file.length);
        total = total.saturating_add(length);
        let sound = if data == 0 { length <= MAX_PLAIN } else { data <= length && data <= MAX_DATA };
        if !sound || i64::try_from(total).is_err() {
            return refuse(&format!("a file cannot have this length data={data} length={length}"));
        }
    }
    Ok(())
}

/// Returns true for names that are one path component on every medium and are not hidden.
fn is_plain(name: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_');
    name.len() <= 255 && name.bytes().all(plain) && name.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric())
}

fn broken(tensor: &TensorEntry, why: &str) -> Error {
    Error::corrupt(format!("{why} tensor={:?} shape={:?}", tensor.name, tensor.shape))
}

fn check_slice(file: &FileEntry, tensor: &TensorEntry, slice: &SliceEntry) -> Result<()> {
    let refuse = |why: &str| {
        let SliceEntry { offset, length, at, shape, .. } = slice;
        let place = format!("file={:?} offset={offset} length={length} at={at:?} extent={shape:?}", file.name);
        Err(broken(tensor, &format!("{why} {place}")))
    };
    if file.data == 0 {
        return refuse("a slice is in a file that is not a shard");
    }
    if slice.offset < file.data || slice.offset.checked_add(slice.length).is_none_or(|end| end > file.length) {
        return refuse("a slice is outside the data of its file");
    }
    let extents = slice.at.iter().zip(&slice.shape).map(|(at, extent)| at.checked_add(*extent));
    let inside = extents.zip(&tensor.shape).all(|(end, dim)| end.is_some_and(|end| end <= *dim));
    if !inside || slice.at.len() != tensor.shape.len() || slice.shape.len() != tensor.shape.len() {
        return refuse("a slice is outside its tensor");
    }
    if Layout::new(tensor.dtype, &slice.shape).bytes().ok() != Some(slice.length) {
        return refuse("a slice has not the length of its dtype and shape");
    }
    if slice.blocks.len() != block_count(slice.length) {
        return refuse(&format!("a slice has the wrong number of digests blocks={}", slice.blocks.len()));
    }
    Ok(())
}

/// Returns true when the slices, each inside the tensor, cover it exactly once.
pub(super) fn covers(tensor: &TensorEntry) -> bool {
    match &tensor.slices[..] {
        [] => false,
        [whole] => whole.at.iter().all(|&at| at == 0) && whole.shape == tensor.shape,
        several => {
            // A header has one entry for each tensor name.
            let files: HashSet<usize> = several.iter().map(|s| s.file).collect();
            let boxes = several.iter().map(|s| (&s.at[..], &s.shape[..]));
            files.len() == several.len() && tiling::check(&tensor.shape, boxes).is_ok()
        }
    }
}

/// Checks that the slices of each shard are contiguous, from the end of its header to its own end.
fn check_ranges(files: &[impl Borrow<FileEntry>], tensors: &[impl Borrow<TensorEntry>]) -> Result<()> {
    let mut ranges = Vec::with_capacity(tensors.len());
    for (i, tensor) in tensors.iter().enumerate() {
        ranges.extend(tensor.borrow().slices.iter().map(|s| (s.file, s.offset, s.length, i)));
    }
    ranges.sort_unstable();
    let mut ends: Vec<u64> = files.iter().map(|f| f.borrow().data).collect();
    for (file, offset, length, i) in ranges {
        let (Some(end), Some(entry), Some(tensor)) = (ends.get_mut(file), files.get(file), tensors.get(i)) else {
            continue;
        };
        let (entry, tensor) = (entry.borrow(), tensor.borrow());
        if offset != *end {
            let what = if offset < *end { "slices overlap" } else { "there is a hole before a slice" };
            let place = format!("file={:?} offset={offset} length={length} expected={end}", entry.name);
            return Err(broken(tensor, &format!("{what} {place}")));
        }
        *end += length;
    }
    match files.iter().map(Borrow::borrow).zip(ends).find(|(file, end)| file.data > 0 && *end != file.length) {
        Some((file, end)) => {
            let (name, length) = (&file.name, file.length);
            Err(Error::corrupt(format!("a file has bytes of no tensor file={name:?} range={end}..{length}")))
        }
        None => Ok(()),
    }
}
