//! A sweep removes the attempts of dead owners only: the lock decides under one boot, age everywhere else.

use ashore::storage::local::{Linux, Local};
use ashore::storage::{Remnant, State, Storage, Sweep};
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{Attempt, ErrorKind, Locks};
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

const HOUR: Duration = Duration::from_secs(3600);

fn names(root: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Makes an attempt without an owner; returns its names without the suffix.
fn dead_attempt(storage: &Local) -> String {
    let name = Attempt::new();
    let attempt = storage.begin("step-1", name, false).unwrap();
    attempt.put("half", b"written").unwrap();
    drop(attempt);
    format!(".step-1.{name}")
}

fn named(remnants: &[Remnant]) -> Vec<&str> {
    remnants.iter().map(|remnant| &*remnant.name).collect()
}

/// Makes the record and all files of an attempt look as if they were last modified so long ago.
fn age(root: &Path, attempt: &str, by: Duration) {
    let aged = |path: &Path| File::open(path).unwrap().set_modified(SystemTime::now() - by).unwrap();
    let temp = root.join(format!("{attempt}.tmp"));
    let files = fs::read_dir(&temp).into_iter().flatten().map(|entry| entry.unwrap().path());
    files
        .chain([temp.clone(), root.join(format!("{attempt}.owner"))])
        .filter(|path| path.exists())
        .for_each(|p| aged(&p));
}

/// Changes a field of an owner record.
fn rewrite(root: &Path, attempt: &str, field: &str, value: &str) {
    let path = root.join(format!("{attempt}.owner"));
    let mut record: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    record[field] = value.into();
    fs::write(&path, record.to_string()).unwrap();
}

#[test]
fn a_sweep_removes_the_attempt_and_the_record_of_a_dead_owner() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let dead = dead_attempt(&storage);
    assert_eq!(names(directory.path()), [format!("{dead}.owner"), format!("{dead}.tmp")]);
    let swept = storage.sweep(Sweep::default()).unwrap();
    assert_eq!((named(&swept.removed), swept.left.len()), (vec![&*format!("{dead}.tmp")], 0));
    assert_eq!((swept.removed[0].state, swept.removed[0].bytes), (State::Dead, 7));
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn a_live_owner_in_another_process_or_storage_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    let swept = Local::open(directory.path()).unwrap().sweep(Sweep::default()).unwrap();
    assert_eq!((swept.removed.len(), swept.left[0].state), (0, State::Live), "{swept:?}");
    attempt.put("manifest.json", b"{}").unwrap();
    attempt.publish(false).unwrap();
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 0);
    attempt.settle().unwrap();
}

/// A sweep deleted the attempt of a live process whose host had the same name as its own (pods of a stateful
/// set, cloned images) and another boot: a lock may not work between the two. And attempts of dead hosts
/// stayed for ever.
#[test]
fn an_attempt_of_another_boot_is_judged_by_its_age_under_any_host_name() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let dead = dead_attempt(&storage);
    rewrite(directory.path(), &dead, "boot_id", "another boot");
    let swept = storage.sweep(Sweep::default()).unwrap();
    assert_eq!((swept.removed.len(), named(&swept.left)), (0, vec![&*format!("{dead}.tmp")]));
    let left = &swept.left[0];
    assert_eq!((left.state, left.bytes), (State::Undecided, 7));
    assert!(left.age.unwrap() < HOUR && left.why.contains(&format!("pid={}", std::process::id())), "{left:?}");

    age(directory.path(), &dead, 25 * HOUR);
    let would = storage.sweep(Sweep::default().dry_run()).unwrap();
    assert!((24 * HOUR..26 * HOUR).contains(&would.removed[0].age.unwrap()), "{would:?}");
    // A file of it changes.
    fs::write(directory.path().join(format!("{dead}.tmp/half")), b"more").unwrap();
    assert_eq!(storage.sweep(Sweep::default()).unwrap().left[0].state, State::Undecided);
    age(directory.path(), &dead, 2 * HOUR);
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 0);
    assert_eq!(storage.sweep(Sweep::default().older_than(HOUR)).unwrap().removed.len(), 1);
    assert_eq!(names(directory.path()), [""; 0]);
}

/// However old an attempt is, a sweep believes a working lock that says that the owner is alive.
#[test]
fn a_held_lock_means_a_live_owner_under_any_boot_and_age() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let name = Attempt::new();
    let attempt = storage.begin("step-1", name, false).unwrap();
    let prefix = format!(".step-1.{name}");
    for _ in 0..2 {
        age(directory.path(), &prefix, 100 * HOUR);
        let swept = storage.sweep(Sweep::default().older_than(Duration::ZERO)).unwrap();
        assert_eq!((swept.removed.len(), swept.left[0].state), (0, State::Live), "{swept:?}");
        rewrite(directory.path(), &prefix, "boot_id", "another boot");
    }
    attempt.abandon().unwrap();
}

/// Where there are no locks, an owner shows that it is alive by touching its record. Its own boot must not
/// take the free lock for a sign of death.
#[test]
fn without_locks_an_owner_lives_as_long_as_it_touches_its_record() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap().locks(Locks::None);
    let other = Local::open(directory.path()).unwrap();
    let name = Attempt::new();
    let attempt = storage.begin("step-1", name, false).unwrap();
    attempt.put("manifest.json", b"{}").unwrap();
    let prefix = format!(".step-1.{name}");
    let left = |swept: ashore::storage::Swept| (swept.removed.len(), swept.left[0].state);
    assert_eq!(left(other.sweep(Sweep::default()).unwrap()), (0, State::Undecided));
    age(directory.path(), &prefix, 25 * HOUR);
    storage.touch().unwrap();
    assert_eq!(left(other.sweep(Sweep::default()).unwrap()), (0, State::Undecided));
    age(directory.path(), &prefix, 25 * HOUR);
    assert_eq!(other.sweep(Sweep::default()).unwrap().removed.len(), 1);
    // The owner was alive after all: an attempt that is being deleted must not become a step.
    assert_eq!(attempt.publish(false).unwrap_err().kind(), ErrorKind::Indeterminate);
    assert_eq!((storage.list().unwrap().len(), names(directory.path()).len()), (0, 0));
}

/// A host with a wrong clock deletes nothing because of it: if the file system does not give its time, no age
/// is known.
#[test]
fn without_the_clock_of_the_file_system_no_attempt_is_old() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    let dead = dead_attempt(&storage);
    rewrite(directory.path(), &dead, "boot_id", "another boot");
    age(directory.path(), &dead, 1000 * HOUR);
    faulty.fail(Fault { call: Some(Call::Touch), after: 0, sticky: true, effect: Effect::Refused(libc::EROFS) });
    let swept = storage.sweep(Sweep::default().older_than(Duration::ZERO)).unwrap();
    assert_eq!((swept.removed.len(), swept.left[0].state, swept.left[0].age), (0, State::Undecided, None));
    faulty.heal();
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 1);
}

/// ext4 can leave a record of zeros after a power failure; no sweep removed such records.
#[test]
fn unreadable_records_are_deleted_when_their_attempt_is_gone_or_old() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let zeros = "\0".repeat(90);
    let unreadable = ["", "{", &*zeros, r#"{"host":"elsewhere"}"#, "[]"].map(|record| {
        let dead = dead_attempt(&storage);
        fs::write(directory.path().join(format!("{dead}.owner")), record).unwrap();
        dead
    });
    let sweep = |older_than| {
        let swept = storage.sweep(Sweep::default().older_than(older_than)).unwrap();
        (swept.removed.len(), swept.left.len())
    };
    assert_eq!(sweep(Duration::ZERO), (0, 5), "any of them may just be being written");
    unreadable.iter().for_each(|dead| age(directory.path(), dead, 2 * HOUR));
    assert_eq!(sweep(24 * HOUR), (0, 5));
    unreadable[3..].iter().for_each(|dead| fs::remove_dir_all(directory.path().join(format!("{dead}.tmp"))).unwrap());
    assert_eq!(sweep(24 * HOUR), (2, 3));
    assert_eq!(sweep(HOUR), (3, 0));
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn attempts_without_a_record_go_when_they_are_old_and_foreign_files_stay() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let orphan = format!(".step-1.{}", Attempt::new());
    for name in [&*format!("{orphan}.tmp"), ".git", "runs", ".step-1.notes.tmp"] {
        fs::create_dir(directory.path().join(name)).unwrap();
    }
    fs::write(directory.path().join(".env"), b"x").unwrap();
    let before = names(directory.path());
    let swept = storage.sweep(Sweep::default()).unwrap();
    assert_eq!(
        (swept.removed.len(), swept.left[0].state, &*swept.left[0].why),
        (0, State::Undecided, "has no owner record")
    );
    assert_eq!(names(directory.path()), before);
    age(directory.path(), &orphan, 25 * HOUR);
    assert_eq!(named(&storage.sweep(Sweep::default()).unwrap().removed), [format!("{orphan}.tmp")]);
    assert_eq!(names(directory.path()).len(), before.len() - 1);
}

/// A sweep fsynced the root once for each of thousands of dead attempts.
#[test]
fn many_dead_attempts_share_the_fsyncs_of_their_removal() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    (0..150).for_each(|_| drop(dead_attempt(&storage)));
    let before = faulty.log().len();
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 150);
    let fsyncs = faulty.log()[before..].iter().filter(|logged| logged.call == Call::Fsync).count();
    assert_eq!((fsyncs, names(directory.path()).len()), (6, 0));
}

#[test]
fn trash_is_emptied_and_unexpected_files_in_it_stay() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    for name in [".trash-1", ".trash-2/deep"] {
        fs::create_dir_all(directory.path().join(name)).unwrap();
    }
    fs::write(directory.path().join(".trash-1/shard"), b"old").unwrap();
    fs::write(directory.path().join(".trash-2/deep/file"), b"whose?").unwrap();
    let swept = storage.sweep(Sweep::default()).unwrap();
    assert_eq!((named(&swept.removed), named(&swept.left)), (vec![".trash-1"], vec![".trash-2"]));
    assert_eq!(swept.left[0].state, State::Stuck);
    assert!(directory.path().join(".trash-2/deep/file").exists());
}

#[test]
fn a_sweep_deletes_the_step_that_a_dead_owner_had_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    for bytes in ["old", "new"] {
        let attempt = storage.begin("step-1", Attempt::new(), true).unwrap();
        attempt.put("manifest.json", bytes.as_bytes()).unwrap();
        attempt.publish(true).unwrap();
    }
    assert_eq!(names(directory.path()).len(), 4);
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 2);
    assert_eq!(names(directory.path()), ["step-1"]);
    assert_eq!(fs::read(directory.path().join("step-1/manifest.json")).unwrap(), b"new");
}

/// A sweep took an attempt that it could not look at for a missing one: with an unreadable record it removed
/// it after a minute. And it took a lock that it could not try for a free one.
#[test]
fn an_attempt_that_cannot_be_read_or_locked_is_not_dead() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    let dead = dead_attempt(&storage);
    fs::write(directory.path().join(format!("{dead}.owner")), "").unwrap();
    age(directory.path(), &dead, 2 * HOUR);
    let refused =
        |call, after, sticky, errno| Fault { call: Some(call), after, sticky, effect: Effect::Refused(errno) };
    // A sweep looks at the record first, then at the attempt, then at its files.
    for (call, after, errno) in
        [(Call::Stat, 1, libc::EACCES), (Call::List, 1, libc::EIO), (Call::Stat, 2, libc::ESTALE)]
    {
        faulty.fail(refused(call, after, false, errno));
        let swept = storage.sweep(Sweep::default()).unwrap();
        faulty.heal();
        assert_eq!((swept.removed.len(), swept.left[0].state), (0, State::Stuck), "{call:?} {after}: {swept:?}");
    }
    for (errno, removed) in [(libc::ENOLCK, 0), (libc::EOPNOTSUPP, 1)] {
        faulty.fail(refused(Call::Lock, 0, true, errno));
        let swept = storage.sweep(Sweep::default().older_than(HOUR)).unwrap();
        faulty.heal();
        assert_eq!(swept.removed.len(), removed, "{swept:?}");
        assert!(swept.left.iter().all(|left| left.state == State::Undecided), "{swept:?}");
    }
    assert_eq!(names(directory.path()), [""; 0]);
}

/// A sweep could not read a record with a field unknown to this version: it judged the attempts of a newer
/// version by their age, whether their owners were alive or dead.
#[test]
fn a_record_of_a_later_version_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    let name = Attempt::new();
    let attempt = storage.begin("step-2", name, false).unwrap();
    rewrite(directory.path(), &format!(".step-2.{name}"), "later", "field");
    let dead = dead_attempt(&storage);
    rewrite(directory.path(), &dead, "later", "field");
    let swept = storage.sweep(Sweep::default()).unwrap();
    assert_eq!(named(&swept.removed), [format!("{dead}.tmp")]);
    let left = &swept.left[0];
    assert!(left.state == State::Live && left.why.contains("pid="), "{left:?}");
    attempt.abandon().unwrap();
}
