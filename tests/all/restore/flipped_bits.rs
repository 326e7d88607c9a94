use crate::fixtures::checkpoint::{MadeCheckpoint, noise, open};
use ashore::{Dtype, ErrorKind};

fn small(step: u64, shards: usize) -> MadeCheckpoint {
    let mut made = MadeCheckpoint::new(step)
        .tensor("a", Dtype::F32, &[2, 2], noise(16, 1))
        .tensor("b", Dtype::U8, &[], noise(1, 2))
        .tensor("c", Dtype::I16, &[3], noise(6, 3))
        .shards(shards);
    made.values.insert("epoch".into(), 3.into());
    made
}

#[test]
fn every_bit_of_a_shard_and_its_manifest() {
    every_bit(&small(7, 1), &["model.safetensors", "manifest.json"]);
    every_bit(&small(7, 1).version(1), &["model.safetensors", "manifest.json"]);
}

#[test]
fn every_bit_of_an_index_and_its_manifest() {
    every_bit(&small(7, 2), &["model.safetensors.index.json", "manifest.json"]);
    every_bit(&small(7, 2).version(1), &["model.safetensors.index.json", "manifest.json"]);
}

#[test]
fn every_bit_of_a_table() {
    every_bit(&small(7, 2), &["tensors.table"]);
}

fn every_bit(made: &MadeCheckpoint, which: &[&str]) {
    let mut files = made.files();
    let (mut flips, mut by_open) = (0, 0);
    for name in which {
        let file = files.iter().position(|(file, _)| file == name).unwrap();
        for bit in 0..8 * files[file].1.len() {
            files[file].1[bit / 8] ^= 1 << (bit % 8);
            flips += 1;
            match open(&files) {
                Err(error) => {
                    by_open += 1;
                    assert!(matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Invalid), "{name} {bit}: {error}");
                    assert!(error.path().is_some_and(|path| path.ends_with(name)), "{name} {bit}: {error}");
                }
                Ok(checkpoint) => {
                    let report = checkpoint.verify().unwrap();
                    let byte = bit as u64 / 8;
                    let placed = report.damage.iter().all(|d| d.file == *name && d.range.contains(&byte));
                    assert!(!report.is_sound() && placed, "{name} {bit}: {report:?}");
                    for (tensor, (_, _, bytes)) in &made.tensors {
                        match checkpoint.read(tensor) {
                            Ok(read) => assert_eq!(read, *bytes, "{name} {bit}: {tensor}"),
                            Err(error) => {
                                assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
                                assert_eq!(report.damage[0].tensor.as_ref(), Some(tensor), "{name} {bit}");
                            }
                        }
                    }
                }
            }
            files[file].1[bit / 8] ^= 1 << (bit % 8);
        }
    }
    assert!(by_open > 0 && (by_open < flips || which == ["tensors.table"]), "{by_open} of {flips}");
    assert!(open(&files).unwrap().verify().unwrap().is_sound());
}

#[test]
fn every_length_but_the_right_one() {
    let files = small(7, 2).files();
    for file in 0..files.len() {
        let (name, whole) = &files[file];
        for len in (0..whole.len()).chain([whole.len() + 1, whole.len() + 4096]) {
            let mut files = files.clone();
            files[file].1.resize(len, 0);
            let error = open(&files).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{name} {len}: {error}");
            assert!(error.path().is_some_and(|path| path.ends_with(name)), "{name} {len}: {error}");
        }
    }
}

#[test]
fn a_missing_file() {
    let files = small(7, 2).files();
    for missing in 0..files.len() {
        let mut files = files.clone();
        let (name, _) = files.remove(missing);
        let error = open(&files).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "the shards say whose step it was: {error}");
        assert!(error.path().is_some_and(|path| path.ends_with(&name)), "{error}");
    }
}

#[test]
fn shards_of_another_step_or_attempt_or_place() {
    let (mine, other_attempt) = (small(7, 2).files(), small(7, 2).files());
    let mut other_step = small(8, 2);
    other_step.attempt = ashore::Attempt::new();
    for other in [other_attempt, other_step.files()] {
        for shard in 0..2 {
            let mut files = mine.clone();
            assert_eq!(files[shard].1.len(), other[shard].1.len(), "nothing but the bytes gives it away");
            files[shard].1.clone_from(&other[shard].1);
            let error = open(&files).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt);
            assert!(error.message().contains("another save"), "{error}");
            assert!(error.path().is_some_and(|path| path.ends_with(&files[shard].0)), "{error}");
        }
    }
    // Two shards of one save that changed places, of the same length.
    let twins = MadeCheckpoint::new(7)
        .tensor("a", Dtype::U8, &[4], noise(4, 1))
        .tensor("b", Dtype::U8, &[4], noise(4, 2))
        .shards(2);
    let mut files = twins.files();
    let (first, second) = files.split_at_mut(1);
    std::mem::swap(&mut first[0].1, &mut second[0].1);
    let checkpoint = open(&files).unwrap();
    assert_eq!(checkpoint.read("a").unwrap_err().kind(), ErrorKind::Corrupt);
    let report = checkpoint.verify().unwrap();
    assert_eq!(report.damage.len(), 4, "both headers and both tensors: {report:?}");
}
