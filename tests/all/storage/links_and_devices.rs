//! A root that other users can write to cannot lead the storage out of it, nor make it wait.

use crate::fixtures::process::alone;
use ashore::storage::local::Local;
use ashore::storage::{Storage, Sweep};
use ashore::{Attempt, CheckpointExecutor, ErrorKind, StateDict};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Arc;
use std::time::Duration;

#[test]
fn links_and_pipes_in_a_step_are_corrupt() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("secret"), b"secret").unwrap();
    let step = directory.path().join("root/step-1");
    fs::create_dir_all(&step).unwrap();
    symlink("../../secret", step.join("link")).unwrap();
    fs::create_dir(step.join("directory")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        step.join("pipe"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let storage = Local::at(directory.path().join("root")).unwrap();
    for direct in [true, false] {
        let storage = Local::at(directory.path().join("root")).unwrap().direct(direct);
        let reading = storage.open("step-1").unwrap();
        for file in ["link", "pipe", "directory"] {
            let error = reading.open(file).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Corrupt, "{file} {error}");
            assert_eq!(error.path(), Some(&*step.join(file)));
        }
    }
    // The storage never deletes foreign directories in a step.
    assert_eq!(storage.remove("step-1").unwrap_err().kind(), ErrorKind::Invalid);
    assert!(step.join("directory").is_dir());
}

#[test]
fn a_link_in_the_place_of_a_step_is_neither_listed_nor_opened_nor_replaced() {
    let directory = tempfile::tempdir().unwrap();
    let outside = directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("file"), b"kept").unwrap();
    let storage = Local::open(directory.path().join("root")).unwrap();
    symlink(&outside, directory.path().join("root/step-1")).unwrap();
    fs::write(directory.path().join("root/step-2"), b"a file").unwrap();
    assert_eq!(storage.list().unwrap(), [""; 0]);
    for step in ["step-1", "step-2"] {
        assert_eq!(storage.open(step).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(storage.remove(step).unwrap_err().kind(), ErrorKind::Invalid);
        for overwrite in [false, true] {
            assert_eq!(storage.begin(step, Attempt::new(), overwrite).unwrap_err().kind(), ErrorKind::Conflict);
        }
    }
    assert_eq!(fs::read(outside.join("file")).unwrap(), b"kept");
}

#[test]
fn a_link_in_the_trash_is_removed_and_what_it_points_to_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("root");
    let storage = Local::open(&root).unwrap();
    fs::write(directory.path().join("precious"), b"kept").unwrap();
    fs::create_dir(root.join(".trash-1")).unwrap();
    symlink("../../precious", root.join(".trash-1/link")).unwrap();
    symlink("..", root.join(".trash-2")).unwrap();
    assert_eq!(storage.sweep(Sweep::default()).unwrap().removed.len(), 2);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
    assert_eq!(fs::read(directory.path().join("precious")).unwrap(), b"kept");
}

#[test]
fn modes_are_those_of_the_umask() {
    // The umask belongs to the whole process.
    if !alone("storage::links_and_devices::modes_are_those_of_the_umask") {
        return;
    }
    for (umask, file, folder) in [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)] {
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask));
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        let executor = CheckpointExecutor::builder(&root).arena(64 << 10).chunk(16 << 10).build().unwrap();
        let mut state = StateDict::new();
        state.tensor("t", Arc::new(vec![1_u8; 100])).unwrap();
        executor.save(1, state).unwrap().wait(Duration::from_secs(60)).unwrap();
        executor.shutdown(Duration::from_secs(60)).unwrap();
        let mut looked_at = 0;
        let mut folders = vec![root];
        while let Some(at) = folders.pop() {
            assert_eq!(fs::metadata(&at).unwrap().permissions().mode() & 0o7777, folder, "{at:?}");
            for entry in fs::read_dir(at).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                    continue;
                }
                looked_at += 1;
                assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o7777, file, "{:?}", entry.path());
            }
        }
        assert!(looked_at >= 3, "a shard, a table and a manifest were there: {looked_at}");
    }
}
