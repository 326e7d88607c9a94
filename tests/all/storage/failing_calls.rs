//! Every system call of a save fails in turn, once and from then on, before and after it did its work.
//! Whatever happens: no call says `Ok` for what is not so, each step reads as one whole attempt, and nothing
//! leaks.

use crate::fixtures::executor::hidden;
use ashore::storage::local::{Linux, Local};
use ashore::storage::{Reading, Storage, Sweep};
use ashore::testing::{AlignedBuffer, Effect, Fault, Faulty};
use ashore::{Attempt, Error, ErrorKind};
use std::sync::Arc;

const STEP: &str = "step-00000002";
const OTHER: &str = "step-00000001";
const LEN: usize = 9000;

fn write(storage: &dyn Storage, step: &str, overwrite: bool, fill: u8) -> Result<(), Error> {
    let attempt = storage.begin(step, Attempt::new(), overwrite)?;
    let written = (|| {
        let shard = attempt.create("shard", LEN as u64)?;
        shard.write_at(0, &AlignedBuffer::from(&[fill; 4096][..]))?;
        shard.write_at(4096, &AlignedBuffer::from(&[fill; 8192][..]))?;
        shard.seal()?;
        attempt.put("manifest.json", &[fill; 77])?;
        attempt.publish(overwrite)
    })();
    if let Err(error) = written {
        // The executor does this too; its result does not matter here.
        let _ = attempt.abandon();
        return Err(error);
    }
    // A sweep deletes the replaced step if it cannot be deleted now.
    let _ = attempt.settle();
    Ok(())
}

fn is_whole(step: &dyn Reading, fill: u8) -> bool {
    [("shard", LEN), ("manifest.json", 77)].into_iter().all(|(name, len)| {
        let Ok(file) = step.open(name) else { return false };
        let mut bytes = vec![0; len];
        file.len() == len as u64 && file.read_at(0, &mut bytes).is_ok() && bytes.iter().all(|&byte| byte == fill)
    })
}

/// A root in memory if possible: direct I/O needs a disk, and the rest is thousands of saves.
fn place(direct: bool) -> tempfile::TempDir {
    let in_memory = if direct { None } else { tempfile::tempdir_in("/dev/shm").ok() };
    in_memory.unwrap_or_else(|| tempfile::tempdir().unwrap())
}

/// Saves with one fault; false when the save was over before it.
fn save_with(fault: Fault, overwrite: bool, direct: bool) -> bool {
    let directory = place(direct);
    let clean = Local::with_sys(Faulty::unsynced(Arc::new(Linux)), directory.path()).unwrap();
    write(&clean, OTHER, false, 1).unwrap();
    if overwrite {
        write(&clean, STEP, false, 2).unwrap();
    }
    let faulty = Faulty::unsynced(Arc::new(Linux));
    faulty.fail(fault);
    let saved = Local::with_sys(faulty.clone(), directory.path())
        .and_then(|storage| write(&storage.direct(direct), STEP, overwrite, 3));

    let what = format!("{fault:?} overwrite={overwrite} direct={direct} saved={saved:?}");
    assert!(faulty.open_descriptors().is_empty(), "leaked {:?}: {what}", faulty.open_descriptors());
    check(&clean, overwrite, &saved, &what);
    // A sweep without faults changes no step and leaves nothing behind.
    let swept = clean.sweep(Sweep::default()).unwrap();
    check(&clean, overwrite, &saved, &what);
    assert!(hidden(directory.path()).is_empty(), "{what} {swept:?} {:?}", hidden(directory.path()));
    faulty.hits() > 0
}

fn check(clean: &Local, overwrite: bool, saved: &Result<(), Error>, what: &str) {
    assert!(is_whole(&*clean.open(OTHER).unwrap(), 1), "another step: {what}");
    let now = clean.open(STEP);
    let new = now.as_ref().is_ok_and(|step| is_whole(&**step, 3));
    let old = match &now {
        Ok(step) => overwrite && is_whole(&**step, 2),
        Err(error) => !overwrite && error.kind() == ErrorKind::NotFound,
    };
    match saved {
        Ok(()) => assert!(new, "not complete: {what}"),
        Err(error) if error.kind() == ErrorKind::Indeterminate => assert!(old || new, "torn: {what}"),
        Err(_) => assert!(old, "not intact: {what}"),
    }
}

#[test]
fn every_failing_call_leaves_steps_whole() {
    let effects = [libc::EIO, libc::ENOSPC, libc::EINVAL, libc::EINTR]
        .into_iter()
        .flat_map(|code| [Effect::Refused(code), Effect::DoneAndRefused(code)])
        .chain([Effect::Short(512), Effect::Short(1)]);
    let mut cases = 0;
    for effect in effects {
        for sticky in [false, true] {
            // No file system interrupts or shortens transfers for ever.
            if sticky && matches!(effect, Effect::Refused(libc::EINTR) | Effect::DoneAndRefused(libc::EINTR)) {
                continue;
            }
            for (overwrite, direct) in [(false, false), (true, false), (true, true)] {
                // Direct I/O waits for the disk: only for effects that make it take another way.
                if direct && !matches!(effect, Effect::Refused(libc::EINVAL) | Effect::Short(512)) {
                    continue;
                }
                let mut after = 0;
                while save_with(Fault { call: None, after, sticky, effect }, overwrite, direct) {
                    after += 1;
                }
                assert!(after > 25, "only {after} calls");
                cases += after;
            }
        }
    }
    println!("cases={cases}");
}
