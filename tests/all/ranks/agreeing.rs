//! Ranks agree on what they save before a byte is written, and rank 0 alone applies the overlap policy.

use super::{Job, LONG, assert_holds, state, steps};
use crate::fixtures::executor::Buffer;
use crate::fixtures::strided::View;
use ashore::{Catalog, Dtype, ErrorKind, HostTensor, Outcome, SaveOptions, StateDict};
use std::sync::Arc;

#[test]
fn ranks_that_save_different_steps_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, LONG);
    let ended = job.each(|rank, executor| executor.save([7, 7, 8][rank], state(rank, 7))?.wait(LONG));
    for ended in ended {
        let error = ended.unwrap_err();
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[2][..]), "{error}");
        assert!(error.message().contains("rank_0=7 rank_2=8"), "{error}");
    }
    assert_eq!(steps(root.path()), Vec::<u64>::new());
    job.warm(9);
}

#[test]
fn ranks_that_differ_in_name_or_overwrite_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    let other = [(SaveOptions::default().overwrite(), "`overwrite`"), (SaveOptions::default().name("final"), "name")];
    for (other, what) in other {
        let ended = job.each(|rank, executor| {
            let options = if rank == 1 { other.clone() } else { SaveOptions::default() };
            executor.save_with(1, state(rank, 1), options)?.wait(LONG)
        });
        for ended in ended {
            let error = ended.unwrap_err();
            assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1][..]), "{error}");
            assert!(error.message().contains(what), "{error}");
        }
    }
}

/// Ranks that describe a tensor differently are refused in the call of `save`, before a byte is written.
#[test]
fn ranks_that_disagree_about_a_tensor_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, LONG);
    let saves = job.each(|rank, executor| {
        let mut state = state(rank, 1);
        if rank > 0 {
            state.tensor("norm", vec![0_u8; 7 + rank]).unwrap();
        }
        executor.save(1, state).map(drop)
    });
    for refused in saves {
        let error = refused.unwrap_err();
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1, 2][..]), "{error}");
        assert!(error.message().contains("\"norm\" rank_1=U8[8] rank_2=U8[9]"), "{error}");
    }
    assert_eq!(steps(root.path()), Vec::<u64>::new());
    job.warm(2);
}

/// A call that is refused on one rank counts on all: otherwise that rank would save another step than the
/// others from then on.
#[test]
fn a_call_that_is_refused_on_one_rank_fails_on_all() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    for step in [1, 2] {
        let ended = job.each(|rank, executor| {
            let options =
                SaveOptions::default().name(if rank == 1 { "step-9".into() } else { ashore::id::step_name(step) });
            executor.save_with(step, state(rank, step), options)?.wait(LONG)
        });
        for ended in ended {
            let error = ended.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{error}");
        }
        job.warm(step + 10);
    }
    assert_holds(root.path(), 2, 12);
}

/// The tensors of one rank change alone. The other one has staged by the old plan, so that save fails, once;
/// the next one follows the new plan.
#[test]
fn a_structure_that_changes_on_one_rank_fails_one_save() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    let save = |step: u64, grown: bool| {
        job.each(|rank, executor| {
            let mut state = state(rank, step);
            state.tensor("shared", Arc::new(vec![1_u8; 5000])).unwrap();
            if grown && rank == 1 {
                state.tensor("grown", Arc::new(vec![2_u8; 50_000])).unwrap();
            }
            executor.save(step, state)?.wait(LONG)
        })
    };
    save(1, false).into_iter().for_each(|ended| drop(ended.unwrap()));
    // Rank 1 has more to write now, so rank 0 writes what both hold.
    let ended = save(2, true);
    let after = save(3, true);
    let failed =
        ended.iter().filter(|ended| ended.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy)).count();
    assert!(failed == 0 || failed == 2, "{ended:?}");
    after.into_iter().for_each(|ended| drop(ended.unwrap()));
    let checkpoint = ashore::Catalog::open(root.path()).unwrap().checkpoint(3).unwrap();
    assert_eq!(checkpoint.read("grown").unwrap(), vec![2_u8; 50_000]);
    assert_eq!(checkpoint.read("shared").unwrap(), vec![1_u8; 5000]);
}

#[test]
fn a_step_that_exists_is_a_conflict_on_all() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    job.warm(1);
    for ended in job.saved(1) {
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Conflict);
    }
    let again = job
        .each(|rank, executor| executor.save_with(1, state(rank, 1), SaveOptions::default().overwrite())?.wait(LONG));
    again.into_iter().for_each(|ended| drop(ended.unwrap()));
    assert_holds(root.path(), 2, 1);
}

#[test]
fn the_outcome_of_skipped_saves_is_that_of_rank_0() {
    use ashore::Overlap;
    let root = tempfile::tempdir().unwrap();
    let board = super::Board::new();
    let build = |rank: u32| {
        let (coordinator, root) = (board.rank(rank, 2), root.path().to_owned());
        std::thread::spawn(move || {
            let builder = ashore::CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20);
            builder.overlap(Overlap::Skip).ranks(coordinator).build().unwrap()
        })
    };
    let job = Job { board: board.clone(), ranks: [build(0), build(1)].map(|thread| thread.join().unwrap()).into() };
    job.warm(9);
    let ranks = &job.ranks;
    // Rank 0 has two saves under way before rank 1 has any: it skips the second.
    let first = [1, 2].map(|step| ranks[0].save(step, state(0, step)).unwrap());
    let second = [1, 2].map(|step| ranks[1].save(step, state(1, step)).unwrap());
    for saves in [&first, &second] {
        assert!(matches!(saves[0].wait(LONG), Ok(Outcome::Durable(_))));
        assert!(matches!(saves[1].wait(LONG), Ok(Outcome::Skipped { by: 1 })));
    }
    assert_eq!(steps(root.path()), [1, 9]);
    ranks.iter().for_each(|rank| rank.shutdown(LONG).unwrap());
}

/// One rank writes what several ranks hold, so another rank whose weights have drifted would go unnoticed.
#[test]
fn a_rank_that_holds_another_value_of_a_replica_is_named() {
    #[derive(Clone, Copy, PartialEq)]
    enum Kind {
        Shared,
        Raw,
        /// Every third byte of a buffer, from the last to the first.
        Strided,
    }
    for (small, kind) in
        [(true, Kind::Shared), (false, Kind::Shared), (false, Kind::Raw), (true, Kind::Strided), (false, Kind::Strided)]
    {
        let root = tempfile::tempdir().unwrap();
        let job = Job::start(root.path(), 3, LONG);
        let bytes = if small { 8 } else { 20_000 };
        let save = |step: u64, drifted: Option<usize>| {
            job.each(|rank, executor| {
                let value = if drifted == Some(rank) { 0xBB } else { 0xAA };
                let buffer = Buffer::new(vec![value; bytes]);
                let mut state = StateDict::new();
                match kind {
                    Kind::Raw => state.tensor("norm", buffer.source())?,
                    Kind::Shared => state.tensor("norm", Arc::new(vec![value; bytes]))?,
                    Kind::Strided => {
                        let view = View::new(Dtype::U8, &[bytes], &[-3]);
                        // What lies between elements is of no concern.
                        let mut memory: Vec<_> = (0..view.len).map(|i| (i * (rank + 1)) as u8).collect();
                        view.unpack(&vec![value; bytes], &mut memory);
                        state.tensor("norm", view.source(&Buffer::new(memory)))?
                    }
                };
                // So that no rank is without a shard of its own.
                state.tensor_box("rows", [3], [rank], HostTensor::new(Arc::new(vec![rank as u8]), [1]))?;
                let save = executor.save(step, state)?;
                executor.fence()?;
                save.wait(LONG)
            })
        };
        for (step, drifted) in [(1, 0), (2, 2)] {
            for refused in save(step, Some(drifted)) {
                let error = refused.unwrap_err();
                assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[drifted as u32][..]), "{error}");
                assert!(error.message().contains("different values of one tensor"), "{error}");
                assert!(error.message().contains("tensor=\"norm\""), "{error}");
            }
        }
        save(3, None).into_iter().for_each(|saved| drop(saved.unwrap()));
        let checkpoint = Catalog::open(root.path()).unwrap().latest().unwrap().unwrap();
        assert_eq!((checkpoint.step(), checkpoint.read("norm").unwrap()), (3, vec![0xAA; bytes]));
    }
}

/// Regression: the ranks had made a plan when their first save failed, and no rank had got its part of it; so
/// every later save of the structure failed.
#[test]
fn a_structure_whose_first_save_failed_is_saved_later() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    job.warm(1);
    drop(job);
    let job = Job::start(root.path(), 2, LONG);
    for ended in job.saved(1) {
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Conflict);
    }
    job.warm(2);
    job.warm(3);
    assert_eq!(steps(root.path()), [1, 2, 3]);
}
