//! The first and the last bytes of a manifest: its version, and its own digest.

use crate::digest::Digest;
use crate::mutant::{self, Mutant};

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
pub(super) fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (text, digest) = bytes.strip_suffix(END)?.split_last_chunk::<16>()?;
    let digest = Digest::from_hex(digest)?;
    let intact = digest == Digest::of(text) || mutant::on(Mutant::DigestCheck);
    if intact { text.strip_suffix(BEFORE_DIGEST) } else { None }
}

/// Parses the version from the beginning of a manifest.
pub(super) fn version(text: &[u8]) -> Option<u64> {
    let rest = text.strip_prefix(BEGIN)?;
    let digits = rest.get(..rest.iter().position(|b| !b.is_ascii_digit())?)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}
