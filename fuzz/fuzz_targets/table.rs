//! Any bytes as the table of a step, with the right digests: no panic, bounded memory, and what is accepted
//! is found again.
#![no_main]

use ashore::Attempt;
use ashore::internal::format::index::Index;
use ashore::internal::format::manifest::{Manifest, Sealed, TableEntry};
use ashore::internal::format::table::{InMemory, resealed};
use ashore_fuzz::bounded;
use std::sync::Arc;

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    let (bytes, digest) = resealed(input.to_vec());
    let entry = TableEntry { name: "tensors.table".into(), length: bytes.len() as u64, digest };
    let manifest = Manifest { tables: vec![entry], ..Manifest::new(7, Attempt::default()) };
    let medium = Box::new(Arc::new(InMemory::new("tensors.table", bytes)));
    // The cache of pages has a size of its own.
    bounded(input.len() + (4 << 10), || {
        let Ok(index) = Index::new(Sealed::Two(manifest), medium) else { return };
        let sound = index.check().is_ok();
        if let (true, Ok(tensors)) = (sound, index.some(0..index.tensors())) {
            for tensor in tensors {
                assert_eq!(index.find(&tensor.name).unwrap(), Some(tensor));
            }
        }
    });
});
