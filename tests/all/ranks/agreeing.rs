//! Ranks agree on what they save before a byte is written, and rank 0 alone applies the overlap policy.

use super::{Job, LONG, assert_holds, state, steps};
use ashore::{ErrorKind, Outcome, SaveOptions};

#[test]
fn ranks_that_save_different_steps_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3, LONG);
    let saves = [7, 7, 8].into_iter().enumerate();
    let saves: Vec<_> = saves.map(|(rank, step)| job.ranks[rank].save(step, state(rank, 7)).unwrap()).collect();
    for save in saves {
        let error = save.wait(LONG).unwrap_err();
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[2][..]), "{error}");
        assert!(error.message().contains("rank_0=7 rank_2=8"), "{error}");
    }
    assert_eq!(steps(root.path()), Vec::<u64>::new());
    job.saved(9).into_iter().for_each(|ended| drop(ended.unwrap()));
}

#[test]
fn ranks_that_differ_in_name_or_overwrite_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    for (options, what) in
        [(SaveOptions::default().overwrite(), "`overwrite`"), (SaveOptions::default().name("final"), "name")]
    {
        let first = job.ranks[0].save(1, state(0, 1)).unwrap();
        let second = job.ranks[1].save_with(1, state(1, 1), options).unwrap();
        for save in [first, second] {
            let error = save.wait(LONG).unwrap_err();
            assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1][..]), "{error}");
            assert!(error.message().contains(what), "{error}");
        }
    }
}

/// A call that is refused on one rank counts on all: otherwise that rank would save another step than the
/// others from then on.
#[test]
fn a_call_that_is_refused_on_one_rank_fails_on_all() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    let first = job.ranks[0].save(1, state(0, 1)).unwrap();
    let refused = job.ranks[1].save_with(1, state(1, 1), SaveOptions::default().name("step-2"));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
    let error = first.wait(LONG).unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1][..]), "{error}");
    job.saved(2).into_iter().for_each(|ended| drop(ended.unwrap()));
    assert_holds(root.path(), 2, 2);
}

#[test]
fn a_step_that_exists_is_a_conflict_on_all() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2, LONG);
    job.saved(1).into_iter().for_each(|ended| drop(ended.unwrap()));
    for ended in job.saved(1) {
        assert_eq!(ended.unwrap_err().kind(), ErrorKind::Conflict);
    }
    let again =
        (0..2).map(|rank| job.ranks[rank].save_with(1, state(rank, 1), SaveOptions::default().overwrite()).unwrap());
    let again: Vec<_> = again.collect();
    again.iter().for_each(|save| drop(save.wait(LONG).unwrap()));
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
    let ranks = [build(0), build(1)].map(|thread| thread.join().unwrap());
    // Rank 0 has two saves under way before rank 1 has any: it skips the second.
    let first = [1, 2].map(|step| ranks[0].save(step, state(0, step)).unwrap());
    let second = [1, 2].map(|step| ranks[1].save(step, state(1, step)).unwrap());
    for saves in [&first, &second] {
        assert!(matches!(saves[0].wait(LONG), Ok(Outcome::Durable(_))));
        assert!(matches!(saves[1].wait(LONG), Ok(Outcome::Skipped { by: 1 })));
    }
    assert_eq!(steps(root.path()), [1]);
    ranks.iter().for_each(|rank| rank.shutdown(LONG).unwrap());
}
