//! Sessions: the newest one owns the root, and every rank sees the same root.

use super::board::Board;
use super::{Job, LONG, assert_holds, meet, state, steps};
use ashore::ErrorKind;
use std::time::Duration;

/// The old job goes on after the new one has taken the root over; nothing of it becomes visible.
#[test]
fn a_job_that_was_replaced_publishes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let old = Job::start(root.path(), 2, LONG);
    old.warm(1);
    let new = Job::start(root.path(), 2, LONG);
    for ended in old.saved(2) {
        let error = ended.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Cancelled | ErrorKind::NotFound), "{error}");
    }
    new.warm(2);
    assert_eq!(steps(root.path()), [1, 2]);
    assert_holds(root.path(), 2, 2);
}

/// A save of the old job that is under way when the new job takes over.
#[test]
fn a_save_under_way_does_not_outlive_its_session() {
    let root = tempfile::tempdir().unwrap();
    let old = Job::start(root.path(), 2, LONG);
    old.warm(1);
    let first = old.ranks[0].save(2, state(0, 2)).unwrap();
    let new = Job::start(root.path(), 2, LONG);
    let second = old.ranks[1].save(2, state(1, 2)).unwrap();
    for save in [first, second] {
        save.wait(LONG).unwrap_err();
    }
    assert_eq!(steps(root.path()), [1]);
    new.warm(2);
}

#[test]
fn a_rank_that_sees_another_directory_is_told_so() {
    let root = tempfile::tempdir().unwrap();
    let roots = |rank: u32| root.path().join(if rank == 1 { "its-own" } else { "shared" });
    let built = meet(&Board::new(), 2, roots, LONG);
    let error = built[1].as_ref().unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1][..]), "{error}");
    assert!(error.message().contains("does not see the root of rank 0"), "{error}");
}

#[test]
fn ranks_that_do_not_come_are_named() {
    let root = tempfile::tempdir().unwrap();
    let coordinator = Board::new().rank(0, 3);
    let builder = ashore::CheckpointExecutor::builder(root.path()).save_timeout(Duration::from_millis(100));
    let error = builder.ranks(coordinator).build().unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Deadline, &[1, 2][..]), "{error}");
}

/// A program that a launcher started as one of several ranks must say whether they save together: each of
/// them would otherwise publish a step of its own under the same name.
#[test]
fn a_launcher_of_several_ranks_needs_a_word_of_the_program() {
    const CHILD: &str = "ASHORE_TEST_LAUNCHED";
    if std::env::var_os(CHILD).is_none() {
        let test = "ranks::sessions::a_launcher_of_several_ranks_needs_a_word_of_the_program";
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args([test, "--exact"]).env(CHILD, "1");
        child.envs([("RANK", "1"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1"), ("TORCHELASTIC_RUN_ID", "7")]);
        let output = child.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        return;
    }
    let root = tempfile::tempdir().unwrap();
    let builder = || ashore::CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20);
    let error = builder().build().unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[1][..]), "{error}");
    assert!(error.message().contains(".ranks(") && error.message().contains(".alone()"), "{error}");
    builder().alone().build().unwrap().save(1, state(0, 1)).unwrap().wait(LONG).unwrap();
}
