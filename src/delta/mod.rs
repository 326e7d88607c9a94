//! The difference between two states of a tensor, bit for bit, and its application to the older state.
//!
//! A *patch* describes one tensor after an update, in one of four ways ([`How`]): the changed elements as
//! gaps or as a bitmap, with their changes in units in the last place; indices and values; or the whole
//! tensor.
//! **Exactness.** Elements are integers of their width: NaN payloads, signs of zero and every other bit
//! pattern are kept.
//! **Checks.** [`check`] reads a patch and the older bytes, and writes nothing. It finds every contradiction
//! in the patch, and computes the digest of the result from the digest of the older bytes, because a CRC is
//! linear. [`apply`] then writes.
//! **Memory.** A patch is at most about as long as its tensor. Lengths in a file are compared with that limit
//! before anything is read.
//!
//! Modules: `number` (elements as integers), `positions` and `values` (the columns), `encode`, `apply`,
//! `linear` (digests), `pack` (compression), `manifest` (the files of a version).

mod apply;
mod encode;
mod linear;
mod manifest;
mod number;
mod pack;
mod positions;
mod values;

#[cfg(test)]
mod tests;

pub use apply::{apply, check, visit};
pub use encode::encode;
pub use manifest::{Base, Column, Entry, FILE, Manifest, is_delta};
pub use number::Numbers;
pub use pack::{pack, unpack};

use serde::{Deserialize, Serialize};

/// The form in which a delta is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Form {
    /// Gaps and differences in units in the last place, a byte each: about 1 % of the size of a model if 1 %
    /// of its elements changed. For local disks and fast networks.
    #[default]
    Packed,
    /// Indices and values, as `index_copy_` and the sparse patches of inference servers use them: about three
    /// times as long as `Packed`.
    Indices,
    /// `Packed`, and each column compressed by zstd: for networks below 1 GB/s. Needs the feature `zstd`.
    Zstd,
}

/// How the patch of one tensor describes the changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum How {
    /// `gaps` between changed elements, and `ulps`.
    Sparse,
    /// A `bitmap` of changed elements, and `ulps`.
    Bitmap,
    /// `indices` of changed elements, and their `values`.
    Indices,
    /// All bytes of the tensor.
    Whole,
}

impl How {
    /// The suffixes of the names of its columns. The column of a whole tensor has the tensor's own name.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Sparse => &[".gaps", ".ulps"],
            Self::Bitmap => &[".bitmap", ".ulps"],
            Self::Indices => &[".indices", ".values"],
            Self::Whole => &[""],
        }
    }
}

/// The change of one tensor in an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The form of its columns.
    pub how: How,
    /// The number of elements that changed. For a whole tensor, all of its elements.
    pub changed: u64,
    /// One column for each of [`How::columns`].
    pub columns: Vec<Vec<u8>>,
}

impl Patch {
    /// The length of its columns in bytes.
    pub fn bytes(&self) -> usize {
        self.columns.iter().map(Vec::len).sum()
    }
}

/// The maximum length of a column of a patch of `elements` of `width` bytes, before compression.
pub fn longest(how: How, column: usize, elements: u64, width: u64, changed: u64) -> u64 {
    let changed = changed.min(elements);
    match (how, column) {
        (How::Sparse, 0) => changed.saturating_add(elements / 255),
        (How::Bitmap, 0) => elements.div_ceil(8),
        (How::Sparse | How::Bitmap, _) => changed.saturating_mul(1 + width),
        (How::Indices, 0) => changed.saturating_mul(8),
        (How::Indices, _) => changed.saturating_mul(width),
        (How::Whole, _) => elements.saturating_mul(width),
    }
}
