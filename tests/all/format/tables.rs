//! Tables in memory, and what readers refuse in them.

use crate::fixtures::checkpoint::table;
use ashore::internal::format::entries::{FileEntry, SliceEntry, TensorEntry};
use ashore::internal::format::index::{Index, Medium};
use ashore::internal::format::manifest::{Manifest, Sealed, TableEntry};
use ashore::internal::format::table::resealed;
use ashore::internal::format::table::{InMemory, Source};
use ashore::{Attempt, Dtype, Error, ErrorKind, Result};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Files in memory.
#[derive(Clone, Debug, Default)]
pub struct Files(pub BTreeMap<String, Vec<u8>>);

impl Medium for Files {
    fn table(&self, name: &str) -> Result<Arc<dyn Source>> {
        let missing = || Error::new(ErrorKind::NotFound, "no such file").with_path(name);
        Ok(Arc::new(InMemory::new(name, self.0.get(name).cloned().ok_or_else(missing)?)))
    }
}

/// The index of a step of one rank.
pub fn single(bytes: Vec<u8>, entry: TableEntry) -> Result<Index> {
    let medium = Files([(entry.name.clone(), bytes)].into());
    let manifest = Manifest { tables: vec![entry], ..Manifest::new(7, Attempt::default()) };
    Index::new(Sealed::parse(&manifest.to_bytes()?)?, Box::new(medium))
}

/// Two tensors of one file, a third one without elements, and their table.
fn sample() -> (Vec<TensorEntry>, Vec<u8>, TableEntry) {
    let mut sample = super::sample();
    let end = sample.files[0].length;
    let slice = SliceEntry {
        file: 0,
        offset: end,
        length: 0,
        at: vec![0, 0],
        shape: vec![0, 3],
        ..sample.tensors[0].slices[0].clone()
    };
    sample
        .tensors
        .insert(1, TensorEntry { name: "none".into(), dtype: Dtype::F32, shape: vec![0, 3], slices: vec![slice] });
    let (bytes, entry) = table((100, sample.attempt), &sample.files, &sample.tensors);
    (sample.tensors, bytes, entry)
}

/// Everything that an index says, if it says it without contradiction.
fn all(index: &Index) -> Result<(Vec<TensorEntry>, Vec<FileEntry>)> {
    index.check()?;
    let files = index.all_files()?.into_iter().map(|file| file.entry.clone()).collect();
    Ok((index.some(0..index.tensors())?.into_iter().cloned().collect(), files))
}

#[test]
fn every_flipped_bit_of_a_table_is_found() {
    let (tensors, bytes, entry) = sample();
    assert_eq!(all(&single(bytes.clone(), entry.clone()).unwrap()).unwrap().0, tensors);
    for bit in 0..8 * bytes.len() {
        let mut flipped = bytes.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        let found = single(flipped, entry.clone()).and_then(|index| index.check());
        assert_eq!(found.expect_err("a bit was flipped").kind(), ErrorKind::Corrupt, "{bit}");
    }
    for length in [0, 7, 8, 4096, bytes.len() - 1, bytes.len() + 1] {
        let mut other = bytes.clone();
        other.resize(length, 0);
        assert_eq!(single(other, entry.clone()).unwrap_err().kind(), ErrorKind::Corrupt, "{length}");
    }
}

#[test]
fn tables_that_lie_with_the_right_digests_are_refused() {
    let (_, bytes, entry) = sample();
    let header = 4096;
    // Where columns begin, as `docs/format.md` orders them: rows, blocks, files, dims, spans, tensors.
    let (rows, blocks) = (header, header + 4 * 32);
    let files = blocks + 2 * 8;
    let (dims, tensors) = (files + 2 * 80, files + 2 * 80 + 4 * 8);
    let lies: [(&str, usize, &[u8]); 12] = [
        ("an offset before the data", rows, &[0, 0]),
        ("a length that the shape has not", rows + 8, &[3]),
        ("blocks that are not there", rows + 24, &[9]),
        ("a file shorter than its data", files + 8, &[1, 0, 0, 0]),
        ("a name of a file beyond the names", files + 80, &[200]),
        ("a dimension too long", dims, &[255; 8]),
        ("names in another order", tensors, &[4]),
        ("counts that fall", tensors + 28 + 4, &[9]),
        ("a dtype that does not exist", tensors + 16, &[22]),
        ("a mesh", tensors + 20, &[2]),
        ("a holder that holds other elements", tensors + 24, &[2]),
        ("a holder beyond the last tensor", tensors + 24, &[9]),
    ];
    for (why, at, with) in lies {
        let mut changed = bytes.clone();
        changed[at..at + with.len()].copy_from_slice(with);
        let (changed, digest) = resealed(changed);
        let found = single(changed, TableEntry { digest, ..entry.clone() }).and_then(|index| all(&index));
        assert_eq!(found.expect_err(why).kind(), ErrorKind::Corrupt, "{why}");
    }
}

proptest! {
    #[test]
    fn a_table_of_any_numbers_is_refused_or_consistent(
        changes in prop::collection::vec((0_usize..900, any::<u8>()), 1..8),
    ) {
        let (_, bytes, entry) = sample();
        let mut changed = bytes;
        let end = changed.len();
        for (at, byte) in changes {
            changed[4096.min(end - 1) + at % (end - 4096)] = byte;
        }
        let (changed, digest) = resealed(changed);
        if let Ok(index) = single(changed, TableEntry { digest, ..entry })
            && let Ok((tensors, _)) = all(&index)
        {
            for (number, tensor) in tensors.iter().enumerate() {
                prop_assert_eq!(index.find(&tensor.name).unwrap(), Some(tensor));
                prop_assert_eq!(index.prefix(&tensor.name).unwrap().start, number);
            }
        }
    }
}

/// Many names are found by one walk, few by searches.
#[test]
fn tensors_are_found_together_as_they_are_one_by_one() {
    let attempt = Attempt::default();
    let mut sample = super::sample();
    let file = FileEntry { length: 4096 + 3000, data: 4096, ..sample.files.swap_remove(0) };
    let tensor = |i: u64| {
        let digest = file.digest;
        let slice =
            SliceEntry { file: 0, offset: 4096 + i, length: 1, at: vec![], shape: vec![], digest, blocks: vec![] };
        TensorEntry { name: format!("t.{:05}", 2 * i), dtype: Dtype::U8, shape: vec![], slices: vec![slice] }
    };
    let tensors: Vec<_> = (0..3000).map(tensor).collect();
    let (bytes, entry) = table((100, attempt), std::slice::from_ref(&file), &tensors);
    for (step, first) in [(1, 0), (1, 5000), (2, 0), (2, 1), (7, 3), (900, 1), (6001, 6000)] {
        // Backwards, and the first one twice.
        let mut names: Vec<String> = (first..6003).step_by(step).map(|i| format!("t.{i:05}")).rev().collect();
        names.push(names[0].clone());
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let (together, alone) =
            (single(bytes.clone(), entry.clone()).unwrap(), single(bytes.clone(), entry.clone()).unwrap());
        let found = together.find_all(&names).unwrap();
        assert_eq!(found.len(), names.len());
        for (name, found) in names.iter().zip(found) {
            assert_eq!(found, alone.find(name).unwrap(), "{name}");
            assert_eq!(
                found.map(|tensor| tensor.name.as_str()),
                (name.ends_with(['0', '2', '4', '6', '8']) && *name < "t.06000").then_some(*name)
            );
        }
    }
    assert!(single(bytes, entry).unwrap().find_all(&[]).unwrap().is_empty());
}
