//! What several ranks saved is restored by any number of processes, in any boxes.

use super::{Job, LONG};
use ashore::{Catalog, HostTensor, StateDict, Targets};
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

/// The only tensor is written by rank 0, so there is no file beside which rank 1 could keep a value: it must
/// not get lost.
#[test]
fn values_of_a_rank_that_writes_nothing_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    for (step, kept) in [(1, true), (2, false)] {
        let ended = job.each(|rank, executor| {
            let mut state = StateDict::new();
            state.tensor("scale", Arc::new(vec![1.0_f32; 2]))?;
            if kept {
                state.rank_value("seed", &rank)?;
            }
            executor.save(step, state)?.wait(LONG)
        });
        for ended in ended {
            assert_eq!(ended.is_err(), kept, "{ended:?}");
            if let Err(error) = ended {
                assert_eq!((error.kind(), error.ranks()), (ashore::ErrorKind::Invalid, &[1][..]), "{error}");
                assert!(error.message().contains("\"seed\""), "{error}");
            }
        }
    }
    let checkpoint = Catalog::open(root.path()).unwrap().latest().unwrap().unwrap();
    assert_eq!(checkpoint.read_as::<f32>("scale").unwrap(), [1.0; 2]);
}
