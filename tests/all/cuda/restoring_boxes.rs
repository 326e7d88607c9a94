//! Restores into device memory of tensors that lie in several boxes.

use super::program::Gpu;
use super::restoring::blank;
use crate::fixtures::checkpoint::{Boxes, MadeCheckpoint, cut_out, noise, open};
use ashore::{Dtype, ErrorKind, Targets};
use std::ops::Range;

/// The boxes of a mesh over two dimensions, cut at these places.
fn mesh(shape: [usize; 2], rows: &[usize], columns: &[usize]) -> Boxes {
    let edges = |cuts: &[usize], end: usize| [&[0], cuts, &[end]].concat();
    let (rows, columns) = (edges(rows, shape[0]), edges(columns, shape[1]));
    let row = |r: &[usize]| {
        let (at, extent) = (r[0], r[1] - r[0]);
        columns.windows(2).map(move |c| (vec![at, c[0]], vec![extent, c[1] - c[0]])).collect::<Vec<_>>()
    };
    rows.windows(2).flat_map(row).collect()
}

fn made(shape: [usize; 2], rows: &[usize], columns: &[usize]) -> MadeCheckpoint {
    let made = MadeCheckpoint::new(7).tensor("t", Dtype::BF16, &shape, noise(2 * shape[0] * shape[1], 5));
    made.split("t", mesh(shape, rows, columns))
}

#[test]
fn cuda_boxes_are_restored_to_where_they_belong() {
    let gpu = Gpu::take();
    gpu.set("lag_us", 200);
    let stream = gpu.stream();
    // Rows of 6002 bytes, in which blocks of 8 MiB end in the middle of a box's row; and of 140,000, in runs
    // that are copied without being packed first.
    for (shape, rows, columns) in [
        ([4000, 3001], &[][..], &[100, 101][..]),
        ([4000, 3001], &[1500], &[1]),
        ([4000, 3001], &[1500, 1501], &[]),
        ([90, 70_000], &[13], &[33_000]),
    ] {
        let made = made(shape, rows, columns);
        let checkpoint = made.open().unwrap().with_made_device(gpu.device());
        let slices: [[Range<usize>; 2]; 3] =
            [[0..shape[0], 0..shape[1]], [5..shape[0] - 5, 90..shape[1] - 1], [14..16, 0..120]];
        for slice in slices {
            let (at, extent) = ([slice[0].start, slice[1].start], [slice[0].len(), slice[1].len()]);
            let expected = cut_out(16, &shape, &at, &extent, &made.tensors["t"].2);
            // In the middle of other memory, which stays as it is.
            let memory = blank(&gpu, expected.len() + 64);
            let mut on_host = vec![0; expected.len()];
            let target = memory.target_at(32, expected.len(), stream);
            let targets = Targets::new().device_slice("t", &slice, target).slice("t", &slice, &mut on_host);
            checkpoint.read_into(targets).unwrap();
            let read = memory.read();
            assert!(read[32..][..expected.len()] == expected, "{shape:?} {rows:?} {columns:?} {slice:?}");
            assert!(read[..32].iter().chain(&read[32 + expected.len()..]).all(|&byte| byte == 0xEE));
            assert!(on_host == expected);
            stream.fill(&memory, 0xEE);
            let target = memory.target_at(32, expected.len(), stream);
            checkpoint.read_into(Targets::new().device_slice("t", &slice, target)).unwrap();
            assert!(memory.read() == read, "{shape:?} {rows:?} {columns:?} {slice:?}");
        }
    }
    assert!(gpu.is_well());
}

#[test]
fn cuda_columns_of_a_tensor_are_few_copies() {
    let gpu = Gpu::take();
    let Some(fake) = gpu.fake() else { return };
    let (shape, stream) = ([4000, 3001], gpu.stream());
    let checkpoint = made(shape, &[], &[1000]).open().unwrap().with_made_device(gpu.device());
    let memory = blank(&gpu, 2 * shape[0] * shape[1]);
    let calls = || fake.calls("cuMemcpy2DAsync_v2") + fake.calls("cuMemcpyHtoDAsync_v2");
    let before = calls();
    checkpoint.read_into(Targets::new().device("t", memory.target(stream))).unwrap();
    // One block of the first box, and two of the second; each may begin and end within a row.
    assert!(calls() - before <= 9, "{}", calls() - before);
}

#[test]
fn cuda_a_damaged_box_never_gets_to_the_device() {
    let gpu = Gpu::take();
    let (shape, stream) = ([500, 300], gpu.stream());
    let made = made(shape, &[], &[100]);
    let slice = made.open().unwrap().contents().unwrap().tensors[0].slices[1].clone();
    let mut files = made.files();
    files[slice.file].1[slice.offset as usize + 5] ^= 1;
    let checkpoint = open(&files).unwrap().with_made_device(gpu.device());
    let memory = blank(&gpu, 2 * shape[0] * shape[1]);
    let error = checkpoint.read_into(Targets::new().device("t", memory.target(stream))).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.path().unwrap().ends_with(&files[slice.file].0), "{error}");
    let read = memory.read();
    let damaged = cut_out(16, &shape, &slice.at, &slice.shape, &read);
    assert!(damaged.iter().all(|&byte| byte == 0xEE));
    assert!(gpu.is_well());
}
