//! A file system that fails, stalls or lies: the real calls of the kernel end in errors that no disk here
//! gives.

use super::fuse::{Fault, Faulty, Rule};
use super::{bytes, lies_about, save, steps_are};
use ashore::{Catalog, CheckpointExecutor, ErrorKind, StateDict};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// An executor whose saves fail after three seconds.
fn executor(root: &Path) -> ashore::Result<CheckpointExecutor> {
    let builder = CheckpointExecutor::builder(root).arena(1 << 20).chunk(256 << 10);
    builder.save_timeout(Duration::from_secs(3)).shutdown_timeout(Duration::from_secs(3)).build()
}

/// Every call that a save makes of a file system, with errors that real ones give.
const ERRORS: &[(&str, &[i32])] = &[
    ("write", &[libc::EIO, libc::ENOSPC, libc::EDQUOT]),
    ("fsync", &[libc::EIO, libc::ENOSPC]),
    ("fsyncdir", &[libc::EIO]),
    ("rename", &[libc::EIO, libc::ENOSPC, libc::ESTALE, libc::EROFS]),
    ("create", &[libc::EIO, libc::ENOSPC, libc::EDQUOT, libc::EROFS]),
    ("mkdir", &[libc::EDQUOT, libc::EROFS]),
    ("setattr", &[libc::EIO]),
    ("fallocate", &[libc::ENOSPC, libc::EDQUOT]),
    ("unlink", &[libc::EIO, libc::EROFS]),
    ("rmdir", &[libc::EIO]),
    ("open", &[libc::EIO, libc::ENFILE]),
    ("lookup", &[libc::ESTALE, libc::EIO]),
    ("readdir", &[libc::EIO]),
];

#[test]
fn any_call_that_fails_once_or_from_then_on_ends_a_save_whole_or_not_at_all() {
    let (mut saves, mut failed) = (0, 0);
    for &(call, errors) in ERRORS {
        for &error in errors {
            for once in [true, false] {
                for first in 1.. {
                    let disk = Faulty::mount();
                    let root = disk.path().join("run");
                    let executor_of = executor(&root).unwrap();
                    save(&executor_of, 1).unwrap();
                    executor_of.shutdown(Duration::from_secs(10)).unwrap();
                    disk.fault(Some(Rule { call, first, once, fault: Fault::Fails(error) }));
                    let saved = executor(&root).and_then(|executor| {
                        let saved = save(&executor, 2);
                        // What tidying could not do is the next executor's.
                        _ = executor.shutdown(Duration::from_secs(10));
                        saved
                    });
                    let struck = disk.struck();
                    disk.fault(None);
                    saves += 1;
                    let executor = executor(&root).unwrap();
                    let listed: Vec<u64> =
                        Catalog::open(&root).unwrap().list().unwrap().iter().map(|e| e.step).collect();
                    match &saved {
                        Ok(_) => assert_eq!(listed, [1, 2], "{call} {first} {error}"),
                        Err(told) if told.kind() == ErrorKind::Indeterminate => assert!(listed.contains(&1)),
                        Err(told) => {
                            failed += 1;
                            assert_eq!(listed, [1], "{call} {first} {error} {told:?}");
                        }
                    }
                    save(&executor, 3).unwrap();
                    executor.shutdown(Duration::from_secs(10)).unwrap();
                    let expected: Vec<u64> = listed.into_iter().chain([3]).collect();
                    steps_are(&root, &expected);
                    assert!(lies_about(&root).is_empty(), "{call} {first} {error} {:?}", lies_about(&root));
                    if struck == 0 {
                        break;
                    }
                }
            }
        }
    }
    println!("{saves} saves with one kind of call failing, {failed} of them failed");
    assert!(failed > 100, "hardly any call failed a save: {failed}");
}

#[test]
fn a_disk_that_stalls_fails_the_save_at_its_deadline_and_delays_no_fence() {
    for call in ["write", "fsync", "create", "rename"] {
        let disk = Faulty::mount();
        let root = disk.path().join("run");
        let before = executor(&root).unwrap();
        save(&before, 1).unwrap();
        before.shutdown(Duration::from_secs(10)).unwrap();
        let executor = executor(&root).unwrap();
        disk.fault(Some(Rule { call, first: 1, once: true, fault: Fault::Stalls(Duration::from_secs(6)) }));
        let began = Instant::now();
        let mut state = StateDict::new();
        state.tensor("t", Arc::new(vec![1_u8; 256 << 10])).unwrap();
        let stalled = executor.save(2, state).unwrap();
        executor.fence().unwrap();
        let fenced = began.elapsed();
        let error = stalled.wait(Duration::from_secs(20)).unwrap_err();
        let ended = began.elapsed();
        assert!(matches!(error.kind(), ErrorKind::Deadline | ErrorKind::Indeterminate), "{call}: {error:?}");
        assert!(fenced < Duration::from_secs(2), "{call}: the fence waited {fenced:?}");
        assert!(ended < Duration::from_secs(5), "{call}: the save ended after {ended:?}");
        std::thread::sleep(Duration::from_secs(4));
        save(&executor, 3).unwrap();
    }
}

#[test]
fn a_disk_that_lies_about_an_fsync_loses_steps_and_never_shows_them_as_sound() {
    let disk = Faulty::mount();
    let root = disk.path().join("run");
    let executor = executor(&root).unwrap();
    save(&executor, 1).unwrap();
    disk.fault(Some(Rule { call: "fsync", first: 1, once: false, fault: Fault::Lies }));
    save(&executor, 2).unwrap();
    executor.shutdown(Duration::from_secs(10)).unwrap();
    disk.fault(None);
    disk.cut_power();
    let catalog = Catalog::open(&root).unwrap();
    let (entries, problems) = catalog.survey().unwrap();
    assert_eq!(entries.iter().map(|entry| entry.step).collect::<Vec<_>>(), [1]);
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(catalog.checkpoint(1).unwrap().read("t").unwrap() == bytes(1));
}

#[test]
fn the_order_of_a_listing_does_not_matter() {
    let disk = Faulty::mount();
    let root = disk.path().join("run");
    let builder = CheckpointExecutor::builder(&root).arena(1 << 20).chunk(256 << 10).keep_last(2);
    let executor = builder.build().unwrap();
    for step in [9, 10, 99, 100, 1000] {
        disk.reverse(step % 2 == 0);
        save(&executor, step).unwrap();
    }
    executor.shutdown(Duration::from_secs(10)).unwrap();
    for reverse in [false, true] {
        disk.reverse(reverse);
        steps_are(&root, &[100, 1000]);
        assert_eq!(Catalog::open(&root).unwrap().latest().unwrap().unwrap().step(), 1000);
    }
}
