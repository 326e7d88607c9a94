//! Any bytes as a manifest, as they are and with the right digest: no panic, bounded memory; an accepted
//! manifest that is written again is read as the same.
#![no_main]

use ashore::internal::format::manifest::Sealed;
use ashore::internal::format::seal::seal;
use ashore_fuzz::bounded;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let _ = bounded(input.len(), || Sealed::parse(input));
    // A seed that is a whole manifest is sealed again without its digest.
    let text = input.strip_suffix(b"\"}\n").and_then(|rest| rest.len().checked_sub(27)).map(|len| &input[..len]);
    let sealed = seal(text.unwrap_or(input).to_vec());
    if let Ok(manifest) = bounded(sealed.len(), || Sealed::parse(&sealed)) {
        let bytes = match &manifest {
            Sealed::One(old) => old.to_bytes(),
            Sealed::Two(manifest) => manifest.to_bytes(),
        };
        assert_eq!(Sealed::parse(&bytes.unwrap()).unwrap(), manifest);
    }
});
