//! The order of the calls is the promise: what is fsynced, and before what.

use ashore::storage::local::{Linux, Local};
use ashore::storage::{Storage, Sweep};
use ashore::testing::{AlignedBuffer, Call, Effect, Fault, Faulty, Logged};
use ashore::{Attempt, ErrorKind};
use std::path::Path;
use std::sync::Arc;

/// The calls that change or fix something, as `call name`, with the root as `.` and the attempt left out.
pub(super) fn story(log: &[Logged], root: &Path, attempt: Attempt) -> Vec<String> {
    let short = |path: &Path| {
        let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace(&attempt.to_string(), "A");
        if name.is_empty() { ".".to_owned() } else { name }
    };
    let changes = |call| !matches!(call, Call::Open | Call::Pread | Call::Stat | Call::List | Call::Direct);
    log.iter()
        .filter(|logged| changes(logged.call))
        .map(|logged| {
            let to = logged.to.as_deref().map_or(String::new(), |to| format!(" {}", short(to)));
            format!("{:?} {}{to}", logged.call, short(&logged.path)).to_lowercase()
        })
        .collect()
}

#[test]
fn of_a_save() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::new(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    for overwrite in [false, true] {
        let before = faulty.log().len();
        let name = Attempt::new();
        let attempt = storage.begin("step-1", name, overwrite).unwrap();
        let shard = attempt.create("shard", 5000).unwrap();
        shard.write_at(0, &AlignedBuffer::new(8192)).unwrap();
        shard.seal().unwrap();
        attempt.put("manifest.json", b"{}").unwrap();
        attempt.publish(overwrite).unwrap();
        attempt.settle().unwrap();
        let mut expected = vec![
            "lock .step-1.a.owner",
            "pwrite .step-1.a.owner",
            "fsync .step-1.a.owner",
            "fsync .",
            "mkdir .step-1.a.tmp",
            "fallocate .step-1.a.tmp/shard",
            "pwrite .step-1.a.tmp/shard",
            "ftruncate .step-1.a.tmp/shard",
            "fsync .step-1.a.tmp/shard",
            "pwrite .step-1.a.tmp/manifest.json",
            "fsync .step-1.a.tmp/manifest.json",
            "fsync .step-1.a.tmp",
            "rename .step-1.a.tmp step-1",
            "fsync .",
        ];
        if overwrite {
            expected.extend([
                "unlink .step-1.a.tmp/manifest.json",
                "unlink .step-1.a.tmp/shard",
                "unlink .step-1.a.tmp",
                "fsync .",
            ]);
        }
        expected.push("unlink .step-1.a.owner");
        let mut story = story(&faulty.log()[before..], directory.path(), name);
        // Directories list their files in no order.
        if overwrite {
            story[14..16].sort();
        }
        assert_eq!(story, expected);
    }
}

#[test]
fn of_a_removal() {
    let (directory, faulty, storage) = with_one_step();
    let before = faulty.log().len();
    storage.remove("step-1").unwrap();
    let story = story(&faulty.log()[before..], directory.path(), Attempt::new());
    let calls: Vec<_> = story.iter().map(|call| call.split('-').next().unwrap()).collect();
    assert_eq!(calls, ["rename step", "fsync .", "unlink .trash", "unlink .trash"], "{story:?}");
}

#[test]
fn of_a_confirmation() {
    let (directory, faulty, storage) = with_one_step();
    let before = faulty.log().len();
    storage.confirm("step-1").unwrap();
    let story = story(&faulty.log()[before..], directory.path(), Attempt::new());
    assert_eq!(story, ["fsync step-1/manifest.json", "fsync step-1", "fsync ."]);
}

#[test]
fn of_new_directories() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::new(Arc::new(Linux));
    Local::with_sys(faulty.clone(), directory.path().join("a/b")).unwrap();
    let story = story(&faulty.log(), directory.path(), Attempt::new());
    assert_eq!(story[story.len() - 4..], ["mkdir a", "fsync .", "mkdir a/b", "fsync a"]);
    // Another process may have made them and died before it could make them durable.
    let before = faulty.log().len();
    Local::with_sys(faulty.clone(), directory.path().join("a/b")).unwrap();
    let log = faulty.log();
    let story = self::story(&log[before..], directory.path(), Attempt::new());
    assert_eq!(story[story.len() - 2..], ["fsync .", "fsync a"]);
}

#[test]
fn a_sweep_fsyncs_the_root_before_it_deletes_the_record_of_a_published_attempt() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::new(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    let name = Attempt::new();
    let attempt = storage.begin("step-1", name, false).unwrap();
    attempt.put("manifest.json", b"{}").unwrap();
    attempt.publish(false).unwrap();
    drop(attempt);
    let before = faulty.log().len();
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 1);
    let story = story(&faulty.log()[before..], directory.path(), name);
    assert_eq!(story, ["lock .step-1.a.owner", "fsync .", "unlink .step-1.a.owner"]);
}

#[test]
fn a_failed_fsync_is_final_for_its_descriptor_and_its_attempt() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::new(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    let shard = attempt.create("shard", 4096).unwrap();
    shard.write_at(0, &AlignedBuffer::new(4096)).unwrap();
    faulty.fail(Fault { call: Some(Call::Fsync), after: 0, sticky: false, effect: Effect::Refused(libc::EIO) });
    assert_eq!(shard.seal().unwrap_err().kind(), ErrorKind::Unavailable);
    assert!(shard.seal().is_err());
    assert!(attempt.publish(false).is_err());
    attempt.abandon().unwrap();
    // The next attempt is not affected.
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    attempt.put("manifest.json", b"{}").unwrap();
    attempt.publish(false).unwrap();
}

#[test]
fn a_publish_that_cannot_be_made_durable_is_indeterminate_and_nothing_is_deleted_after_it() {
    let (_directory, faulty, storage) = with_one_step();
    let attempt = storage.begin("step-1", Attempt::new(), true).unwrap();
    attempt.put("manifest.json", b"{}").unwrap();
    faulty.fail(Fault { call: Some(Call::Fsync), after: 1, sticky: false, effect: Effect::Refused(libc::EIO) });
    assert_eq!(attempt.publish(true).unwrap_err().kind(), ErrorKind::Indeterminate);
    assert!(attempt.settle().is_err());
    assert_eq!(attempt.abandon().unwrap_err().kind(), ErrorKind::Indeterminate);
    drop(attempt);
    let before = faulty.log().len();
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 0);
    assert!(faulty.log()[before..].iter().all(|logged| !matches!(logged.call, Call::Unlink | Call::Rename)));
    // A later attempt has a descriptor of its own.
    let attempt = storage.begin("step-1", Attempt::new(), true).unwrap();
    attempt.put("manifest.json", b"{}").unwrap();
    attempt.publish(true).unwrap();
}

fn with_one_step() -> (tempfile::TempDir, Arc<Faulty>, Local) {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::new(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    attempt.put("manifest.json", b"{}").unwrap();
    attempt.publish(false).unwrap();
    attempt.settle().unwrap();
    (directory, faulty, storage)
}
