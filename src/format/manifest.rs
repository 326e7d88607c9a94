//! `manifest.json`: every file, tensor, value and digest of a step.
//!
//! The manifest is JSON that begins with its version and ends with its own digest. So every flipped bit is
//! detected, and a reader can tell a later version from damage.

use super::{invariants, unique};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub use super::template::{Head, ManifestTemplate};

/// The name of the manifest in a step directory.
pub const MANIFEST: &str = "manifest.json";

/// Tensors longer than this have a digest for each block of this many bytes, so that a reader can check a
/// part without the rest.
pub const BLOCK: u64 = 8 << 20;

/// The version of the format that this library writes and reads.
pub const VERSION: u32 = 1;

/// The first bytes of every manifest, of any version.
const BEGIN: &[u8] = br#"{"format":"ashore","version":"#;

/// The text before the manifest's own digest. The digest covers everything up to the end of this text.
const BEFORE_DIGEST: &[u8] = br#","digest":""#;

/// The text after the digest, which ends the file.
const END: &[u8] = b"\"}\n";

/// The number of bytes that [`seal`] adds.
pub(super) const SEAL: usize = BEFORE_DIGEST.len() + 16 + END.len();

/// Returns true for bytes that begin as a manifest of this library, damaged or not.
pub fn is_ours(bytes: &[u8]) -> bool {
    bytes.starts_with(BEGIN)
}

/// Returns true if at most a part of [`BEGIN`] was written: empty, cut, or zeros.
pub(crate) fn is_blank(head: &[u8]) -> bool {
    BEGIN.starts_with(head) || head.iter().all(|byte| *byte == 0)
}

/// The number of block digests of a slice of `length` bytes.
pub fn block_count(length: u64) -> usize {
    // No file has more than 2^63 bytes, so the count fits.
    if length > BLOCK { length.div_ceil(BLOCK) as usize } else { 0 }
}

/// Ends a manifest with its digest. `text` is the JSON text without the closing brace.
pub fn seal(mut text: Vec<u8>) -> Vec<u8> {
    text.resize(text.len() + SEAL, 0);
    seal_in_place(&mut text);
    text
}

/// Seals in place: the last [`SEAL`] bytes are free for the seal.
pub(super) fn seal_in_place(bytes: &mut [u8]) {
    let (text, seal) = bytes.split_at_mut(bytes.len() - SEAL);
    let mut digest = Digest::of(text);
    digest = digest.then(Digest::of(BEFORE_DIGEST), BEFORE_DIGEST.len() as u64);
    for (to, from) in seal.iter_mut().zip([BEFORE_DIGEST, &digest.to_hex(), END].into_iter().flatten()) {
        *to = *from;
    }
}

/// Returns the text that was given to [`seal`], if its digest matches.
fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (text, digest) = bytes.strip_suffix(END)?.split_last_chunk::<16>()?;
    let digest = Digest::from_hex(digest)?;
    let intact = digest == Digest::of(text) || mutant::on(Mutant::DigestCheck);
    if intact { text.strip_suffix(BEFORE_DIGEST) } else { None }
}

/// The manifest of a step. Only [`Manifest::parse`] checks it in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always "ashore".
    pub format: String,
    /// The version of the format: 1.
    pub version: u32,
    /// The step.
    pub step: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// How many ranks wrote it.
    pub world: u32,
    /// User metadata, encoded by [`crate::state::encode_value`].
    #[serde(deserialize_with = "unique::values")]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Values, encoded by [`crate::state::encode_value`].
    #[serde(deserialize_with = "unique::values")]
    pub values: BTreeMap<String, serde_json::Value>,
    /// Every file of the step except the manifest.
    pub files: Vec<FileEntry>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<TensorEntry>,
}

impl Manifest {
    /// Parses a manifest, and checks its digest and all [`invariants`]. It uses at most a constant times the
    /// length of `bytes` in memory.
    ///
    /// # Errors
    /// `Corrupt` for bytes that are no manifest; `Invalid` for an intact manifest of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let Some(text) = unseal(bytes) else {
            return Err(Error::corrupt(format!(
                "a manifest is damaged or incomplete: its digest does not fit bytes={}",
                bytes.len()
            )));
        };
        let Some(version) = version(text) else {
            return Err(Error::corrupt("a manifest does not begin with its format and version"));
        };
        if version != u64::from(VERSION) {
            return Err(Error::invalid(format!(
                "the checkpoint has a version that this library does not read version={version} supported={VERSION}"
            )));
        }
        let mut json = Vec::with_capacity(text.len() + 1);
        json.extend_from_slice(text);
        json.push(b'}');
        let manifest =
            serde_json::from_slice(&json).map_err(|e| Error::corrupt("a manifest cannot be read").with_source(e))?;
        invariants::check(&manifest)?;
        Ok(manifest)
    }

    /// The bytes of `manifest.json`, unchecked. For many saves of one structure, see [`ManifestTemplate`].
    ///
    /// # Errors
    /// `Internal` when a value is not JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self).map_err(|e| Error::internal("cannot write json").with_source(e))?;
        text.pop();
        Ok(seal(text))
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        let at = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at)
    }
}

/// Parses the version from the beginning of a manifest.
fn version(text: &[u8]) -> Option<u64> {
    let rest = text.strip_prefix(BEGIN)?;
    let digits = rest.get(..rest.iter().position(|b| !b.is_ascii_digit())?)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// A file of the step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Its name: one path component.
    pub name: String,
    /// Its length in bytes.
    pub length: u64,
    /// The offset of tensor data, which is the length of the safetensors header with its prefix; 0 if the
    /// file is not a shard.
    pub data: u64,
    /// The digest of the bytes before `data`.
    pub header: Digest,
    /// The digest of the whole file.
    pub digest: Digest,
}

/// A tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TensorEntry {
    /// Its name: data, never a path.
    pub name: String,
    /// Its dtype, as safetensors spells it.
    pub dtype: crate::state::Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The slices that hold its bytes. Today one slice that covers the tensor.
    pub slices: Vec<SliceEntry>,
}

/// A contiguous run of a tensor's bytes in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceEntry {
    /// Index into `files`.
    pub file: usize,
    /// The offset of the bytes in the file.
    pub offset: u64,
    /// The number of bytes.
    pub length: u64,
    /// The slice's first index in the tensor, per dimension.
    pub at: Vec<usize>,
    /// The shape of the slice.
    pub shape: Vec<usize>,
    /// The digest of the bytes.
    pub digest: Digest,
    /// The digest of each [`BLOCK`] of the bytes; empty when there is only one.
    pub blocks: Vec<Digest>,
}
