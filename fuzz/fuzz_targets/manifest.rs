//! Any bytes as a manifest, as they are and with the right digest: no panic, bounded memory, and what is
//! accepted is written back as it was read.
#![no_main]

use ashore::internal::format::manifest::Manifest;
use ashore::internal::format::seal::seal;
use ashore_fuzz::bounded;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = bounded(input.len(), || Manifest::parse(input));
    // A whole manifest among the seeds stands for its text.
    let text = input.strip_suffix(b"\"}\n").and_then(|rest| rest.len().checked_sub(27)).map(|len| &input[..len]);
    let sealed = seal(text.unwrap_or(input).to_vec());
    if let Ok(manifest) = bounded(sealed.len(), || Manifest::parse(&sealed)) {
        assert_eq!(Manifest::parse(&manifest.to_bytes().unwrap()).unwrap(), manifest);
    }
});
