//! Restores into device memory in which elements lie at strides.

use super::program::Gpu;
use super::restoring::blank;
use crate::fixtures::checkpoint::{MadeCheckpoint, noise, open};
use crate::fixtures::strided::{View, any_view, views};
use ashore::{Dtype, ErrorKind, Targets};
use proptest::prelude::*;

/// Bytes of a border, which stays as it is.
const BORDER: usize = 48;

fn bytes_of(view: &View, seed: u64) -> Vec<u8> {
    noise(view.shape.iter().product::<usize>() * (view.dtype.bitsize() / 8), seed)
}

/// Memory after a restore into a view behind a border.
fn expected(view: &View, bytes: &[u8]) -> Vec<u8> {
    let mut memory = vec![0xEE; view.len + 2 * BORDER];
    view.unpack(bytes, &mut memory[BORDER..]);
    memory
}

#[test]
fn cuda_targets_at_strides_are_filled_and_nothing_between_their_elements() {
    let gpu = Gpu::take();
    gpu.set("lag_us", 200);
    let (stream, mut views) = (gpu.stream(), views());
    views.push(("a.long", View::new(Dtype::F32, &[701, 3001], &[12_010, 4])));
    views.push(("b.transposed", View::new(Dtype::U8, &[3001, 3001], &[1, 3001])));
    views.push(("c.turned", View::new(Dtype::BF16, &[2100, 2100], &[-2, -4210])));
    let bytes: Vec<_> = views.iter().enumerate().map(|(i, (_, view))| bytes_of(view, i as u64)).collect();
    let made = views.iter().zip(&bytes).fold(MadeCheckpoint::new(7).shards(3), |made, ((name, view), bytes)| {
        made.tensor(name, view.dtype, &view.shape, bytes.clone())
    });
    let made = made.tensor("packed.too", Dtype::U8, &[70_001], noise(70_001, 99));
    for threads in [1, 5] {
        let checkpoint = made.open().unwrap().with_made_device(gpu.device()).with_threads(threads);
        let memory: Vec<_> = views.iter().map(|(_, view)| blank(&gpu, view.len + 2 * BORDER)).collect();
        let (packed, mut on_host) = (blank(&gpu, 70_001), vec![0; 70_001]);
        let targets = Targets::new().device("packed.too", packed.target(stream)).bytes("packed.too", &mut on_host);
        let targets = views.iter().zip(&memory).fold(targets, |targets, ((name, view), memory)| {
            targets.device(*name, memory.target_of(BORDER, view, stream))
        });
        checkpoint.read_into(targets).unwrap();
        for (((name, view), bytes), memory) in views.iter().zip(&bytes).zip(memory) {
            assert!(memory.read() == expected(view, bytes), "{name} by {threads} threads");
        }
        assert!(packed.read() == on_host && on_host == noise(70_001, 99));
    }
    assert!(gpu.is_well());
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 64, ..ProptestConfig::default() })]
    #[test]
    fn cuda_any_slices_and_boxes_are_put_where_a_naive_walk_puts_them(
        view in any_view(4), other in any_view(4), after in prop::collection::vec(0_usize..3, 4), cut in any::<bool>(),
    ) {
        let gpu = Gpu::take();
        let stream = gpu.stream();
        let shape: Vec<_> = view.shape.iter().zip(&after).map(|(size, after)| size + after).collect();
        let slice: Vec<_> = view.shape.iter().map(|&size| 0..size).collect();
        let bytes = [noise(shape.iter().product::<usize>() * (view.dtype.bitsize() / 8), 3), bytes_of(&other, 4)];
        let mut made = MadeCheckpoint::new(7).tensor("t", view.dtype, &shape, bytes[0].clone());
        if cut && !shape.is_empty() && !bytes[0].is_empty() {
            let half = shape[0] / 2;
            let rest = |at: usize, size: usize| {
                ([&[at], &vec![0; shape.len() - 1][..]].concat(), [&[size], &shape[1..]].concat())
            };
            made = made.split("t", vec![rest(0, half), rest(half, shape[0] - half)]);
        }
        let made = made.tensor("u", other.dtype, &other.shape, bytes[1].clone());
        let checkpoint = made.open().unwrap().with_made_device(gpu.device());
        let part = checkpoint.read_slice("t", &slice).unwrap();
        let memory = [&view, &other, &view].map(|view| blank(&gpu, view.len + 2 * BORDER));
        // One slice twice, so that two targets need the same bytes of a file.
        let targets = Targets::new().device_slice("t", &slice, memory[0].target_of(BORDER, &view, stream));
        let targets = targets.device("u", memory[1].target_of(BORDER, &other, stream));
        checkpoint.read_into(targets.device_slice("t", &slice, memory[2].target_of(BORDER, &view, stream))).unwrap();
        prop_assert_eq!(memory[0].read(), expected(&view, &part));
        prop_assert_eq!(memory[1].read(), expected(&other, &bytes[1]));
        prop_assert_eq!(memory[2].read(), expected(&view, &part));
    }
}

#[test]
fn cuda_rows_at_a_stride_and_transposed_tensors_are_few_copies() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let stream = gpu.stream();
    let calls = || fake.calls("cuMemcpy2DAsync_v2") + fake.calls("cuMemcpyHtoDAsync_v2");
    for (view, copies) in [
        // Two blocks: a part of a row, whole rows, a part of a row; and the rest of that row first.
        (View::new(Dtype::F32, &[701, 3001], &[12_100, 4]), 4),
        (View::new(Dtype::U8, &[3001, 3001], &[1, 3001]), 4),
        (View::new(Dtype::U8, &[3001, 3001], &[-1, -3001]), 4),
        (View::new(Dtype::F32, &[8, 64, 1000], &[256_000, 4, 256]), 1),
        (View::new(Dtype::U8, &[9000], &[3]), 1),
    ] {
        let made = MadeCheckpoint::new(7).tensor("t", view.dtype, &view.shape, bytes_of(&view, 1));
        let checkpoint = made.open().unwrap().with_made_device(gpu.device());
        let (memory, before) = (blank(&gpu, view.len), calls());
        checkpoint.read_into(Targets::new().device("t", memory.target_of(0, &view, stream))).unwrap();
        assert!(calls() - before <= copies, "{} copies for {view:?}", calls() - before);
    }
}

#[test]
fn cuda_damaged_bytes_never_get_to_a_target_at_strides() {
    let gpu = Gpu::take();
    let (stream, view) = (gpu.stream(), View::new(Dtype::F32, &[60, 40], &[4, 240]));
    let made = MadeCheckpoint::new(7).tensor("t", view.dtype, &view.shape, bytes_of(&view, 1));
    let mut files = made.files();
    let offset = made.open().unwrap().contents().unwrap().tensors[0].slices[0].offset as usize;
    files[0].1[offset + 5000] ^= 1;
    let checkpoint = open(&files).unwrap().with_made_device(gpu.device());
    let memory = blank(&gpu, view.len);
    let error = checkpoint.read_into(Targets::new().device("t", memory.target_of(0, &view, stream))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(memory.read().iter().all(|&byte| byte == 0xEE));
    assert!(gpu.is_well());
}

#[test]
fn cuda_targets_whose_elements_overlap_are_refused_by_name() {
    let gpu = Gpu::take();
    let (stream, memory) = (gpu.stream(), blank(&gpu, 1000));
    let made = MadeCheckpoint::new(7).tensor("layer.weight", Dtype::F32, &[4, 6], noise(96, 2));
    let checkpoint = made.open().unwrap().with_made_device(gpu.device());
    let refused = |dtype: Dtype, shape: &[usize], strides: &[i64]| {
        let view = View { dtype, shape: shape.into(), strides: strides.into(), first: 500, len: 500 };
        let target = memory.target_of(0, &view, stream);
        let error = checkpoint.read_into(Targets::new().device("layer.weight", target)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().contains("\"layer.weight\""), "{error}");
        assert!(memory.read().iter().all(|&byte| byte == 0xEE));
        error.message().to_owned()
    };
    for strides in [[0, 4], [24, 0], [24, -3], [8, 4]] {
        assert!(refused(Dtype::F32, &[4, 6], &strides).contains("overlap"), "{strides:?}");
    }
    assert!(refused(Dtype::F32, &[6, 4], &[16, 4]).contains("expected=[4, 6]"));
    assert!(refused(Dtype::I32, &[4, 6], &[24, 4]).contains("stored=F32"));
}
