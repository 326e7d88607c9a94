use crate::fixtures::checkpoint::{MadeCheckpoint, Watched, noise};
use ashore::{Checkpoint, Dtype, ErrorKind, Targets};
use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

const BLOCK: usize = 8 << 20;

/// Tensors of every kind: odd lengths, no dimensions, no elements, more than a block, elements smaller than a
/// byte.
fn everything(shards: usize) -> MadeCheckpoint {
    use Dtype::*;
    MadeCheckpoint::new(7)
        .tensor("big", U16, &[3, BLOCK / 3], noise(2 * 3 * (BLOCK / 3), 1))
        .tensor("big.exactly", U8, &[2 * BLOCK], noise(2 * BLOCK, 2))
        .tensor("empty", F32, &[3, 0, 2], Vec::new())
        .tensor("half", F16, &[5], noise(10, 3))
        .tensor("nan", F32, &[2], [0x7fc0_dead_u32, 0xffff_ffff].iter().flat_map(|b| b.to_le_bytes()).collect())
        .tensor("nibbles", F4, &[3, 2], noise(3, 4))
        .tensor("odd", I8, &[8191], noise(8191, 5))
        .tensor("scalar", F64, &[], 0.1_f64.to_le_bytes().into())
        .tensor("tail", BOOL, &[1], vec![1])
        .shards(shards)
}

#[test]
fn every_tensor_by_any_number_of_threads() {
    for shards in [1, 3] {
        let made = everything(shards);
        for threads in [1, 2, 7] {
            let checkpoint = made.open().unwrap().with_threads(threads);
            for (name, (dtype, shape, bytes)) in &made.tensors {
                let info = checkpoint.tensor(name).unwrap();
                assert_eq!((info.dtype, info.shape, info.bytes), (*dtype, &shape[..], bytes.len() as u64));
                assert!(checkpoint.read(name).unwrap() == *bytes, "{name}");
            }
            assert!(checkpoint.verify().unwrap().is_sound());
        }
    }
}

#[test]
fn many_targets_at_once_some_typed() {
    let made = everything(2);
    let checkpoint = made.open().unwrap();
    let (mut big, mut scalar, mut nan) = (vec![0_u16; made.tensors["big"].2.len() / 2], [0.0_f64], [0_u8; 8]);
    let mut part = [0; 6];
    let (sliced, tail) = part.split_at_mut(4);
    let targets = Targets::new()
        .elements("big", &mut big)
        .elements("scalar", &mut scalar)
        .bytes("nan", &mut nan)
        .slice("big", &[1..3, 4..5], sliced)
        .bytes("tail", &mut tail[..1]);
    checkpoint.read_into(targets).unwrap();
    assert!(bytemuck::cast_slice::<u16, u8>(&big) == made.tensors["big"].2);
    assert_eq!(scalar, [0.1]);
    assert_eq!(nan[..], made.tensors["nan"].2);
    let row = BLOCK / 3;
    assert_eq!(part[..4], *bytemuck::cast_slice::<u16, u8>(&[big[row + 4], big[2 * row + 4]]));
    assert_eq!(part[4..], [1, 0]);
}

#[test]
fn elements_of_the_wrong_type_or_number_are_refused_before_anything_is_read() {
    let checkpoint = everything(1).open().unwrap();
    let refused = checkpoint.read_as::<f32>("half").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.message().contains("tensor=\"half\" stored=F16 asked=F32"), "{refused}");
    assert_eq!(checkpoint.read_as::<half::f16>("half").unwrap().len(), 5);
    assert!(checkpoint.read_as::<f32>("empty").unwrap().is_empty());
    let (mut fits, mut short) = ([9; 8], [0; 7]);
    let refused = checkpoint.read_into(Targets::new().bytes("nan", &mut fits).bytes("nan", &mut short)).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid);
    assert!(refused.message().contains("tensor=\"nan\" expected_bytes=8 found_bytes=7"), "{refused}");
    assert_eq!(fits, [9; 8]);
}

#[test]
fn absent_names_are_not_found_and_the_error_has_the_path() {
    let checkpoint = everything(1).open().unwrap();
    let errors = [
        checkpoint.tensor("absent").unwrap_err(),
        checkpoint.read("absent").unwrap_err(),
        checkpoint.read_slice("absent", &[]).unwrap_err(),
        checkpoint.value::<u8>("absent").unwrap_err(),
        checkpoint.metadata::<u8>("absent").unwrap_err(),
    ];
    for error in errors {
        assert_eq!((error.kind(), error.step()), (ErrorKind::NotFound, Some(7)), "{error}");
        assert!(error.to_string().contains("absent") && error.path() == Some(checkpoint.path()), "{error}");
    }
}

#[test]
fn values_and_names_cost_no_read_of_tensor_data() {
    let mut made = everything(2);
    made.values.insert("epoch".into(), 3.into());
    let storage = Watched::default();
    made.publish(&storage.memory, "step-7");
    let checkpoint = Checkpoint::from_storage(storage.storage.clone(), "step-7").unwrap();
    assert_eq!(checkpoint.value::<u32>("epoch").unwrap(), 3);
    assert_eq!(checkpoint.metadata::<String>("run").unwrap(), "first");
    assert_eq!(checkpoint.value::<String>("epoch").unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(checkpoint.value_names().collect::<Vec<_>>(), ["epoch"]);
    assert_eq!(checkpoint.metadata_keys().collect::<Vec<_>>(), ["run"]);
    let names = |prefix| checkpoint.with_prefix(prefix).unwrap().map(|t| t.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names("big"), ["big", "big.exactly"]);
    assert_eq!(names("n"), ["nan", "nibbles"]);
    assert_eq!((names("z").len(), names("").len()), (0, checkpoint.tensors().unwrap().len()));
    let lengths: usize = made.files().iter().map(|(_, bytes)| bytes.len()).sum();
    assert_eq!(checkpoint.bytes(), lengths as u64);
    let seen = storage.seen.lock().unwrap();
    let data = |(file, range): &(String, Range<u64>)| file.ends_with(".safetensors") && range.end > 4096;
    assert!(!seen.reads.iter().any(data), "{seen:?}");
}

#[test]
fn one_tensor_of_many_costs_its_own_bytes_rounded_to_the_alignment() {
    let mut made = MadeCheckpoint::new(7);
    for i in 0..4000 {
        made = made.tensor(&format!("layer.{i}"), Dtype::U8, &[1000], noise(1000, i));
    }
    let storage = Watched::default();
    made.publish(&storage.memory, "step-7");
    let checkpoint = Checkpoint::from_storage(storage.storage.clone(), "step-7").unwrap();
    storage.seen.lock().unwrap().reads.clear();
    assert_eq!(checkpoint.read("layer.77").unwrap(), made.tensors["layer.77"].2);
    let seen = storage.seen.lock().unwrap();
    let of = |table: bool| seen.reads.iter().filter(move |(file, _)| file.ends_with(".table") == table);
    let bytes = |(_, range): &(String, Range<u64>)| range.end - range.start;
    assert!((1000..=2 * 4096).contains(&of(false).map(bytes).sum::<u64>()), "{:?}", seen.reads);
    assert!(of(true).count() <= 8 && of(true).all(|read| bytes(read) <= 16 << 10), "{:?}", seen.reads);
}

#[test]
fn many_small_tensors_are_few_reads() {
    let mut made = MadeCheckpoint::new(7);
    for i in 0..4000 {
        made = made.tensor(&format!("layer.{i}"), Dtype::U8, &[1000], noise(1000, i));
    }
    let storage = Watched::default();
    made.publish(&storage.memory, "step-7");
    let checkpoint = Checkpoint::from_storage(storage.storage.clone(), "step-7").unwrap();
    storage.seen.lock().unwrap().reads.clear();
    let mut memory = vec![0; 4000 * 1000];
    let names: Vec<_> = made.tensors.keys().collect();
    let targets = names.iter().zip(memory.chunks_mut(1000)).fold(Targets::new(), |t, (name, to)| t.bytes(*name, to));
    checkpoint.read_into(targets).unwrap();
    assert!(names.iter().zip(memory.chunks(1000)).all(|(name, bytes)| made.tensors[*name].2 == bytes));
    let seen = storage.seen.lock().unwrap();
    let (tables, shards): (Vec<_>, Vec<_>) = seen.reads.iter().partition(|(file, _)| file.ends_with(".table"));
    assert!(shards.len() <= 5, "{:?}", seen.reads);
    let once: HashSet<_> = tables.iter().map(|(_, range)| range.start).collect();
    assert_eq!(once.len(), tables.len(), "each page is read once: {:?}", seen.reads);
    assert!(seen.reads.iter().all(|(_, range)| range.start % 4096 == 0));
}

#[test]
fn a_checkpoint_stays_readable_after_it_was_replaced_and_removed() {
    let storage = ashore::storage::Memory::new();
    let made = everything(1);
    made.publish(&storage, "step-7");
    let checkpoint = Checkpoint::from_storage(Arc::new(storage.clone()), "step-7").unwrap();
    MadeCheckpoint::new(7).publish(&storage, "step-7");
    ashore::storage::Storage::remove(&storage, "step-7").unwrap();
    assert!(checkpoint.read("odd").unwrap() == made.tensors["odd"].2);
}
