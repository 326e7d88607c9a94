use crate::fixtures::checkpoint::{MadeCheckpoint, Watched, noise};
use ashore::{Checkpoint, Dtype, ErrorKind, Targets};
use proptest::prelude::*;
use std::ops::Range;

const BLOCK: usize = 8 << 20;

/// The slice, element by element.
fn naive(size: usize, shape: &[usize], ranges: &[Range<usize>], bytes: &[u8]) -> Vec<u8> {
    let mut places = vec![0];
    for (&dim, range) in shape.iter().zip(ranges) {
        places = places.iter().flat_map(|place| range.clone().map(move |i| place * dim + i)).collect();
    }
    places.iter().flat_map(|place| &bytes[place * size..(place + 1) * size]).copied().collect()
}

fn slices() -> impl Strategy<Value = (Vec<usize>, Vec<Range<usize>>)> {
    let dim = (0_usize..6).prop_flat_map(|dim| (Just(dim), 0..=dim, 0..=dim));
    prop::collection::vec(dim, 0..5)
        .prop_map(|dims| dims.into_iter().map(|(dim, a, b)| (dim, a.min(b)..a.max(b))).unzip())
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_slice_is_what_a_naive_walk_finds((shape, ranges) in slices(), size in prop::sample::select(vec![1_usize, 2, 4, 8])) {
        let dtype = [Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::I64][size.ilog2() as usize];
        let bytes = noise(size * shape.iter().product::<usize>(), 1);
        let checkpoint = MadeCheckpoint::new(7).tensor("x", Dtype::U8, &[5], noise(5, 2)).tensor("y", dtype, &shape, bytes.clone());
        let checkpoint = checkpoint.open().unwrap();
        prop_assert_eq!(checkpoint.read_slice("y", &ranges).unwrap(), naive(size, &shape, &ranges, &bytes));
    }
}

#[test]
fn slices_across_the_borders_of_blocks() {
    let shape = [5, 1 << 20, 5];
    let bytes = noise(shape.iter().product(), 3);
    let made = MadeCheckpoint::new(7).tensor("a", Dtype::U8, &[3], vec![1, 2, 3]).tensor(
        "x",
        Dtype::U8,
        &shape,
        bytes.clone(),
    );
    let checkpoint = made.open().unwrap();
    let slices: [[Range<usize>; 3]; 4] = [
        [0..5, 0..3, 0..5],
        [1..3, 600_000..700_000, 0..5],
        [0..5, (1 << 20) - 1..1 << 20, 4..5],
        [1..2, 629_140..629_150, 1..4],
    ];
    for slice in slices {
        assert!(checkpoint.read_slice("x", &slice).unwrap() == naive(1, &shape, &slice, &bytes), "{slice:?}");
    }
}

#[test]
fn only_blocks_that_the_slice_touches_are_read_and_checked() {
    let made = MadeCheckpoint::new(7).tensor("x", Dtype::U8, &[4, BLOCK], noise(4 * BLOCK, 3));
    let mut files = made.files();
    let data = files[0].1.len() - 4 * BLOCK;
    files[0].1[data + 2 * BLOCK + 5] ^= 1;
    let storage = Watched::default();
    crate::fixtures::checkpoint::publish(&storage.memory, "step-7", &files);
    let checkpoint = Checkpoint::from_storage(storage.storage.clone(), "step-7").unwrap();
    storage.seen.lock().unwrap().reads.clear();
    let read = checkpoint.read_slice("x", &[1..2, 7..9]).unwrap();
    assert_eq!(read, made.tensors["x"].2[BLOCK + 7..BLOCK + 9]);
    let within = data as u64 + BLOCK as u64..data as u64 + 2 * BLOCK as u64;
    for (_, range) in &storage.seen.lock().unwrap().reads {
        assert!(within.start <= range.start && range.end <= within.end, "{range:?}");
    }
    let refused = checkpoint.read_slice("x", &[1..3, 7..9]).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Corrupt);
    let range = format!("range={}..{}", data + 2 * BLOCK, data + 3 * BLOCK);
    assert!(refused.message().contains(&range) && refused.message().contains("tensor=\"x\""), "{refused}");
    assert!(refused.path().unwrap().ends_with("step-7/model.safetensors"), "{refused}");
}

#[test]
#[expect(clippy::single_range_in_vec_init, reason = "a slice of one dimension")]
fn slices_that_do_not_fit_name_the_tensor() {
    let made = MadeCheckpoint::new(7).tensor("x", Dtype::F4, &[2, 4], vec![1, 2, 3, 4]);
    let checkpoint = made.open().unwrap();
    assert_eq!(checkpoint.read_slice("x", &[1..2, 2..4]).unwrap(), [4]);
    for slice in [&[0..1, 1..2][..], &[0..1], &[0..3, 0..4], &[]] {
        let refused = checkpoint.read_slice("x", slice).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid, "{slice:?}");
        assert!(refused.message().contains("tensor=\"x\""), "{refused}");
    }
}

#[test]
fn slices_have_elements() {
    let bytes: Vec<u8> = (0_u16..12).flat_map(u16::to_le_bytes).collect();
    let checkpoint = MadeCheckpoint::new(7).tensor("x", Dtype::U16, &[3, 4], bytes).open().unwrap();
    let slice = [1..3, 2..4];
    assert_eq!(checkpoint.read_slice_as::<u16>("x", &slice).unwrap(), [6, 7, 10, 11]);
    let mut elements = [0_u16; 4];
    checkpoint.read_into(Targets::new().slice_elements("x", &slice, &mut elements)).unwrap();
    assert_eq!(elements, [6, 7, 10, 11]);
    for refused in [
        checkpoint.read_slice_as::<i16>("x", &slice).unwrap_err(),
        checkpoint.read_into(Targets::new().slice_elements("x", &slice, &mut [0_i16; 4])).unwrap_err(),
    ] {
        assert_eq!(refused.kind(), ErrorKind::Invalid);
        assert!(refused.message().contains("U16") && refused.message().contains("I16"), "{refused}");
    }
}

/// A restore read the requested tensors, and gave no sign of further ones in the checkpoint.
#[test]
#[expect(clippy::single_range_in_vec_init, reason = "a slice of one dimension")]
fn strict_targets_refuse_what_they_do_not_ask_for() {
    let mut made = MadeCheckpoint::new(7).tensor("a", Dtype::U8, &[4], vec![1, 2, 3, 4]);
    for extra in 0..10 {
        made = made.tensor(&format!("x{extra}"), Dtype::U8, &[1], vec![9]);
    }
    let checkpoint = made.open().unwrap();
    let (mut a, mut part) = ([0_u8; 4], [0_u8; 2]);
    checkpoint.read_into(Targets::new().bytes("a", &mut a)).unwrap();
    a.fill(0);
    let refused = checkpoint.read_into(Targets::new().bytes("a", &mut a).strict()).unwrap_err();
    assert_eq!((refused.kind(), a), (ErrorKind::Invalid, [0; 4]), "nothing is read");
    assert!(refused.message().contains("count=10 first=[\"x0\", ") && !refused.message().contains("x9"), "{refused}");
    let only = MadeCheckpoint::new(8).tensor("a", Dtype::U8, &[4], vec![1, 2, 3, 4]).open().unwrap();
    only.read_into(Targets::new().strict().slice("a", &[1..3], &mut part)).unwrap();
    assert_eq!(part, [2, 3], "a part is asked for, too");
}
