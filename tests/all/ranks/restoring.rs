//! What several ranks saved is restored by any number of processes, in any boxes.

use super::{Job, LONG};
use crate::fixtures::executor::{Buffer, pattern};
use crate::fixtures::strided::View;
use ashore::{Catalog, Dtype, ErrorKind, HostTensor, StateDict, Targets};
use std::sync::Arc;

/// A matrix whose rows are split unevenly over three ranks, one that is split over a mesh of two by two, a
/// tensor that all ranks hold, and values of each rank.
#[test]
fn boxes_and_replicas_come_back_whole_and_in_parts() {
    let root = tempfile::tempdir().unwrap();
    let (rows, world) = ([3, 1, 4, 2], 4);
    let job = Job::start(root.path(), world, LONG);
    let element = |row: usize, column: usize| (row * 100 + column) as f32;
    for step in [1, 2] {
        let ended = job.each(|rank, executor| {
            let mut state = StateDict::new();
            let first: usize = rows[..rank].iter().sum();
            let mine = (first..first + rows[rank]).flat_map(|row| (0..5).map(move |column| element(row, column)));
            state.tensor_box(
                "rows",
                [10, 5],
                [first, 0],
                HostTensor::new(Arc::new(mine.collect::<Vec<_>>()), [rows[rank], 5]),
            )?;
            let (at, extent) = ([[0, 0], [0, 4], [3, 0], [3, 4]][rank], [[3, 4], [3, 2], [2, 4], [2, 2]][rank]);
            let inside = |row: usize| (at[1]..at[1] + extent[1]).map(move |column| element(row, column));
            let mine: Vec<f32> = (at[0]..at[0] + extent[0]).flat_map(inside).collect();
            state.tensor_box("mesh", [5, 6], at, HostTensor::new(Arc::new(mine), extent))?;
            state.tensor("bias", Arc::new(vec![7_i64; 3]))?;
            state.value("step", &step)?.rank_value("seed", &(rank as u64 * 10))?;
            executor.save(step, state)?.wait(LONG)
        });
        ended.into_iter().for_each(|ended| drop(ended.unwrap()));
    }
    let checkpoint = Catalog::open(root.path()).unwrap().latest().unwrap().unwrap();
    assert_eq!((checkpoint.step(), checkpoint.world()), (2, 4));
    let whole = |rows: usize, columns: usize| -> Vec<f32> {
        (0..rows).flat_map(|row| (0..columns).map(move |column| element(row, column))).collect()
    };
    assert_eq!(checkpoint.read_as::<f32>("rows").unwrap(), whole(10, 5));
    assert_eq!(checkpoint.read_as::<f32>("mesh").unwrap(), whole(5, 6));
    assert_eq!(checkpoint.read_as::<i64>("bias").unwrap(), [7; 3]);
    assert_eq!(checkpoint.value::<u64>("step").unwrap(), 2);
    for rank in 0..4 {
        assert_eq!(checkpoint.rank_value::<u64>(rank, "seed").unwrap(), u64::from(rank) * 10);
    }
    // Another mesh: two processes, each with half of the columns.
    for (first, last) in [(0, 2), (2, 6)] {
        let mut part = vec![0.0_f32; 5 * (last - first)];
        checkpoint.read_into(Targets::new().slice_elements("mesh", &[0..5, first..last], &mut part)).unwrap();
        let expected: Vec<f32> = (0..5).flat_map(|row| (first..last).map(move |column| element(row, column))).collect();
        assert_eq!(part, expected);
    }
    assert!(checkpoint.verify().unwrap().is_sound());
    // Each element is in one file, and no file but a shard looks like one.
    let names =
        std::fs::read_dir(checkpoint.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let shards = names.filter(|name| name.ends_with(".safetensors"));
    let bytes: u64 = shards.map(|name| checkpoint.path().join(name).metadata().unwrap().len() % 4096).sum();
    assert_eq!(bytes, (50 + 30) * 4 + 3 * 8);
}

/// Ranks hold columns of a matrix as views of it, and two processes restore halves of its rows, transposed.
#[test]
fn boxes_that_lie_at_strides_are_saved_and_restored() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, LONG);
    let matrix = View::new(Dtype::U16, &[600, 90], &[180, 2]);
    let memory = pattern(1, matrix.len);
    for step in [1, 2] {
        let ended = job.each(|rank, executor| {
            let columns = View { shape: vec![600, 30], first: 60 * rank, ..matrix.clone() };
            let mut state = StateDict::new();
            state.tensor_box("matrix", [600, 90], [0, 30 * rank], columns.source(&Buffer::new(memory.clone())))?;
            let save = executor.save(step, state)?;
            executor.fence()?;
            save.wait(LONG)
        });
        ended.into_iter().for_each(|ended| drop(ended.unwrap()));
    }
    let checkpoint = Catalog::open(root.path()).unwrap().latest().unwrap().unwrap();
    assert_eq!((checkpoint.step(), checkpoint.boxes("matrix").unwrap().len()), (2, 3));
    assert_eq!(checkpoint.read("matrix").unwrap(), memory);
    for first in [0, 300] {
        let transposed = View::new(Dtype::U16, &[300, 90], &[2, 600]);
        let mut read = vec![0; transposed.len];
        let target = transposed.target(&mut read);
        checkpoint.read_into(Targets::new().host_slice("matrix", &[first..first + 300, 0..90], target)).unwrap();
        assert_eq!(transposed.packed(&read), memory[first * 180..(first + 300) * 180]);
    }
}

#[test]
fn boxes_that_overlap_or_leave_a_hole_are_refused_with_the_ranks() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, LONG);
    for (firsts, named) in [([0, 2, 5], &[0, 1, 2][..]), ([0, 3, 7], &[][..])] {
        let refused = job.each(|rank, executor| {
            let mut state = StateDict::new();
            let mine = HostTensor::new(Arc::new(vec![0_u8; 3]), [3]);
            state.tensor_box("t", [10], [firsts[rank]], mine)?;
            executor.save(1, state)
        });
        for refused in refused {
            let error = refused.unwrap_err();
            assert_eq!(error.kind(), ashore::ErrorKind::Invalid, "{error}");
            assert!(error.message().contains("\"t\""), "{error}");
            assert!(named.is_empty() || error.ranks().iter().all(|rank| named.contains(rank)), "{error}");
        }
    }
}

/// A tensor that only the first rank ties, and one whose rows two ranks hold and tie.
#[test]
fn tied_tensors_of_several_ranks_are_written_once() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    let ended = job.each(|rank, executor| {
        let mut state = StateDict::new();
        let rows = HostTensor::new(Arc::new(vec![rank as f32; 6]), [2, 3]);
        state.tensor_box("body", [4, 3], [2 * rank, 0], rows)?.alias("head", "body")?;
        if rank == 0 {
            state.tensor("norm", Arc::new(vec![5_u8; 3]))?.alias("also", "norm")?;
        }
        executor.save(1, state)?.wait(LONG)
    });
    ended.into_iter().for_each(|ended| drop(ended.unwrap()));
    let checkpoint = Catalog::open(root.path()).unwrap().latest().unwrap().unwrap();
    let names: Vec<_> = checkpoint.tensors().unwrap().map(|tensor| tensor.name).collect();
    assert_eq!(names, ["also", "body", "head", "norm"]);
    assert_eq!(checkpoint.read_as::<f32>("head").unwrap(), [[0.0; 6], [1.0; 6]].concat());
    assert_eq!(checkpoint.read("also").unwrap(), [5; 3]);
    assert!(checkpoint.verify().unwrap().is_sound());
}

/// Regression: a rank that writes no tensor, because others hold all of its boxes, could not keep values.
#[test]
fn a_rank_without_a_shard_keeps_values_of_its_own() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, LONG);
    let ended = job.each(|rank, executor| {
        let mut state = StateDict::new();
        if rank != 1 {
            state.tensor_box("t", [2], [rank / 2], HostTensor::new(Arc::new(vec![rank as u8]), [1]))?;
        }
        state.rank_value("seed", &(100 + rank as u64))?;
        if rank == 2 {
            state.rank_value("extra", "only here")?;
        }
        executor.save(1, state)?.wait(LONG)
    });
    ended.into_iter().for_each(|ended| drop(ended.unwrap()));
    let checkpoint = Catalog::open(root.path()).unwrap().latest().unwrap().unwrap();
    assert!(checkpoint.verify().unwrap().is_sound());
    assert_eq!(checkpoint.rank_value::<u64>(1, "seed").unwrap(), 101);
    assert_eq!(checkpoint.rank_values::<u64>("seed").unwrap(), [(0, 100), (1, 101), (2, 102)].into());
    assert_eq!(checkpoint.rank_values::<String>("extra").unwrap(), [(2, "only here".to_owned())].into());
    assert_eq!(checkpoint.rank_values::<u64>("none").unwrap_err().kind(), ErrorKind::NotFound);
    // The same ranks get theirs; fewer would lose some, so they have to say what becomes of the rest.
    job.each(|rank, executor| {
        assert_eq!(executor.rank_value::<u64>(&checkpoint, "seed")?, 100 + rank as u64);
        Ok(())
    })
    .into_iter()
    .for_each(|ended: ashore::Result<()>| ended.unwrap());
    drop(job);
    let fewer = Job::start(root.path(), 2, LONG);
    for refused in fewer.each(|_, executor| executor.rank_value::<u64>(&checkpoint, "seed")) {
        let error = refused.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.message().contains("\"seed\" ranks=2 saved_by_ranks=3"), "{error}");
    }
    // Its file is checked as it is read.
    let file = checkpoint.path().join("shard-00001-values.json");
    let damaged = std::fs::read_to_string(&file).unwrap().replace("101", "102");
    std::fs::write(&file, damaged).unwrap();
    let damaged = Catalog::open(root.path()).unwrap().checkpoint(1).unwrap();
    let error = damaged.rank_value::<u64>(1, "seed").unwrap_err();
    assert_eq!((error.kind(), error.path()), (ErrorKind::Corrupt, Some(file.as_path())));
    assert!(!damaged.verify().unwrap().is_sound());
}
