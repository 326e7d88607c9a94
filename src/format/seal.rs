//! The first and the last bytes of a manifest: its version, and its own digest.

use crate::digest::{Digest, Flip, explain};
use crate::error::{Error, Result};
use crate::mutant::{self, Mutant};

/// The version of the format that this library writes.
pub const VERSION: u32 = 2;

/// The first bytes of every manifest, of any version.
const BEGIN: &[u8] = br#"{"format":"ashore","version":"#;

/// The text before the manifest's own digest. The digest covers everything up to the end of this text.
const BEFORE_DIGEST: &[u8] = br#","digest":""#;

/// The text after the digest, which ends the file.
const END: &[u8] = b"\"}\n";

/// Returns true for bytes that begin like a manifest of this library, damaged or not.
pub fn is_ours(bytes: &[u8]) -> bool {
    bytes.starts_with(BEGIN)
}

/// Returns true if at most a part of [`BEGIN`] was written: empty, cut, or zeros.
pub(crate) fn is_blank(head: &[u8]) -> bool {
    BEGIN.starts_with(head) || head.iter().all(|byte| *byte == 0)
}

/// Ends a manifest with its digest. `text` is the JSON text without the closing brace.
pub fn seal(mut text: Vec<u8>) -> Vec<u8> {
    text.extend_from_slice(BEFORE_DIGEST);
    let digest = Digest::of(&text);
    text.extend_from_slice(&digest.to_hex());
    text.extend_from_slice(END);
    text
}

/// Returns the text that was given to [`seal`], if its digest matches.
pub(crate) fn unseal(bytes: &[u8]) -> Option<&[u8]> {
    let (text, digest) = bytes.strip_suffix(END)?.split_last_chunk::<16>()?;
    let digest = Digest::from_hex(digest)?;
    let intact = digest == Digest::of(text) || mutant::on(Mutant::DigestCheck);
    if intact { text.strip_suffix(BEFORE_DIGEST) } else { None }
}

/// Finds the one flipped bit or byte that explains a damaged manifest, in the bytes that its digest covers,
/// or in one digit of the digest. Returns None if there is no such flip, or several.
pub fn flip(bytes: &[u8]) -> Option<Flip> {
    let (text, digits) = bytes.strip_suffix(END)?.split_last_chunk::<16>()?;
    let found = Digest::of(text);
    let differ = || digits.iter().zip(found.to_hex()).enumerate().filter(|(_, (there, digit))| **there != *digit);
    let of_digest = match (differ().count(), differ().next()) {
        (1, Some((place, (there, digit)))) => {
            Some(Flip { offset: (text.len() + place) as u64, mask: u32::from(there ^ digit) })
        }
        _ => None,
    };
    let written = Digest::from_hex(digits);
    let of_text = written.and_then(|written| explain(written, found, text.len() as u64));
    // If one digit is wrong, the text cannot be wrong: its flips would change about half of all digits.
    of_digest.or(of_text.filter(|flip| flip.is_one_byte()))
}

/// Checks the digest of a manifest of any version, and returns its version and its JSON text.
pub(super) fn open(bytes: &[u8]) -> Result<(u64, Vec<u8>)> {
    let Some(text) = unseal(bytes) else {
        let why = "a manifest is damaged or incomplete: its digest does not fit";
        return Err(Error::corrupt(format!("{why} bytes={}", bytes.len())));
    };
    let Some(version) = version(text) else {
        return Err(Error::corrupt("a manifest does not begin with its format and version"));
    };
    let mut json = Vec::with_capacity(text.len() + 1);
    json.extend_from_slice(text);
    json.push(b'}');
    Ok((version, json))
}

/// The error for an intact manifest of a version that this library does not read.
pub(super) fn unknown(version: u64) -> Error {
    let why = "the checkpoint has a version that this library does not read";
    Error::invalid(format!("{why} version={version} supported=1,{VERSION}"))
}

/// Parses the version from the beginning of a manifest.
fn version(text: &[u8]) -> Option<u64> {
    let rest = text.strip_prefix(BEGIN)?;
    let digits = rest.get(..rest.iter().position(|b| !b.is_ascii_digit())?)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}
