//! A process that forks in the middle of a save, as data loaders do, loses nothing and endangers nothing.

use crate::fixtures::executor::{LONG, eventually, one, pattern};
use ashore::storage::local::Local;
use ashore::storage::{Storage, Sweep};
use ashore::testing::LateDevice;
use ashore::{Attempt, CheckpointExecutor, ErrorKind};
use std::sync::Arc;

#[test]
#[cfg_attr(miri, ignore = "forks")]
#[expect(unsafe_code, reason = "fork, and _exit in the child")]
fn the_child_can_do_nothing_and_the_parent_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let device = LateDevice::default();
    let builder = CheckpointExecutor::builder(root.path()).arena(4 * 4096).chunk(4096);
    let executor = builder.made_device(Arc::new(device.clone())).build().unwrap();
    let tensor = Arc::new(pattern(1, 50_000));
    device.hold();
    let save = executor.save(1, one("t", tensor.clone())).unwrap();
    eventually("copies are queued", || device.queued() > 0);
    device.allow(1);

    // SAFETY: the child calls what it is here to call, touches no lock of another thread's, and ends with
    // _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let invalid = |r: ashore::Result<()>| r.is_err_and(|e| e.kind() == ErrorKind::Invalid);
        let refused = [
            invalid(executor.save(2, ashore::StateDict::new()).map(drop)),
            invalid(executor.fence()),
            invalid(executor.latest().map(drop)),
            invalid(
                executor
                    .scope(ashore::Fence::host(), |s| s.save(3, ashore::StateDict::new()).map(drop))
                    .and_then(|r| r),
            ),
        ];
        drop(save);
        drop(executor);
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(if refused == [true; 4] { 0 } else { 1 }) };
    }
    device.release();
    executor.fence().unwrap();
    save.wait(LONG).unwrap();
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0, "the child was let in, or hung");
    assert_eq!(executor.latest().unwrap().unwrap().read("t").unwrap(), *tensor);
    executor.shutdown(LONG).unwrap();
}

/// A child closes the descriptors that hold locks, and their numbers then name whatever the child opens next.
/// A storage that the child had inherited touched those files, and began attempts beside those of its parent.
#[test]
#[cfg_attr(miri, ignore = "forks")]
#[expect(unsafe_code, reason = "fork, and _exit in the child")]
fn the_child_touches_no_file_of_its_own_through_the_storage_of_its_parent() {
    let root = tempfile::tempdir().unwrap();
    let storage = Local::open(root.path()).unwrap();
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    let own = root.path().join("own");
    std::fs::write(&own, b"x").unwrap();
    let old = std::time::UNIX_EPOCH + LONG;
    std::fs::File::options().write(true).open(&own).unwrap().set_modified(old).unwrap();

    // SAFETY: the child calls what it is here to call, touches no lock of another thread's, and ends with
    // _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let files: Vec<_> = (0..64).filter_map(|_| std::fs::File::options().write(true).open(&own).ok()).collect();
        let invalid = |r: ashore::Result<()>| r.is_err_and(|e| e.kind() == ErrorKind::Invalid);
        let refused = [
            invalid(storage.touch()),
            invalid(storage.begin("step-2", Attempt::new(), false).map(drop)),
            invalid(storage.sweep(Sweep::default()).map(drop)),
            invalid(storage.remove("step-1")),
            invalid(storage.hint("step-1")),
        ];
        let untouched = files.first().is_some_and(|file| file.metadata().unwrap().modified().unwrap() == old);
        // SAFETY: ends the child without running anything of the parent's.
        unsafe { libc::_exit(i32::from(refused != [true; 5]) + 2 * i32::from(!untouched)) };
    }
    let mut status = 0;
    // SAFETY: waits for our own child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(libc::WEXITSTATUS(status), 0, "status={status}: 1 was let in, 2 touched a file");
    storage.touch().unwrap();
    attempt.abandon().unwrap();
}
