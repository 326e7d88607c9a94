//! Any bytes as the header of a shard: no panic, bounded memory; an accepted header that is written again is
//! read as the same.
#![no_main]

use ashore::internal::format::header::Header;
use ashore::internal::format::shard::{HeaderTemplate, Stamp, identity};
use ashore_fuzz::bounded;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let whose = bounded(input.len(), || identity(input));
    // The parser does not read the data section, so that may have any length; the last tensor says which.
    let mut header = input.to_vec();
    if let Some(prefix) = header.first_chunk_mut::<8>() {
        *prefix = (input.len() as u64 - 8).to_le_bytes();
    }
    let len = header.len() as u64;
    for data in [0, 1, 24, 4096] {
        let Ok(header) = bounded(header.len(), || Header::parse(&header, len + data)) else { continue };
        assert!(whose.is_err() || whose.as_ref().is_ok_and(|whose| *whose == (header.step, header.attempt)));
        let whole = header.tensors.iter().map(|t| (&t.name[..], t.dtype, &t.shape[..], t.offsets.clone()));
        let boxes = header
            .tensors
            .iter()
            .filter_map(|t| t.at.as_ref().map(|at| (&t.name[..], t.dtype, &t.shape[..], t.offsets.clone(), &at[..])));
        let sharded = header.tensors.iter().any(|t| t.at.is_some());
        let template = if sharded { HeaderTemplate::sharded(boxes) } else { HeaderTemplate::new(whole) };
        let template = template.unwrap();
        let mut again = vec![0; template.len() as usize];
        assert!(template.copy(&Stamp::new(header.step, header.attempt), 0, &mut again));
        assert_eq!(Header::parse(&again, template.len() + data).unwrap(), header);
    }
});
