//! How an owner record is locked where locks fail.

use ashore::storage::local::{Linux, Local};
use ashore::storage::{State, Storage, Sweep};
use ashore::testing::simfs::SimFs;
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{Attempt, ErrorKind, Locks};
use std::sync::Arc;

/// Some parallel file systems answer flock(2) with 524 (ENOTSUPP), and every save failed there.
#[test]
fn without_locks_saves_work_and_sweeps_keep_attempts_of_live_owners() {
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP, 524] {
        let directory = tempfile::tempdir().unwrap();
        let faulty = Faulty::unsynced(Arc::new(Linux));
        let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
        faulty.fail(Fault { call: Some(Call::Lock), after: 0, sticky: true, effect: Effect::Refused(errno) });
        let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
        attempt.put("manifest.json", b"{}").unwrap();
        // With locks and without: another mount of the same file system may have locks.
        for other in [&storage, &Local::open(directory.path()).unwrap()] {
            let swept = other.sweep(Sweep::default()).unwrap();
            assert_eq!((swept.removed.len(), swept.left[0].state), (0, State::Undecided), "errno={errno} {swept:?}");
        }
        attempt.publish(false).unwrap();
        attempt.settle().unwrap();
        assert_eq!(storage.list().unwrap(), ["step-1"]);
    }
}

/// A lock that fails for another reason fails the save, because other processes may be able to lock; the
/// error names the setting.
#[test]
fn a_lock_that_fails_says_which_setting_does_without() {
    for errno in [libc::ENOLCK, libc::EIO] {
        let directory = tempfile::tempdir().unwrap();
        let faulty = Faulty::unsynced(Arc::new(Linux));
        faulty.fail(Fault { call: Some(Call::Lock), after: 0, sticky: true, effect: Effect::Refused(errno) });
        let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
        let error = storage.begin("step-1", Attempt::new(), false).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable);
        assert!(error.to_string().contains("set locks=none"), "{error}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
        let storage = storage.locks(Locks::None);
        storage.begin("step-1", Attempt::new(), false).unwrap().abandon().unwrap();
    }
}

/// A sweep opened the record only to read, and NFS, like the simulated file system, gives an exclusive lock
/// only to a writable descriptor: no dead attempt was ever swept there.
#[test]
fn a_sweep_locks_where_a_lock_needs_a_descriptor_that_writes() {
    let fs = SimFs::new();
    let storage = Local::with_sys(Arc::new(fs), "/data/run").unwrap();
    drop(storage.begin("step-1", Attempt::new(), false).unwrap());
    let swept = storage.sweep(Sweep::default()).unwrap();
    assert_eq!((swept.removed.len(), swept.left.len()), (1, 0), "{swept:?}");
}
