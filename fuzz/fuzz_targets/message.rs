//! Any bytes as what ranks send each other and leave for each other on the storage, as they are and with the
//! right digest: no panic, bounded memory, and what is accepted is written again as it was.
#![no_main]

use ashore::internal::digest::Digest;
use ashore::internal::messages;
use ashore::internal::plan::{Description, Share};
use ashore_fuzz::bounded;

fn sealed(begin: &[u8], input: &[u8]) -> Vec<u8> {
    let mut bytes = [begin, input].concat();
    let digest = Digest::of(&bytes).to_bits();
    bytes.extend_from_slice(&digest.to_le_bytes());
    bytes
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    bounded(input.len(), || messages::read(input));
    let with_digest = sealed(b"", input);
    bounded(with_digest.len(), || messages::read(&with_digest));

    let _ = bounded(input.len(), || (Description::decode(input), Share::decode(input)));
    let plan = sealed(b"ashplan\x01", input);
    if let Ok(description) = bounded(plan.len(), || Description::decode(&plan)) {
        let (again, _) = description.encode().unwrap();
        assert_eq!(Description::decode(&again).unwrap(), description);
    }
    let part = sealed(b"ashpart\x01", input);
    if let Ok(share) = bounded(part.len(), || Share::decode(&part)) {
        assert_eq!(Share::decode(&share.encode().unwrap()).unwrap(), share);
    }
});
