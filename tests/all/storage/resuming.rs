//! An attempt of a dead process is gone on with by another one, which has checked its files.

use ashore::storage::local::{Linux, Local};
use ashore::storage::{Storage, Sweep};
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{Attempt, ErrorKind, Locks};
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn names(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Leaves an attempt with a whole file and half of one, as a process that dies does.
fn left(root: &Path) -> Attempt {
    let attempt = Attempt::new();
    let resumable = Local::open(root).unwrap().begin_resumable("out", attempt).unwrap();
    resumable.writing().put("whole", b"all of it").unwrap();
    drop(resumable.writing().create("half", 10_000).unwrap());
    attempt
}

#[test]
fn files_that_were_checked_are_published_with_those_that_are_added() {
    let root = tempfile::tempdir().unwrap();
    let attempt = left(root.path());
    let storage = Local::open(root.path()).unwrap();
    let resumed = storage.resume("out", attempt, DAY).unwrap().unwrap();
    let mut there = resumed.list().unwrap();
    there.sort();
    assert_eq!(there, ["half", "whole"]);
    let mut bytes = [0; 9];
    resumed.open("whole").unwrap().read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"all of it");
    resumed.discard("half").unwrap();
    resumed.adopt("whole").unwrap();
    resumed.writing().put("added", b"by another").unwrap();
    resumed.writing().publish(false).unwrap();
    resumed.writing().settle().unwrap();
    assert_eq!(
        (names(root.path()), names(&root.path().join("out"))),
        (vec!["out".to_owned()], vec!["added".into(), "whole".into()])
    );
    assert!(storage.resume("out", attempt, DAY).unwrap().is_none());
}

/// Only the process that has the lock writes: neither a second one nor a sweep takes it from a resumed one.
#[test]
fn a_live_owner_keeps_its_attempt_also_when_it_has_taken_it_over() {
    let root = tempfile::tempdir().unwrap();
    let attempt = left(root.path());
    let (first, second) = (Local::open(root.path()).unwrap(), Local::open(root.path()).unwrap());
    let resumed = first.resume("out", attempt, DAY).unwrap().unwrap();
    for patience in [DAY, Duration::ZERO] {
        let refused = second.resume("out", attempt, patience).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Conflict);
        assert!(refused.message().contains("at present"), "{refused}");
    }
    assert_eq!(second.sweep(Sweep::default().older_than(Duration::ZERO)).unwrap().removed.len(), 0);
    drop(resumed);
    assert!(second.resume("out", attempt, DAY).unwrap().is_some());
    assert_eq!(second.sweep(Sweep::default()).unwrap().removed.len(), 1, "dead again");
    assert_eq!(names(root.path()), [""; 0]);
}

/// What another boot left may be another host's: only age, or a caller that knows, says that it is dead.
#[test]
fn an_attempt_of_another_boot_is_taken_over_on_request_alone() {
    let root = tempfile::tempdir().unwrap();
    let attempt = left(root.path());
    let record = root.path().join(format!(".out.{attempt}.owner"));
    let mut owner: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    owner["boot_id"] = "another boot, with a name longer than that of this one, which is 36 characters long".into();
    fs::write(&record, owner.to_string()).unwrap();
    let storage = Local::open(root.path()).unwrap();
    let refused = storage.resume("out", attempt, DAY).unwrap_err();
    assert!(refused.message().contains("may still write it"), "{refused}");
    let resumed = storage.resume("out", attempt, Duration::ZERO).unwrap().unwrap();
    // The record is this process's now, and can be read although it is shorter.
    let owner: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    assert_eq!(owner["pid"], std::process::id());
    drop(resumed);
    assert!(storage.resume("out", attempt, DAY).unwrap().is_some());
}

#[test]
fn a_record_without_an_attempt_is_deleted_and_an_attempt_without_a_record_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let attempt = left(root.path());
    let storage = Local::open(root.path()).unwrap();
    let temp = root.path().join(format!(".out.{attempt}.tmp"));
    // The owner died after its publish.
    fs::rename(&temp, root.path().join("out")).unwrap();
    assert!(storage.resume("out", attempt, DAY).unwrap().is_none());
    assert_eq!(names(root.path()), ["out"]);
    fs::rename(root.path().join("out"), &temp).unwrap();
    let refused = storage.resume("out", attempt, DAY).unwrap_err();
    assert!(refused.message().contains("no owner record"), "{refused}");
    assert_eq!(storage.begin_resumable("out", attempt).unwrap_err().kind(), ErrorKind::Conflict);
}

/// A file whose fsync failed may not be on the medium, whatever was read of it.
#[test]
fn a_file_that_cannot_be_made_durable_is_not_published() {
    let root = tempfile::tempdir().unwrap();
    let attempt = left(root.path());
    let faulty = Faulty::new(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), root.path()).unwrap();
    let resumed = storage.resume("out", attempt, DAY).unwrap().unwrap();
    let effect = Effect::Refused(libc::EIO);
    faulty.fail(Fault { call: Some(Call::Fsync), after: 0, sticky: false, effect });
    assert_eq!(resumed.adopt("whole").unwrap_err().kind(), ErrorKind::Unavailable);
    let refused = resumed.writing().publish(false).unwrap_err();
    assert!(refused.message().contains("lost"), "{refused}");
    assert!(!root.path().join("out").exists());
}

/// Age and the user can be wrong: the first owner may live and have half of a file in the attempt.
#[test]
fn an_owner_that_was_taken_for_dead_neither_writes_nor_publishes() {
    let root = tempfile::tempdir().unwrap();
    let (attempt, storage) = (Attempt::new(), || Local::open(root.path()).unwrap().locks(Locks::None));
    let mut owners = vec![storage().begin_resumable("out", attempt).unwrap()];
    owners[0].writing().put("whole", b"all of it").unwrap();
    for _ in 0..2 {
        let next = storage().resume("out", attempt, Duration::ZERO).unwrap().unwrap();
        next.adopt("whole").unwrap();
        let earlier = owners.last().unwrap();
        let refused = [
            earlier.writing().put("late", b"").unwrap_err(),
            earlier.writing().create("late", 10).map(drop).unwrap_err(),
            earlier.rewrite("whole", b"late").unwrap_err(),
            earlier.discard("whole").unwrap_err(),
            earlier.writing().publish(false).unwrap_err(),
        ];
        for error in refused {
            assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
            assert!(error.message().contains("taken the attempt over"), "{error}");
        }
        owners.push(next);
    }
    assert_eq!(names(root.path()).len(), 2, "the attempt and its record, and no step");
    let last = owners.pop().unwrap();
    last.writing().publish(false).unwrap();
    last.writing().settle().unwrap();
    // The record is gone with the attempt.
    for earlier in owners {
        assert_eq!(earlier.writing().publish(false).unwrap_err().kind(), ErrorKind::Conflict);
    }
    assert_eq!(fs::read(root.path().join("out/whole")).unwrap(), b"all of it");
    assert_eq!((names(root.path()), names(&root.path().join("out"))), (vec!["out".into()], vec!["whole".to_owned()]));
}

/// Of any length, and whether it is there or not.
#[test]
fn a_file_of_known_bytes_is_written_again() {
    let root = tempfile::tempdir().unwrap();
    let attempt = left(root.path());
    let storage = Local::open(root.path()).unwrap();
    let resumed = storage.resume("out", attempt, DAY).unwrap().unwrap();
    for (file, bytes) in [("whole", "all of it"), ("half", "shorter"), ("new", "")] {
        resumed.rewrite(file, bytes.as_bytes()).unwrap();
    }
    resumed.writing().publish(false).unwrap();
    resumed.writing().settle().unwrap();
    let read = |file: &str| fs::read_to_string(root.path().join("out").join(file)).unwrap();
    assert_eq!([read("whole"), read("half"), read("new")], ["all of it", "shorter", ""]);
}
