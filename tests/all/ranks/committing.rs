//! One commit: all ranks, or none.

use super::{Job, LONG, assert_holds, state, steps};
use ashore::ranks::Phase;
use ashore::storage::local::{Linux, Local};
use ashore::testing::{Call, Faulty};
use ashore::{ErrorKind, Outcome, SaveOptions};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[test]
fn ranks_save_one_step_together() {
    let root = tempfile::tempdir().unwrap();
    for world in [1, 2, 5] {
        let job = Job::start(root.path(), world, LONG);
        for step in [u64::from(world) * 10, u64::from(world) * 10 + 1] {
            let ended: Vec<_> = job.saved(step).into_iter().map(|ended| ended.unwrap().committed().unwrap()).collect();
            assert!(ended.iter().all(|committed| committed.attempt == ended[0].attempt && committed.step == step));
            assert_holds(root.path(), world as usize, step);
        }
        job.ranks.iter().for_each(|rank| rank.shutdown(LONG).unwrap());
    }
    assert_eq!(steps(root.path()), [10, 11, 20, 21, 50, 51]);
}

/// A rank that fails before its receipt fails the save on all ranks, and they know which it was.
#[test]
fn a_rank_that_fails_is_named_on_every_rank() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, LONG);
    job.warm(1);
    let ended = job.each(|rank, executor| {
        let save = executor.save(2, state(rank, 2))?;
        if rank == 2 {
            save.cancel();
        }
        save.wait(LONG)
    });
    for ended in ended {
        let error = ended.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
    }
    assert_eq!(steps(root.path()), [1]);
    job.warm(3);
    assert_holds(root.path(), 3, 3);
}

#[test]
fn a_cancelled_rank_cancels_the_save_on_all() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    job.warm(1);
    let first = job.ranks[0].save(2, state(0, 2)).unwrap();
    // Rank 0 waits for the other one.
    assert!(first.cancel());
    let second = job.ranks[1].save(2, state(1, 2)).unwrap();
    assert_eq!(first.wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    let error = second.wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Cancelled, &[0][..]));
    job.warm(3);
    assert_eq!(steps(root.path()), [1, 3]);
}

#[test]
fn a_rank_that_never_saves_is_named_at_the_deadline() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, Duration::from_millis(300));
    let ended = job.each(|rank, executor| (rank != 1).then(|| executor.save(1, state(rank, 1))?.wait(LONG)));
    for (rank, ended) in ended.into_iter().enumerate().filter_map(|(rank, ended)| Some((rank, ended?))) {
        let error = ended.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline, "{error}");
        assert_eq!(error.ranks(), [1], "{rank}: {error}");
    }
    assert_eq!(steps(root.path()), Vec::<u64>::new());
}

/// Rank 0 does not publish without the receipt of every rank. A rank that promised and heard nothing vetoes.
#[test]
fn a_lost_receipt_fails_the_save_on_all() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, Duration::from_millis(500));
    job.board.lose(1, Phase::Receipt);
    let ended = job.saved(1);
    let error = ended[0].as_ref().unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Deadline, &[1][..]), "{error}");
    assert_eq!(ended[1].as_ref().unwrap_err().kind(), ErrorKind::Deadline);
    assert_eq!(steps(root.path()), Vec::<u64>::new());
}

/// The outcome is on the storage, too: a rank that it does not reach looks there before it vetoes.
#[test]
fn a_rank_that_hears_no_outcome_finds_it_on_the_storage() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, Duration::from_secs(2));
    job.warm(1);
    job.board.lose(0, Phase::Outcome);
    for ended in job.saved(2) {
        assert!(matches!(ended, Ok(Outcome::Durable(_))), "{ended:?}");
    }
    assert_holds(root.path(), 2, 2);
}

/// Neither receipt nor outcome arrives, so rank 1 decides on the storage; it may report a failure, because
/// nothing of the attempt can become a step any more.
#[test]
fn a_rank_that_is_cut_off_vetoes() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, Duration::from_millis(500));
    job.board.lose(1, Phase::Receipt);
    job.board.lose(0, Phase::Outcome);
    for ended in job.saved(1) {
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Deadline);
    }
    job.board.heal();
    assert_eq!(steps(root.path()), Vec::<u64>::new());
    job.warm(2);
    assert_holds(root.path(), 2, 2);
}

/// A thread that hangs in a write on one rank keeps no save waiting beyond its deadline: neither its own, on
/// no rank, nor the next one, whose rounds the ranks carry out all the same.
#[test]
fn a_writer_that_hangs_on_one_rank_delays_no_save_beyond_its_deadline() {
    let root = tempfile::tempdir().unwrap();
    let sys = Faulty::new(Arc::new(Linux));
    let job = Job::with(root.path(), 2, LONG, |rank, builder| match rank {
        1 => builder.storage(Arc::new(Local::with_sys(sys.clone(), root.path()).unwrap())),
        _ => builder,
    });
    job.warm(1);
    let hung = sys.hold(Call::Pwrite);
    let patience = Duration::from_millis(500);
    for step in [2, 3] {
        let began = Instant::now();
        let options = || SaveOptions::default().timeout(patience);
        let ended = job.each(|rank, executor| executor.save_with(step, state(rank, step), options())?.wait(LONG));
        for ended in ended {
            let error = ended.unwrap_err();
            assert_eq!((error.kind(), error.ranks()), (ErrorKind::Deadline, &[1][..]), "{error}");
        }
        // The rounds of a failed save may last some seconds longer.
        assert!(began.elapsed() < patience + Duration::from_secs(8), "{:?}", began.elapsed());
    }
    drop(hung);
    job.warm(4);
    assert_eq!(steps(root.path()), [1, 4]);
    assert_holds(root.path(), 2, 4);
}
