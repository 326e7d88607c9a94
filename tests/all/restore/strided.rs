//! Targets in host memory whose elements lie at strides.

use crate::fixtures::checkpoint::{Boxes, MadeCheckpoint, cut_out, noise, open};
use crate::fixtures::strided::{View, any_view, views};
use ashore::{Checkpoint, Dtype, ErrorKind, Targets};
use proptest::prelude::*;

/// A checkpoint of one tensor for each view, and their bytes.
fn made(views: &[(&str, View)]) -> (MadeCheckpoint, Vec<Vec<u8>>) {
    let bytes = |(seed, (_, view)): (usize, &(&str, View))| {
        noise(view.shape.iter().product::<usize>() * (view.dtype.bitsize() / 8), seed as u64)
    };
    let bytes: Vec<_> = views.iter().enumerate().map(bytes).collect();
    let add = |made: MadeCheckpoint, ((name, view), bytes): (&(&str, View), &Vec<u8>)| {
        made.tensor(name, view.dtype, &view.shape, bytes.clone())
    };
    (views.iter().zip(&bytes).fold(MadeCheckpoint::new(7).shards(2), add), bytes)
}

/// Memory after a restore: bytes between elements are as they were.
fn expected(view: &View, bytes: &[u8]) -> Vec<u8> {
    let mut memory = vec![0xEE; view.len];
    view.unpack(bytes, &mut memory);
    memory
}

#[test]
fn targets_of_every_kind_are_filled_and_nothing_between_their_elements() {
    let views = views();
    let (made, bytes) = made(&views);
    for threads in [1, 7] {
        let checkpoint = made.open().unwrap().with_threads(threads);
        let mut memory: Vec<_> = views.iter().map(|(_, view)| vec![0xEE; view.len]).collect();
        let targets = views
            .iter()
            .zip(&mut memory)
            .fold(Targets::new(), |targets, ((name, view), memory)| targets.host(*name, view.target(memory)));
        checkpoint.read_into(targets.strict()).unwrap();
        for (((name, view), bytes), memory) in views.iter().zip(&bytes).zip(memory) {
            assert!(memory == expected(view, bytes), "{name} by {threads} threads");
        }
    }
}

#[test]
fn blocks_of_8_mib_end_within_rows_of_a_target() {
    let views = [
        ("rows", View::new(Dtype::F32, &[701, 3001], &[12_010, 4])),
        ("transposed", View::new(Dtype::U8, &[3001, 3001], &[1, 3001])),
        ("turned", View::new(Dtype::BF16, &[2100, 2100], &[-2, -4210])),
    ];
    let (made, bytes) = made(&views);
    let checkpoint = made.open().unwrap();
    for ((name, view), bytes) in views.iter().zip(&bytes) {
        assert!(bytes.len() > 8 << 20);
        let mut memory = vec![0xEE; view.len];
        checkpoint.read_into(Targets::new().host(*name, view.target(&mut memory))).unwrap();
        assert!(memory == expected(view, bytes), "{name}");
    }
}

/// Boxes that cover a tensor, cut at the middle of dimensions.
fn halves(shape: &[usize], cuts: usize) -> Boxes {
    let mut boxes = vec![(vec![0; shape.len()], shape.to_vec())];
    for cut in 0..if shape.is_empty() { 0 } else { cuts } {
        let dim = cut % shape.len();
        let (mut at, mut extent) = boxes[cut / 2].clone();
        let half = extent[dim] / 2;
        boxes[cut / 2].1[dim] = half;
        at[dim] += half;
        extent[dim] -= half;
        boxes.push((at, extent));
    }
    boxes
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_slice_of_any_boxes_is_put_where_a_naive_walk_puts_it(
        view in any_view(5), cuts in 0_usize..5, around in prop::collection::vec((0_usize..3, 0_usize..3), 5),
    ) {
        // The view is of a slice of a tensor that is larger by these borders.
        let around = &around[..view.shape.len()];
        let shape: Vec<_> = view.shape.iter().zip(around).map(|(size, (before, after))| before + size + after).collect();
        let (at, slice): (Vec<_>, Vec<_>) =
            view.shape.iter().zip(around).map(|(size, &(before, _))| (before, before..before + size)).unzip();
        let bytes = noise(shape.iter().product::<usize>() * (view.dtype.bitsize() / 8), 3);
        let mut made = MadeCheckpoint::new(7).tensor("t", view.dtype, &shape, bytes.clone());
        if cuts > 0 && !bytes.is_empty() {
            made = made.split("t", halves(&shape, cuts));
        }
        let part = cut_out(view.dtype.bitsize(), &shape, &at, &view.shape, &bytes);
        let mut memory = vec![0xEE; view.len];
        made.open().unwrap().read_into(Targets::new().host_slice("t", &slice, view.target(&mut memory))).unwrap();
        prop_assert_eq!(memory, expected(&view, &part));
    }
}

#[test]
fn boxes_of_many_blocks_fill_one_target_by_many_threads() {
    let view = View::new(Dtype::BF16, &[4000, 3001], &[2, 8000]);
    let bytes = noise(2 * 4000 * 3001, 1);
    let made = MadeCheckpoint::new(7).tensor("t", view.dtype, &view.shape, bytes.clone());
    let checkpoint = made.split("t", halves(&view.shape, 4)).open().unwrap().with_threads(8);
    let (mut memory, mut packed) = (vec![0xEE; view.len], vec![0; bytes.len()]);
    checkpoint.read_into(Targets::new().host("t", view.target(&mut memory)).bytes("t", &mut packed)).unwrap();
    assert!(memory == expected(&view, &bytes) && packed == bytes);
}

#[test]
fn targets_that_lie_in_the_gaps_of_one_another_are_filled_together() {
    let bytes = [noise(3000, 1), noise(3000, 2)];
    let made = MadeCheckpoint::new(7).tensor("a", Dtype::U8, &[3000], bytes[0].clone());
    let checkpoint = made.tensor("b", Dtype::U8, &[3000], bytes[1].clone()).open().unwrap();
    let mut memory = vec![0xEE; 6000];
    #[expect(unsafe_code, reason = "two raw targets in the same borrowed memory")]
    let targets = {
        let view = |at: *mut u8| {
            // SAFETY: no byte is one of both targets, and all are in the memory.
            unsafe { ashore::HostTarget::strided(at, Dtype::U8, [3000], [2]) }
        };
        let at = memory.as_mut_ptr();
        Targets::new().host("a", view(at)).host("b", view(at.wrapping_add(1)))
    };
    checkpoint.read_into(targets).unwrap();
    assert!(memory.chunks(2).zip(bytes[0].iter().zip(&bytes[1])).all(|(pair, (a, b))| pair == [*a, *b]));
}

#[test]
fn a_target_that_cannot_be_filled_is_named_before_anything_is_touched() {
    let made = MadeCheckpoint::new(7).tensor("sound", Dtype::U8, &[3000], noise(3000, 1));
    let made = made.tensor("layer.weight", Dtype::F32, &[4, 6], noise(96, 2));
    let checkpoint = made.tensor("nibbles", Dtype::F4, &[4, 6], noise(12, 3)).open().unwrap();
    let refused = |name: &str, dtype: Dtype, shape: &[usize], strides: &[i64]| {
        let view = View { dtype, shape: shape.into(), strides: strides.into(), first: 100, len: 200 };
        let (mut sound, mut memory) = (vec![0xEE; 3000], vec![0xEE; 200]);
        let targets = Targets::new().bytes("sound", &mut sound).host(name, view.target(&mut memory));
        let error = checkpoint.read_into(targets).unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Invalid, Some(7)));
        assert!(error.message().contains(&format!("tensor={name:?}")), "{error}");
        assert!(sound.iter().chain(&memory).all(|&byte| byte == 0xEE), "{error}");
        error.message().to_owned()
    };
    let weight = |shape: &[usize], strides: &[i64]| refused("layer.weight", Dtype::F32, shape, strides);
    for strides in [[0, 4], [24, 0], [24, 3], [4, 4], [8, 4], [-4, 12], [i64::MAX, 4], [i64::MIN, 4]] {
        assert!(weight(&[4, 6], &strides).contains("overlap"), "{strides:?}");
    }
    assert!(weight(&[4, 6], &[4]).contains("one for each dimension"));
    for shape in [&[6_usize, 4][..], &[24], &[4, 6, 1], &[4, 5]] {
        let strides = vec![4; shape.len()];
        assert!(weight(shape, &strides).contains("expected=[4, 6]"), "{shape:?}");
    }
    assert!(refused("layer.weight", Dtype::I32, &[4, 6], &[24, 4]).contains("stored=F32 asked=I32"));
    assert!(refused("nibbles", Dtype::F4, &[4, 6], &[3, 1]).contains("whole bytes"));
    let slice = [0..2, 0..6];
    let view = View::new(Dtype::F32, &[4, 6], &[24, 4]);
    let mut memory = vec![0xEE; 96];
    let targets = Targets::new().host_slice("layer.weight", &slice, view.target(&mut memory));
    let error = checkpoint.read_into(targets).unwrap_err();
    assert!(error.message().contains("expected=[2, 6] found=[4, 6]"), "{error}");
}

#[test]
fn damage_fails_a_restore_into_a_target_at_strides() {
    let view = View::new(Dtype::F32, &[60, 40], &[4, 240]);
    let made = MadeCheckpoint::new(7).tensor("t", Dtype::F32, &[60, 40], noise(9600, 1));
    let mut files = made.files();
    let offset = made.open().unwrap().contents().unwrap().tensors[0].slices[0].offset as usize;
    files[0].1[offset + 5000] ^= 1;
    let checkpoint: Checkpoint = open(&files).unwrap();
    let mut memory = vec![0xEE; view.len];
    let error = checkpoint.read_into(Targets::new().host("t", view.target(&mut memory))).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Corrupt, Some(7)));
    assert!(error.message().contains("tensor=\"t\""), "{error}");
}
