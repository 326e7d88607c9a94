//! Tensors that lie in several files, each of which holds a box of them.

use crate::fixtures::checkpoint::{Boxes, MadeCheckpoint, Watched, cut_out, noise, open, publish};
use ashore::{Checkpoint, Dtype, ErrorKind, Targets};
use proptest::prelude::*;
use std::ops::Range;

const BLOCK: usize = 8 << 20;

/// Cuts every dimension at the given places: the boxes of a mesh.
fn mesh(shape: &[usize], cuts: &[&[usize]]) -> Boxes {
    let mut boxes = vec![(vec![], vec![])];
    for (dim, &length) in shape.iter().enumerate() {
        let cuts = cuts.get(dim).copied().unwrap_or_default();
        let edges: Vec<_> = [0].into_iter().chain(cuts.iter().copied()).chain([length]).collect();
        let longer = |(at, extent): &(Vec<usize>, Vec<usize>)| {
            let each = |edge: &[usize]| ([&at[..], &edge[..1]].concat(), [&extent[..], &[edge[1] - edge[0]]].concat());
            edges.windows(2).map(each).collect::<Vec<_>>()
        };
        boxes = boxes.iter().flat_map(longer).collect();
    }
    boxes
}

/// The bytes of a slice.
fn expected(dtype: Dtype, shape: &[usize], slice: &[Range<usize>], bytes: &[u8]) -> Vec<u8> {
    let (at, extent): (Vec<_>, Vec<_>) = slice.iter().map(|range| (range.start, range.len())).unzip();
    cut_out(dtype.bitsize(), shape, &at, &extent, bytes)
}

fn made(name: &str, dtype: Dtype, shape: &[usize], boxes: Boxes) -> MadeCheckpoint {
    let bytes = noise(shape.iter().product::<usize>() * dtype.bitsize() / 8, 1);
    MadeCheckpoint::new(7).tensor(name, dtype, shape, bytes).split(name, boxes)
}

#[test]
fn tensors_in_uneven_boxes_are_read_as_if_they_were_whole() {
    let tensors: [(&str, Dtype, &[usize], Boxes); 10] = [
        ("rows", Dtype::F32, &[10, 3], mesh(&[10, 3], &[&[3, 4]])),
        ("columns", Dtype::BF16, &[7, 9], mesh(&[7, 9], &[&[], &[1, 5]])),
        ("mesh", Dtype::I64, &[5, 7], mesh(&[5, 7], &[&[2], &[3, 4]])),
        ("flags", Dtype::BOOL, &[4, 5, 6], mesh(&[4, 5, 6], &[&[1], &[2], &[5]])),
        ("half bytes", Dtype::F4, &[6, 8], mesh(&[6, 8], &[&[1], &[2, 6]])),
        ("line", Dtype::F32, &[11], mesh(&[11], &[&[1, 2, 8]])),
        ("scalar", Dtype::F32, &[], vec![(vec![], vec![])]),
        ("nothing", Dtype::F32, &[0, 4], mesh(&[0, 4], &[&[], &[1]])),
        ("with an empty box", Dtype::U8, &[4, 6], vec![(vec![0, 0], vec![4, 6]), (vec![1, 1], vec![0, 3])]),
        (
            "a spiral",
            Dtype::U16,
            &[4, 6],
            vec![
                (vec![0, 0], vec![1, 5]),
                (vec![0, 5], vec![3, 1]),
                (vec![3, 1], vec![1, 5]),
                (vec![1, 0], vec![3, 1]),
                (vec![1, 1], vec![2, 4]),
            ],
        ),
    ];
    let add = |made: MadeCheckpoint, (name, dtype, shape, boxes): &(&str, Dtype, &[usize], Boxes)| {
        let bytes = noise(shape.iter().product::<usize>() * dtype.bitsize() / 8, name.len() as u64);
        made.tensor(name, *dtype, shape, bytes).split(name, boxes.clone())
    };
    let made = tensors.iter().fold(MadeCheckpoint::new(7).tensor("whole", Dtype::U8, &[5], noise(5, 9)), add);
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("step-00000007");
    std::fs::create_dir(&path).unwrap();
    for (name, bytes) in made.files() {
        std::fs::write(path.join(name), bytes).unwrap();
    }
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert!(checkpoint.verify().unwrap().is_sound(), "{:?}", checkpoint.verify());
    let mut memory: Vec<_> = made.tensors.iter().map(|(name, t)| (name, vec![0xEE; t.2.len()])).collect();
    let targets = memory.iter_mut().fold(Targets::new(), |targets, (name, to)| targets.bytes(name.as_str(), to));
    checkpoint.read_into(targets.strict()).unwrap();
    for (name, read) in memory {
        assert_eq!(read, made.tensors[name].2, "{name}");
        assert_eq!(read, checkpoint.read(name).unwrap(), "{name}");
    }
    // What each rank wrote is what it reads again.
    for (name, (dtype, shape, bytes)) in &made.tensors {
        let boxes = checkpoint.boxes(name).unwrap();
        assert_eq!(boxes.len(), made.boxes.get(name).map_or(1, Vec::len));
        for slice in boxes {
            assert_eq!(checkpoint.read_slice(name, &slice).unwrap(), expected(*dtype, shape, &slice, bytes));
        }
    }
    let longs: &[i64] = bytemuck::cast_slice(&made.tensors["mesh"].2);
    assert_eq!(checkpoint.read_as::<i64>("mesh").unwrap(), longs);
    assert_eq!(
        checkpoint.read_slice_as::<i64>("mesh", &[1..3, 2..5]).unwrap(),
        [&longs[9..12], &longs[16..19]].concat()
    );
    assert_eq!(checkpoint.read_slice("half bytes", &[0..6, 4..8]).unwrap().len(), 12);
    assert!(checkpoint.read_slice("half bytes", &[0..6, 3..8]).unwrap_err().message().contains("cuts a byte"));
    assert_eq!(checkpoint.read_slice("mesh", &[0..6, 0..1]).unwrap_err().kind(), ErrorKind::Invalid);
    assert!(checkpoint.read_slice("mesh", &[2..2, 0..7]).unwrap().is_empty());
    let error = checkpoint.read_into(Targets::new().bytes("mesh", &mut [0; 5])).unwrap_err();
    assert!(error.message().contains("expected_bytes=280"), "{error}");
}

/// A shape, boxes that tile it, and a slice.
fn tilings() -> impl Strategy<Value = (Vec<usize>, Boxes, Vec<Range<usize>>)> {
    let dim = (1_usize..9).prop_flat_map(|dim| (Just(dim), 0..=dim, 0..=dim));
    let cuts = prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0_usize..9), 0..12);
    (prop::collection::vec(dim, 1..5), cuts).prop_map(|(dims, cuts)| {
        let shape: Vec<_> = dims.iter().map(|&(dim, ..)| dim).collect();
        let mut boxes = vec![(vec![0; shape.len()], shape.clone())];
        for (which, dim, place) in cuts {
            let (which, dim) = (which.index(boxes.len()), dim.index(shape.len()));
            let (mut at, mut extent) = boxes[which].clone();
            let place = place.min(extent[dim]);
            boxes[which].1[dim] = place;
            at[dim] += place;
            extent[dim] -= place;
            boxes.push((at, extent));
        }
        (shape, boxes, dims.into_iter().map(|(_, a, b)| a.min(b)..a.max(b)).collect())
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn any_slice_of_any_tiling_is_that_of_the_whole_tensor(
        (shape, boxes, slice) in tilings(), dtype in prop::sample::select(vec![Dtype::U8, Dtype::BF16, Dtype::F32, Dtype::I64]),
    ) {
        let made = made("w", dtype, &shape, boxes);
        let checkpoint = made.open().unwrap();
        let bytes = &made.tensors["w"].2;
        prop_assert_eq!(&checkpoint.read("w").unwrap(), bytes);
        prop_assert_eq!(checkpoint.read_slice("w", &slice).unwrap(), expected(dtype, &shape, &slice, bytes));
        prop_assert!(checkpoint.verify().unwrap().is_sound());
    }
}

#[test]
fn boxes_of_many_blocks_are_filled_by_many_threads() {
    // Rows of 3001 bytes, of which blocks of 8 MiB and bands of a target end in the middle.
    let shape = [9000, 3001];
    for cuts in [[&[][..], &[1300, 1301]], [&[4000], &[2000]], [&[5000], &[]]] {
        let made = made("w", Dtype::U8, &shape, mesh(&shape, &cuts));
        let checkpoint = made.open().unwrap();
        let bytes = &made.tensors["w"].2;
        for threads in [1, 8] {
            let checkpoint = checkpoint.clone().with_threads(threads);
            assert!(checkpoint.read("w").unwrap() == *bytes, "{cuts:?} by {threads} threads");
            let slice = [10..8990, 1290..2500];
            let read = checkpoint.read_slice("w", &slice).unwrap();
            assert!(read == expected(Dtype::U8, &shape, &slice, bytes), "{cuts:?} by {threads} threads");
        }
    }
}

#[test]
fn only_blocks_of_boxes_that_the_slice_touches_are_read() {
    let shape = [2, 3 * BLOCK];
    let made = made("w", Dtype::U8, &shape, mesh(&shape, &[&[], &[BLOCK / 2, BLOCK]]));
    let storage = Watched::default();
    publish(&storage.memory, "step-7", &made.files());
    let checkpoint = Checkpoint::from_storage(storage.storage.clone(), "step-7").unwrap();
    let reads = |slice: [Range<usize>; 2]| {
        storage.seen.lock().unwrap().reads.clear();
        let read = checkpoint.read_slice("w", &slice).unwrap();
        assert!(read == expected(Dtype::U8, &shape, &slice, &made.tensors["w"].2));
        std::mem::take(&mut storage.seen.lock().unwrap().reads)
    };
    let entry = checkpoint.contents().unwrap().tensors[0].clone();
    let place = |at: usize| {
        let slice = entry.slices.iter().find(|slice| slice.at[1] == at).unwrap();
        (format!("step-7/{}", checkpoint.contents().unwrap().files[slice.file].name), slice.offset)
    };
    let within = |reads: &[(String, Range<u64>)], at: usize, block: u64| {
        let (file, offset) = place(at);
        let block = offset + block * BLOCK as u64..offset + (block + 1) * BLOCK as u64;
        !reads.is_empty() && reads.iter().all(|(f, r)| *f == file && block.start <= r.start && r.end <= block.end)
    };
    // The last box has two rows of two blocks.
    assert!(within(&reads([1..2, 2 * BLOCK + 5..2 * BLOCK + 9]), BLOCK, 3));
    assert!(within(&reads([0..1, BLOCK + 5..2 * BLOCK]), BLOCK, 0));
    assert!(within(&reads([0..2, 3..9]), 0, 0));
    let both = reads([0..1, BLOCK - 1..BLOCK + 1]);
    let files: Vec<_> = both.iter().map(|(file, _)| file.clone()).collect();
    assert!(files.contains(&place(BLOCK / 2).0) && files.contains(&place(BLOCK).0) && !files.contains(&place(0).0));
    assert!(reads([0..0, 0..9]).is_empty());
}

#[test]
fn damage_in_one_box_names_its_file_and_harms_no_other() {
    let shape = [40, 60];
    let made = made("w", Dtype::F32, &shape, mesh(&shape, &[&[25], &[20, 50]]));
    let whole = made.open().unwrap();
    let slices = whole.contents().unwrap().tensors[0].slices.clone();
    for slice in &slices {
        let mut files = made.files();
        files[slice.file].1[slice.offset as usize + 17] ^= 1;
        let (name, range) = (&files[slice.file].0, slice.offset..slice.offset + slice.length);
        let checkpoint = open(&files).unwrap();
        let error = checkpoint.read("w").unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Corrupt, Some(7)));
        assert!(error.path().unwrap().ends_with(name), "{error}");
        assert!(error.message().contains(&format!("tensor=\"w\" range={range:?}")), "{error}");
        for (other, slice_of) in checkpoint.boxes("w").unwrap().iter().zip(&slices) {
            let read = checkpoint.read_slice("w", other);
            assert_eq!(read.is_err(), slice_of.file == slice.file, "{other:?}");
        }
        let report = checkpoint.verify().unwrap();
        let found: Vec<_> = report.damage.iter().map(|d| (&d.file, d.tensor.as_deref(), &d.range)).collect();
        assert_eq!(found, [(name, Some("w"), &range)]);
        // All but the table and the manifest.
        let listed = &files[..files.len() - 2];
        assert_eq!(report.bytes, listed.iter().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
    }
}

#[test]
fn boxes_that_cut_a_byte_in_two_are_refused_by_name() {
    // Rows of 2 bytes; a column of 1.5 bytes beside one of half a byte.
    let made = made("w", Dtype::F4, &[4, 4], mesh(&[4, 4], &[&[], &[3]]));
    let checkpoint = made.open().unwrap();
    for slice in [[0..4, 0..4], [1..2, 2..4]] {
        let error = checkpoint.read_slice("w", &slice).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        assert!(error.message().contains("tensor=\"w\"") && error.path().is_some(), "{error}");
    }
    assert!(checkpoint.verify().unwrap().is_sound());
}
