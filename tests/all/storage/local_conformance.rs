//! The local storage does what every storage must, with direct and with buffered I/O, on disk and in memory.

use ashore::storage::local::{Linux, Local};
use ashore::storage::{IoMode, Storage};
use ashore::testing::{Call, Effect, Fault, Faulty, conformance};
use ashore::{Attempt, Engine, ErrorKind};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

fn conforms(directory: &Path, direct: bool) {
    conforms_with(directory, direct, Engine::Pwrite);
}

fn conforms_with(directory: &Path, direct: bool, engine: Engine) {
    let mut roots = 0;
    conformance::run(|| {
        roots += 1;
        Arc::new(Local::open_with(directory.join(roots.to_string()), engine).unwrap().direct(direct))
    });
}

#[test]
fn with_direct_io() {
    conforms(tempfile::tempdir().unwrap().path(), true);
}

#[test]
fn with_io_uring() {
    let directory = tempfile::tempdir().unwrap();
    if Local::open_with(directory.path(), Engine::Uring).unwrap().engine() != "io_uring" {
        writeln!(std::io::stderr(), "left out: io_uring, which this kernel does not give us").unwrap();
        return;
    }
    for direct in [true, false] {
        conforms_with(&directory.path().join(direct.to_string()), direct, Engine::Uring);
    }
}

#[test]
fn with_buffered_io() {
    conforms(tempfile::tempdir().unwrap().path(), false);
}

#[test]
fn a_file_system_that_accepts_direct_io_and_does_not_honour_it_conforms() {
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        writeln!(std::io::stderr(), "left out: direct I/O that is not honoured, for want of a writable /dev/shm")
            .unwrap();
        return;
    };
    conforms(directory.path(), true);
    let attempt = Local::open(directory.path()).unwrap().begin("step-1", Attempt::new(), false).unwrap();
    assert_eq!(attempt.create("shard", 4096).unwrap().mode(), IoMode::Buffered);
}

#[test]
fn a_root_is_made_with_all_that_leads_to_it_and_readers_make_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("a/b/c");
    let error = Local::at(&root).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound);
    assert_eq!(error.path(), Some(&*root));
    assert!(!directory.path().join("a").exists());
    Local::open(&root).unwrap();
    assert!(root.is_dir());
    Local::at(&root).unwrap();
}

/// Two executors that write the hint at once exchanged each other's file, and each warned several times a
/// minute.
#[test]
fn a_hint_that_another_process_writes_at_once_is_no_error() {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    for (call, errno) in [(Call::Open, libc::EEXIST), (Call::Rename, libc::ENOENT)] {
        faulty.fail(Fault { call: Some(call), after: 0, sticky: false, effect: Effect::Refused(errno) });
        storage.hint("step-1").unwrap();
    }
    assert_eq!(faulty.hits(), 2);
    storage.hint("step-2").unwrap();
    assert_eq!(fs::read_to_string(directory.path().join("latest")).unwrap(), "step-2\n");
}

#[test]
fn a_step_holds_the_checkpoint_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let storage = Local::open(directory.path()).unwrap();
    for overwrite in [false, true] {
        let attempt = storage.begin("step-1", Attempt::new(), overwrite).unwrap();
        attempt.put("manifest.json", b"{}").unwrap();
        attempt.publish(overwrite).unwrap();
        attempt.settle().unwrap();
    }
    storage.hint("step-1").unwrap();
    let names = |path: &Path| {
        let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(directory.path()), ["latest", "step-1"]);
    assert_eq!(names(&directory.path().join("step-1")), ["manifest.json"]);
    assert_eq!(fs::read_to_string(directory.path().join("latest")).unwrap(), "step-1\n");
}

/// A removal compared the attempt and then renamed by name: it deleted a step that another process had
/// published in between.
#[test]
fn a_step_that_takes_the_name_just_before_the_rename_of_a_removal_stays() {
    let directory = tempfile::tempdir().unwrap();
    let write = |storage: &Local, bytes: &str| {
        let attempt = storage.begin("step-1", Attempt::new(), true).unwrap();
        attempt.put("manifest.json", bytes.as_bytes()).unwrap();
        attempt.publish(true).unwrap();
        attempt.settle().unwrap();
    };
    let sys = Faulty::new(Arc::new(Linux));
    let (mine, theirs) =
        (Local::with_sys(sys.clone(), directory.path()).unwrap(), Local::open(directory.path()).unwrap());
    write(&theirs, "old");
    let opened = mine.open("step-1").unwrap();
    sys.interrupt(Call::Rename, move || write(&theirs, "new"));
    assert_eq!(mine.remove_opened("step-1", &*opened).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(fs::read(directory.path().join("step-1/manifest.json")).unwrap(), b"new");
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
    mine.remove_opened("step-1", &*mine.open("step-1").unwrap()).unwrap();
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}
