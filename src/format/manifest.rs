//! `manifest.json`: every file, tensor, value and digest of a step.
//!
//! It is JSON that begins with its version and ends with its own digest, so that a flipped bit anywhere in it is noticed,
//! and so that a later version can be told from damage.

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

/// Tensors longer than this have a digest for each piece of this many bytes, so that a slice can be checked without the rest.
pub const BLOCK: u64 = 8 << 20;

/// The version of the format that this library writes and reads.
pub const VERSION: u32 = 1;

/// How every manifest begins, whatever its version.
const BEGIN: &[u8] = br#"{"format":"ashore","version":"#;

/// What stands before the manifest's own digest; the digest covers everything up to its end.
const BEFORE_DIGEST: &[u8] = br#","digest":""#;

/// What stands after it, at the end of the file.
const END: &[u8] = b"\"}\n";

/// How many bytes [`seal`] adds.
pub(super) const SEAL: usize = BEFORE_DIGEST.len() + 16 + END.len();

/// True for bytes that begin as manifests of this library do, damaged or not.
pub fn is_ours(bytes: &[u8]) -> bool {
    bytes.starts_with(BEGIN)
}

/// True for the beginning of a manifest of which nothing was written but a part of [`BEGIN`]: empty, cut, or
/// zeros.
pub(crate) fn is_blank(head: &[u8]) -> bool {
    BEGIN.starts_with(head) || head.iter().all(|byte| *byte == 0)
}

/// How many block digests a slice of `length` bytes has.
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

/// The same where the last [`SEAL`] bytes are room for it.
pub(super) fn seal_in_place(bytes: &mut [u8]) {
    let (text, seal) = bytes.split_at_mut(bytes.len() - SEAL);
    let mut digest = Digest::of(text);
    digest = digest.then(Digest::of(BEFORE_DIGEST), BEFORE_DIGEST.len() as u64);
    for (to, from) in seal.iter_mut().zip([BEFORE_DIGEST, &digest.to_hex(), END].into_iter().flatten()) {
        *to = *from;
    }
}

/// The text that was given to [`seal`], if its digest is right.
fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (text, digest) = bytes.strip_suffix(END)?.split_last_chunk::<16>()?;
    let digest = Digest::from_hex(digest)?;
    let intact = digest == Digest::of(text) || mutant::on(Mutant::DigestCheck);
    if intact { text.strip_suffix(BEFORE_DIGEST) } else { None }
}

/// A checkpoint as the manifest describes it. Only [`Manifest::parse`] reads one with all the checks.
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
    /// Every file of the step but the manifest.
    pub files: Vec<FileEntry>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<TensorEntry>,
}

impl Manifest {
    /// Reads a manifest, and checks its digest and everything in [`invariants`]. Memory is at most a constant times the
    /// length of `bytes`.
    ///
    /// # Errors
    /// `Corrupt` for anything but the bytes of a manifest; `Invalid` for an intact one of another version.
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

    /// The bytes of `manifest.json`. Nothing is checked. For many saves of one structure, see [`ManifestTemplate`].
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

/// The version, from the beginning of a manifest.
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
    /// Where tensor data begins: the length of the safetensors header with its prefix. 0: not a shard.
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
    /// Where its bytes are. Today one slice that covers the tensor.
    pub slices: Vec<SliceEntry>,
}

/// A contiguous run of a tensor's bytes in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SliceEntry {
    /// Index into `files`.
    pub file: usize,
    /// Where the bytes begin in the file.
    pub offset: u64,
    /// How many there are.
    pub length: u64,
    /// Where the slice begins in the tensor, per dimension.
    pub at: Vec<usize>,
    /// The shape of the slice.
    pub shape: Vec<usize>,
    /// The digest of the bytes.
    pub digest: Digest,
    /// The digest of each [`BLOCK`] of them; empty when there is only one.
    pub blocks: Vec<Digest>,
}
