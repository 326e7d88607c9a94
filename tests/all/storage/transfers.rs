//! Short transfers, interruptions and a medium that refuses direct I/O late cost speed, never bytes.

use ashore::Attempt;
use ashore::storage::local::{Linux, Local};
use ashore::storage::{FileWriting, IoMode, Reading, Storage, Writing};
use ashore::testing::{AlignedBuffer, Call, Effect, Fault, Faulty};
use std::sync::Arc;

const LEN: usize = 300_000;

fn bytes() -> Vec<u8> {
    (0..LEN).map(|place| (place % 251) as u8).collect()
}

fn fixture() -> (tempfile::TempDir, Arc<Faulty>, Local) {
    let directory = tempfile::tempdir().unwrap();
    let faulty = Faulty::new(Arc::new(Linux));
    let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
    (directory, faulty, storage)
}

/// Writes a shard, with `fault` on its first transfer; returns the mode before and after.
fn write(storage: &Local, faulty: &Faulty, fault: Option<Fault>) -> (IoMode, IoMode) {
    let attempt: Arc<dyn Writing> = storage.begin("step-1", Attempt::new(), false).unwrap();
    let shard: Arc<dyn FileWriting> = attempt.create("shard", LEN as u64).unwrap();
    let before = shard.mode();
    fault.into_iter().for_each(|fault| faulty.fail(fault));
    shard.write_at(0, &AlignedBuffer::from(&bytes()[..])).unwrap();
    faulty.heal();
    shard.seal().unwrap();
    attempt.publish(false).unwrap();
    (before, shard.mode())
}

fn read(storage: &Local, faulty: &Faulty, fault: Option<Fault>) -> Vec<u8> {
    let step: Arc<dyn Reading> = storage.open("step-1").unwrap();
    let file = step.open("shard").unwrap();
    fault.into_iter().for_each(|fault| faulty.fail(fault));
    let mut buffer = AlignedBuffer::new(LEN);
    file.read_at(0, &mut buffer).unwrap();
    faulty.heal();
    buffer.to_vec()
}

fn faults(call: Call) -> impl Iterator<Item = Fault> {
    let effects = [(Effect::Short(4096), true), (Effect::Short(100), false), (Effect::Short(100), true)];
    let refusals = [libc::EINTR, libc::EINVAL].map(|code| (Effect::Refused(code), false));
    effects.into_iter().chain(refusals).map(move |(effect, sticky)| Fault {
        call: Some(call),
        after: 0,
        sticky,
        effect,
    })
}

#[test]
fn of_writes() {
    for fault in faults(Call::Pwrite) {
        let (_directory, faulty, storage) = fixture();
        write(&storage, &faulty, Some(fault));
        assert!(faulty.hits() > 0);
        assert!(read(&storage, &faulty, None) == bytes(), "{fault:?}");
    }
}

#[test]
fn of_reads() {
    for fault in faults(Call::Pread) {
        let (_directory, faulty, storage) = fixture();
        write(&storage, &faulty, None);
        assert!(read(&storage, &faulty, Some(fault)) == bytes(), "{fault:?}");
        assert!(faulty.hits() > 0);
    }
}

#[test]
fn a_medium_that_refuses_direct_io_is_written_through_the_page_cache_and_says_so() {
    for call in [Call::Open, Call::Pwrite] {
        let (_directory, faulty, storage) = fixture();
        let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
        if call == Call::Open {
            faulty.fail(Fault {
                call: Some(call),
                after: 0,
                sticky: false,
                effect: Effect::DoneAndRefused(libc::EINVAL),
            });
        }
        let shard = attempt.create("shard", LEN as u64).unwrap();
        let asked = shard.mode();
        if call == Call::Pwrite {
            faulty.fail(Fault { call: Some(call), after: 0, sticky: false, effect: Effect::Refused(libc::EINVAL) });
        }
        shard.write_at(0, &AlignedBuffer::from(&bytes()[..])).unwrap();
        assert_eq!(shard.mode(), IoMode::Buffered);
        assert_eq!(faulty.hits(), 1);
        shard.seal().unwrap();
        attempt.publish(false).unwrap();
        assert!(read(&storage, &faulty, None) == bytes(), "{call:?} {asked:?}");
    }
}

#[test]
fn a_medium_without_preallocation_still_gives_the_right_length() {
    for code in [libc::EOPNOTSUPP, libc::ENOSYS, libc::EINVAL] {
        let (directory, faulty, storage) = fixture();
        faulty.fail(Fault { call: Some(Call::Fallocate), after: 0, sticky: true, effect: Effect::Refused(code) });
        write(&storage, &faulty, None);
        assert_eq!(std::fs::metadata(directory.path().join("step-1/shard")).unwrap().len(), LEN as u64);
        assert!(read(&storage, &faulty, None) == bytes());
    }
}

#[test]
fn a_file_that_was_not_written_to_its_end_is_not_sealed() {
    let (_directory, faulty, storage) = fixture();
    // Where space is not reserved beforehand, a missing end shows in the length.
    faulty.fail(Fault {
        call: Some(Call::Fallocate),
        after: 0,
        sticky: true,
        effect: Effect::Refused(libc::EOPNOTSUPP),
    });
    let attempt = storage.begin("step-1", Attempt::new(), false).unwrap();
    let shard = attempt.create("shard", 8192).unwrap();
    shard.write_at(0, &AlignedBuffer::new(4096)).unwrap();
    assert!(shard.seal().is_err());
    assert!(attempt.publish(false).is_err());
}
