//! A sweep acts on this host's dead and on nobody else.

use ashore::Attempt;
use ashore::storage::Storage;
use ashore::storage::local::Local;
use std::fs;
use std::path::Path;

fn names(root: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// An attempt that nobody holds any more; returns its names without the suffix.
fn dead_attempt(storage: &Local) -> String {
    let name = Attempt::new();
    let attempt = storage.begin("step-1", name, false).unwrap();
    attempt.put("half", b"written").unwrap();
    drop(attempt);
    format!(".step-1.{name}")
}

#[test]
fn of_a_dead_owner_attempt_and_record_go() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let dead = dead_attempt(&storage);
    assert_eq!(names(directory.path()), [format!("{dead}.owner"), format!("{dead}.tmp")]);
    let swept = storage.sweep().unwrap();
    assert_eq!((swept.removed, swept.left), (vec![format!("{dead}.tmp")], vec![]));
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn a_live_owner_in_another_process_or_storage_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    let swept = Local::open(directory.path()).unwrap().sweep().unwrap();
    assert_eq!(swept.removed, [""; 0]);
    assert!(swept.left[0].1.starts_with("live"), "{swept:?}");
    attempt.put("manifest.json", b"{}").unwrap();
    attempt.publish(false).unwrap();
    assert_eq!(storage.sweep().unwrap().removed, [""; 0]);
    attempt.settle().unwrap();
}

#[test]
fn records_of_other_hosts_and_records_that_say_nothing_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let records = [
        r#"{"host":"elsewhere","boot_id":"another","pid":1,"start_time":1}"#,
        "",
        "{",
        r#"{"host":"elsewhere"}"#,
        r#"{"host":"elsewhere","boot_id":"","pid":1,"start_time":1}"#,
    ];
    for record in records {
        let dead = dead_attempt(&storage);
        fs::write(directory.path().join(format!("{dead}.owner")), record).unwrap();
    }
    let before = names(directory.path());
    let swept = storage.sweep().unwrap();
    assert_eq!((swept.removed.len(), swept.left.len()), (0, records.len()), "{swept:?}");
    assert_eq!(names(directory.path()), before);
}

#[test]
fn after_a_restart_of_this_host_its_attempts_are_dead() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let dead = dead_attempt(&storage);
    let path = directory.path().join(format!("{dead}.owner"));
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record["boot_id"] = "the boot before".into();
    fs::write(&path, record.to_string()).unwrap();
    assert_eq!(storage.sweep().unwrap().removed, [format!("{dead}.tmp")]);
}

#[test]
fn attempts_without_a_record_and_foreign_files_are_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let orphan = format!(".step-1.{}.tmp", Attempt::new());
    for name in [&*orphan, ".git", "runs", ".step-1.notes.tmp"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    fs::write(directory.path().join(".env"), b"x").unwrap();
    let before = names(directory.path());
    let swept = storage.sweep().unwrap();
    assert_eq!((swept.removed, swept.left), (vec![], vec![(orphan, "has no owner record".into())]));
    assert_eq!(names(directory.path()), before);
}

#[test]
fn trash_is_emptied_and_what_nobody_expects_in_it_stays() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    for name in [".trash-1", ".trash-2/deep"] {
        fs::create_dir_all(directory.path().join(name)).unwrap();
    }
    fs::write(directory.path().join(".trash-1/shard"), b"old").unwrap();
    fs::write(directory.path().join(".trash-2/deep/file"), b"whose?").unwrap();
    let swept = storage.sweep().unwrap();
    assert_eq!(swept.removed, [".trash-1"]);
    assert_eq!(swept.left[0].0, ".trash-2");
    assert!(directory.path().join(".trash-2/deep/file").exists());
}

#[test]
fn what_an_overwrite_displaced_goes_when_its_owner_died_before_it_could() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    for bytes in ["old", "new"] {
        let attempt = storage.begin("step-1", Attempt::new(), true).unwrap();
        attempt.put("manifest.json", bytes.as_bytes()).unwrap();
        attempt.publish(true).unwrap();
    }
    assert_eq!(names(directory.path()).len(), 4);
    assert_eq!(storage.sweep().unwrap().removed.len(), 2);
    assert_eq!(names(directory.path()), ["step-1"]);
    assert_eq!(fs::read(directory.path().join("step-1/manifest.json")).unwrap(), b"new");
}
