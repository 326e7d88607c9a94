//! A step that several ranks wrote, made with the functions that their commit calls.

use crate::fixtures::checkpoint::{noise, open};
use ashore::internal::digest::Digest;
use ashore::internal::format::columns::FileRow;
use ashore::internal::format::entries::{FileEntry, MANIFEST, SliceEntry, TensorEntry};
use ashore::internal::format::shard::{HeaderTemplate, Stamp};
use ashore::internal::format::split::{self, Head, files_table, rows_table, tensors_table};
use ashore::{Attempt, Dtype, ErrorKind};
use serde_json::json;
use std::collections::BTreeMap;
use uuid::Uuid;

/// The rows of `w` that each rank has.
const SHARES: [usize; 3] = [3, 1, 4];

/// Names and bytes.
type Files = Vec<(String, Vec<u8>)>;

/// Makes a step of three ranks: `w` is split by rows among them, `bias` is whole on rank 1, `tied` is an
/// alias of `bias`. Returns all files, the manifest last, and the bytes of `w` and `bias`.
fn made() -> (Files, Vec<u8>, Vec<u8>) {
    let head = Head { step: 7, attempt: Attempt::default(), session: Uuid::from_u128(9), generation: 4, world: 3 };
    let (w, bias) = (noise(8 * 5 * 4, 1), noise(6, 2));
    let names = |rank: usize| format!("shard-{rank:05}-model-00001-of-00001.safetensors");
    let (mut files, mut rows, mut slices) = (Vec::new(), Vec::new(), vec![Vec::new(), Vec::new()]);
    let mut at = 0;
    for (rank, share) in SHARES.into_iter().enumerate() {
        let mine = &w[at * 20..(at + share) * 20];
        let shape = [share, 5];
        let mut tensors: Vec<(&str, Dtype, &[usize], &[u8])> = vec![("w", Dtype::F32, &shape, mine)];
        if rank == 1 {
            tensors.push(("bias", Dtype::I16, &[3], &bias));
        }
        let mut end = 0;
        let described: Vec<_> = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                let begin = end;
                end += bytes.len() as u64;
                (*name, *dtype, *shape, begin..end)
            })
            .collect();
        let header = HeaderTemplate::new(described.clone()).unwrap();
        let mut bytes = vec![0; header.len() as usize];
        assert!(header.copy(&Stamp::new(head.step, head.attempt), 0, &mut bytes));
        let mut own = Vec::new();
        for ((name, _, shape, range), (.., content)) in described.into_iter().zip(&tensors) {
            let number = if name == "w" { 2 } else { 0 };
            let start = if name == "w" { vec![at, 0] } else { vec![0] };
            let slice = SliceEntry {
                file: rank,
                offset: header.len() + range.start,
                length: content.len() as u64,
                at: start,
                shape: shape.to_vec(),
                digest: Digest::of(content),
                blocks: vec![],
            };
            slices[usize::from(name == "w")].push(slice.clone());
            own.push((number, slice));
            bytes.extend_from_slice(content);
        }
        own.sort_by_key(|(number, _)| *number);
        let values = [("rng".to_owned(), json!([rank, 2]))].into();
        let own = own.iter().map(|(number, slice)| (*number, slice));
        let (table, entry) = rows_table(&names(rank), own, &values).unwrap();
        let file = FileEntry {
            name: names(rank),
            length: bytes.len() as u64,
            data: header.len(),
            header: Digest::of(&bytes[..header.len() as usize]),
            digest: Digest::of(&bytes),
        };
        let origin = (head.step, head.attempt);
        rows.push(FileRow { entry: file, origin, rows: Some((entry.length, entry.digest)) });
        files.push((names(rank), bytes));
        files.push((entry.name, table));
        at += share;
    }
    let [of_bias, of_w] = <[_; 2]>::try_from(slices).unwrap();
    let tensor = |name: &str, dtype, shape: &[usize], slices| TensorEntry {
        name: name.into(),
        dtype,
        shape: shape.to_vec(),
        slices,
    };
    let structure = [
        tensor("bias", Dtype::I16, &[3], of_bias),
        tensor("tied", Dtype::I16, &[3], vec![]),
        tensor("w", Dtype::F32, &[8, 5], of_w),
    ];
    let (tensors, of_tensors) = tensors_table(&structure, &[(1, 0)].into()).unwrap();
    let (table, of_files) = files_table(&rows).unwrap();
    files.push((of_tensors.name.clone(), tensors));
    files.push((of_files.name.clone(), table));
    let shared = [("epoch".to_owned(), json!(3))].into();
    let manifest = split::manifest(&head, &rows, [of_tensors, of_files], &BTreeMap::new(), &shared).unwrap();
    files.push((MANIFEST.into(), manifest));
    (files, w, bias)
}

#[test]
fn a_step_of_several_ranks_is_listed_and_verified() {
    let (files, _, bias) = made();
    let checkpoint = open(&files).unwrap();
    let lengths: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!((checkpoint.world(), checkpoint.bytes()), (3, lengths as u64));
    let names: Vec<_> = checkpoint.tensors().unwrap().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["bias", "tied", "w"]);
    assert_eq!(checkpoint.tensor("w").unwrap().shape, [8, 5]);
    assert_eq!(checkpoint.read("bias").unwrap(), bias);
    assert_eq!(checkpoint.read("tied").unwrap(), bias, "an alias has its holder's bytes");
    let contents = checkpoint.contents().unwrap();
    let boxes: Vec<_> =
        contents.tensors[2].slices.iter().map(|slice| (slice.file, slice.at[0], slice.shape[0])).collect();
    assert_eq!(boxes, [(0, 0, 3), (1, 3, 1), (2, 4, 4)]);
    checkpoint.check_tables().unwrap();
    let report = checkpoint.verify().unwrap();
    assert!(report.is_sound() && report.tensors == 3 && report.files == 3, "{report:?}");
}

#[test]
fn values_of_one_rank_are_in_its_own_table() {
    let (files, ..) = made();
    let checkpoint = open(&files).unwrap();
    assert_eq!(checkpoint.value_names().collect::<Vec<_>>(), ["epoch"]);
    for rank in 0..3 {
        assert_eq!(checkpoint.values_beside(rank).unwrap(), [("rng".to_owned(), json!([rank, 2]))].into());
    }
}

#[test]
fn every_byte_of_every_file_counts() {
    let (mut files, w, bias) = made();
    let mut flips = 0;
    for file in 0..files.len() {
        for byte in (0..files[file].1.len()).step_by(3) {
            let bit = 1 << (byte % 8);
            files[file].1[byte] ^= bit;
            flips += 1;
            let (name, place) = (files[file].0.clone(), byte);
            match open(&files) {
                Err(error) => {
                    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid), "{name} {place}: {error}")
                }
                Ok(checkpoint) => {
                    assert!(!checkpoint.verify().unwrap().is_sound(), "{name} {place}");
                    for (tensor, bytes) in [("bias", &bias), ("tied", &bias)] {
                        let read = checkpoint.read(tensor);
                        assert!(read.is_err() || read.is_ok_and(|read| read == *bytes), "{name} {place}");
                    }
                }
            }
            files[file].1[byte] ^= bit;
        }
    }
    assert!(flips > 1000 && !w.is_empty());
}

#[test]
fn what_ranks_may_not_write_is_refused() {
    let slice = |at: usize| SliceEntry {
        file: 0,
        offset: 4096,
        length: 8,
        at: vec![at],
        shape: vec![2],
        digest: Digest::EMPTY,
        blocks: vec![],
    };
    let tensor = |slices| [TensorEntry { name: "t".into(), dtype: Dtype::F32, shape: vec![4], slices }];
    let none = BTreeMap::new();
    assert!(tensors_table(&tensor(vec![slice(0), SliceEntry { file: 1, ..slice(2) }]), &none).is_ok());
    for wrong in [vec![], vec![slice(0)], vec![slice(0), SliceEntry { file: 1, ..slice(1) }]] {
        assert_eq!(tensors_table(&tensor(wrong), &none).unwrap_err().kind(), ErrorKind::Internal);
    }
    assert!(tensors_table(&tensor(vec![]), &[(0, 0)].into()).is_err(), "a tensor that is an alias of itself");
    let one = slice(0);
    assert!(rows_table("a.safetensors", [(1, &one), (0, &one)], &BTreeMap::new()).is_err());
}
