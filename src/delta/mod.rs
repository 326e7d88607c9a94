//! The difference between two states of a tensor, bit for bit, and how it is put on top of the older one.
//!
//! A *patch* says what one tensor is after an update, in one of four ways ([`How`]): where its elements
//! changed and by how many units in the last place, as gaps or as a bitmap; indices and values; or the whole
//! tensor.
//! **Exactness.** Elements are integers of their width: NaN payloads, signs of zero and every other bit
//! pattern are kept.
//! **Checks.** [`check`] reads a patch and the older bytes, and writes nothing: it finds every contradiction,
//! and the digest of the result follows from that of the older bytes, because a CRC is linear. [`apply`] then
//! writes.
//! **Memory.** A patch is at most about as long as its tensor; what a file claims is compared with that limit
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

/// How a delta is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Form {
    /// Gaps and differences in units in the last place, a byte each: about 1 % of a model of which 1 % of
    /// the elements changed. For local disks and fast networks.
    #[default]
    Packed,
    /// Indices and values, as `index_copy_` and the sparse patches of inference servers take them: about
    /// three times as long as `Packed`.
    Indices,
    /// `Packed`, and each column compressed by zstd: for networks below 1 GB/s. Needs the feature `zstd`.
    Zstd,
}

/// How the patch of one tensor says what changed.
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
    /// The ends of the names of its columns; the column of a whole tensor has the tensor's own name.
    pub fn columns(self) -> &'static [&'static str] {
        match self {
            Self::Sparse => &[".gaps", ".ulps"],
            Self::Bitmap => &[".bitmap", ".ulps"],
            Self::Indices => &[".indices", ".values"],
            Self::Whole => &[""],
        }
    }
}

/// What one tensor is after an update.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// The form of its columns.
    pub how: How,
    /// The number of elements that changed; of a whole tensor, all of them.
    pub changed: u64,
    /// As many as [`How::columns`] names.
    pub columns: Vec<Vec<u8>>,
}

impl Patch {
    /// The length of its columns in bytes.
    pub fn bytes(&self) -> usize {
        self.columns.iter().map(Vec::len).sum()
    }
}

/// The longest that a column of a patch of `elements` of `width` bytes can be, before compression.
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
