//! Real file systems that are full or read-only, and files that steps share on them: ext4, xfs and btrfs in
//! images, mounted for the test. Run by `just mounts`, as root, in a mount namespace of its own, so that
//! nothing stays mounted however it ends.

mod adopting;
mod fuse;
mod image;
mod lying;
mod misread;

use ashore::{
    Catalog, CheckpointExecutor, Committed, Error, ErrorKind, IoMode, PruneOptions, Result, Retention, StateDict,
    id::parse_step_name,
};
use image::Mounted;
use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;
use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(120);
/// Several chunks, and a tail that is no whole block.
const LEN: usize = (2 << 20) + 3;
const KIB: u64 = 1 << 10;

fn executor(root: &Path) -> Result<CheckpointExecutor> {
    CheckpointExecutor::builder(root).arena(1 << 20).chunk(256 << 10).build()
}

fn bytes(step: u64) -> Vec<u8> {
    (0..LEN as u64).map(|i| (i * 31 + step * 7 + (i >> 12)) as u8).collect()
}

fn save(executor: &CheckpointExecutor, step: u64) -> Result<Committed> {
    let mut state = StateDict::new();
    state.tensor("t", Arc::new(bytes(step)))?;
    let save = executor.save(step, state)?;
    Ok(save.wait(LONG)?.committed().expect("saves are neither skipped nor superseded"))
}

/// Checks that all steps are there, and whole.
fn steps_are(root: &Path, expected: &[u64]) {
    let (entries, problems) = Catalog::open(root).unwrap().survey().unwrap();
    assert!(problems.is_empty(), "{problems:?}");
    assert_eq!(entries.iter().map(|entry| entry.step).collect::<Vec<_>>(), expected);
    for entry in entries {
        let checkpoint = ashore::Checkpoint::open(&entry.path).unwrap();
        assert!(checkpoint.verify().unwrap().is_sound());
        assert!(checkpoint.read("t").unwrap() == bytes(entry.step), "step {} has other bytes", entry.step);
    }
}

/// The entries that are neither a step nor the hint nor the run log.
fn lies_about(root: &Path) -> Vec<String> {
    let names = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| parse_step_name(name).is_none() && name != "latest" && name != ".runs").collect()
}

fn full(error: &Error, step: u64) {
    assert_eq!((error.kind(), error.step()), (ErrorKind::NoSpace, Some(step)), "{error:?}");
}

/// Fills the file system until so many bytes are left, as far as it can tell and allocate.
fn leave(at: &Path, free: u64) {
    let ballast = File::options().create(true).truncate(true).write(true).open(at).unwrap();
    let too_much = || {
        let stat = statvfs(at).unwrap();
        (stat.f_bavail * stat.f_frsize).saturating_sub(free)
    };
    // The last blocks go in pieces: their metadata takes space, too.
    let (mut length, mut piece) = (0, too_much());
    while piece >= 4 * KIB {
        match fallocate(&ballast, FallocateFlags::empty(), length, piece) {
            Ok(()) => length += piece,
            Err(error) => {
                assert_eq!(error, Errno::NOSPC);
                piece /= 2;
            }
        }
        piece = piece.min(too_much()) / 4096 * 4096;
    }
}

fn saves_until_it_is_full(mounted: &Mounted, mode: IoMode) {
    let root = mounted.path().join("filled");
    let executor = executor(&root).unwrap();
    leave(&mounted.path().join("ballast"), 5 * LEN as u64);
    let mut done = Vec::new();
    let error = loop {
        let step = done.len() as u64 + 1;
        match save(&executor, step) {
            Ok(committed) => assert_eq!(committed.mode, mode),
            Err(error) => break error,
        }
        done.push(step);
        assert!(done.len() < 20, "never full");
    };
    assert!(done.len() >= 3, "{done:?} {error:?}");
    let next = done.len() as u64 + 1;
    full(&error, next);
    steps_are(&root, &done);
    assert!(lies_about(&root).is_empty(), "{:?}", lies_about(&root));

    // Without any space left, deleting must work.
    leave(&mounted.path().join("more"), 0);
    full(&save(&executor, next).unwrap_err(), next);
    steps_are(&root, &done);
    assert!(lies_about(&root).is_empty(), "{:?}", lies_about(&root));
    let pruned = executor.catalog().prune(&Retention::last(1), PruneOptions::new()).unwrap();
    assert_eq!(pruned.removed.len(), done.len() - 1);
    save(&executor, next).unwrap();
    steps_are(&root, &[next - 1, next]);
    executor.shutdown(LONG).unwrap();
    drop(executor);
    for ballast in ["ballast", "more"] {
        fs::remove_file(mounted.path().join(ballast)).unwrap();
    }
    fs::remove_dir_all(&root).unwrap();
}

/// The space ends at different files: the owner record, the attempt's directory, the shard, the manifest.
fn saves_with_little_room(mounted: &Mounted) {
    let root = mounted.path().join("tight");
    let first = executor(&root).unwrap();
    save(&first, 1).unwrap();
    first.shutdown(LONG).unwrap();
    drop(first);
    let ballast = mounted.path().join("ballast");
    let whole = (LEN as u64).next_multiple_of(4 * KIB);
    let rooms = [0, 4, 8, 12, 16, 32, 64, 256].map(|kib| kib * KIB).into_iter();
    let rooms = rooms.chain((0..12).map(|blocks| whole + blocks * 4 * KIB)).chain([whole + 256 * KIB, 2 * whole]);
    let (mut saved, mut refused) = (0, 0);
    for room in rooms {
        leave(&ballast, room);
        let executor = executor(&root).unwrap();
        match save(&executor, 2) {
            Ok(_) => {
                saved += 1;
                steps_are(&root, &[1, 2]);
                fs::remove_file(&ballast).unwrap();
                executor.catalog().prune(&Retention::last(1), PruneOptions::new()).unwrap();
                steps_are(&root, &[2]);
                save(&executor, 1).unwrap();
                fs::remove_dir_all(root.join("step-00000002")).unwrap();
            }
            Err(error) => {
                refused += 1;
                full(&error, 2);
                steps_are(&root, &[1]);
                fs::remove_file(&ballast).unwrap();
            }
        }
        executor.shutdown(LONG).unwrap();
        drop(executor);
        assert!(lies_about(&root).is_empty(), "room={room} {:?}", lies_about(&root));
    }
    println!("{}: {saved} saved, {refused} refused", mounted.kind());
    assert!(saved > 0 && refused > 3, "{saved} {refused}");
    let executor = executor(&root).unwrap();
    save(&executor, 3).unwrap();
    steps_are(&root, &[1, 3]);
}

fn is_read_only_for_a_while(mounted: &Mounted) {
    let root = mounted.path().join("frozen");
    let writing = executor(&root).unwrap();
    save(&writing, 1).unwrap();
    writing.shutdown(LONG).unwrap();
    drop(writing);
    let executor_before = executor(&root).unwrap();

    mounted.remount("ro");
    let refused = save(&executor_before, 2).unwrap_err();
    assert_eq!((refused.kind(), refused.step()), (ErrorKind::Unavailable, Some(2)), "{refused:?}");
    assert!(refused.path().is_some_and(|path| path.starts_with(&root)), "{refused:?}");
    let elsewhere = executor(&mounted.path().join("new")).unwrap_err();
    assert_eq!(elsewhere.kind(), ErrorKind::Unavailable, "{elsewhere:?}");
    let reading = executor(&root).unwrap();
    assert_eq!(reading.latest().unwrap().unwrap().step(), 1);
    steps_are(&root, &[1]);
    reading.shutdown(LONG).unwrap();
    drop(reading);

    mounted.remount("rw");
    save(&executor_before, 2).unwrap();
    steps_are(&root, &[1, 2]);
    assert!(!mounted.path().join("new").exists());
    executor_before.shutdown(LONG).unwrap();
    drop(executor_before);
    assert!(lies_about(&root).is_empty(), "{:?}", lies_about(&root));
}

fn behaves(mounted: &Mounted, mode: IoMode) {
    saves_until_it_is_full(mounted, mode);
    saves_with_little_room(mounted);
    is_read_only_for_a_while(mounted);
}

#[test]
fn ext4_is_written_past_the_page_cache_until_it_is_full() {
    behaves(&Mounted::new("ext4", 64, &["-q", "-F", "-m", "0"]), IoMode::Direct);
}

#[test]
fn xfs_is_written_past_the_page_cache_until_it_is_full() {
    behaves(&Mounted::new("xfs", 300, &["-q"]), IoMode::Direct);
}

/// btrfs accepts O_DIRECT, but copies into the page cache for its checksums.
#[test]
fn btrfs() {
    behaves(&Mounted::new("btrfs", 256, &["-q"]), IoMode::Buffered);
}
