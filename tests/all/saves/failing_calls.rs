//! Every system call of a save, and of the tidying after it, fails in turn under a whole executor: once and
//! from then on, before and after it did its work. The future is never `Ok` for a step that is not there,
//! nothing hangs, older steps stay unchanged, slabs are returned, and the next save works when the fault is
//! gone.

use crate::fixtures::executor::{LONG, eventually, hidden, one, pattern};
use ashore::id::step_name;
use ashore::storage::local::{Linux, Local};
use ashore::storage::{Storage, Sweep};
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{Checkpoint, CheckpointExecutor, Committed, ErrorKind, Result, SaveOptions};
use std::path::Path;
use std::sync::Arc;

const LEN: usize = 9000;

/// What is saved over steps 1 and 2.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Case {
    New,
    Overwriting,
    /// New, with a retention that then deletes step 1.
    Pruning,
}

impl Case {
    fn step(self) -> u64 {
        if self == Case::Overwriting { 2 } else { 3 }
    }
}

/// When the fault ends, which decides the calls that it can meet.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Until {
    /// The same executor continues, as soon as the save has ended.
    Save,
    /// Another executor continues.
    Shutdown,
}

fn executor(sys: &Arc<Faulty>, root: &Path, case: Case) -> CheckpointExecutor {
    let storage = Arc::new(Local::with_sys(sys.clone(), root).unwrap());
    let builder = CheckpointExecutor::builder("unused").storage(storage).arena(4 * 4096).chunk(4096).writers(2);
    if case == Case::Pruning { builder.keep_last(2) } else { builder }.build().unwrap()
}

fn save(executor: &CheckpointExecutor, step: u64, seed: u64, overwrite: bool) -> Result<Committed> {
    let options = if overwrite { SaveOptions::default().overwrite() } else { SaveOptions::default() };
    let save = executor.save_with(step, one("t", Arc::new(pattern(seed, LEN))), options)?;
    executor.fence().unwrap();
    Ok(save.wait(LONG)?.committed().unwrap())
}

/// The seed whose bytes a step has; None when it is absent. Anything else fails the test.
fn seed_of(storage: &Arc<dyn Storage>, step: u64, what: &str) -> Option<u64> {
    let checkpoint = match Checkpoint::from_storage(storage.clone(), &step_name(step)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return None,
        opened => opened.unwrap_or_else(|error| panic!("{error:?}: {what}")),
    };
    assert!(checkpoint.verify().unwrap().is_sound(), "{what}");
    let bytes = checkpoint.read("t").unwrap();
    Some((1..=4).find(|&seed| bytes == pattern(seed, LEN)).unwrap_or_else(|| panic!("torn: {what}")))
}

/// False when the run was over before the fault.
fn survives(fault: Fault, case: Case, until: Until) -> bool {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let sys = Faulty::unsynced(Arc::new(Linux));
    let first = executor(&sys, directory.path(), case);
    save(&first, 1, 1, false).unwrap();
    save(&first, 2, 2, false).unwrap();
    let hint = || std::fs::read_to_string(directory.path().join("latest")).unwrap_or_default();
    eventually("both are tidied up", || hint().trim_end() == step_name(2) && hidden(directory.path()).is_empty());

    let quiet = sys.log().len();
    sys.fail(fault);
    let saved = save(&first, case.step(), 3, case == Case::Overwriting);
    let what = format!("{fault:?} {case:?} {until:?} saved={saved:?}");
    let arena = first.arena();
    eventually("all slabs are returned", || arena.free() == arena.report().slabs);
    let executor = if until == Until::Save {
        sys.heal();
        first
    } else {
        first.shutdown(LONG).unwrap_or_else(|error| panic!("{error:?}: {what}"));
        drop(first);
        sys.heal();
        executor(&sys, directory.path(), case)
    };
    let hits = sys.hits();

    let clean: Arc<dyn Storage> = Arc::new(Local::at(directory.path()).unwrap());
    check(&clean, case, &saved, &what);
    fsyncs_are_final(&sys, quiet, saved.is_ok(), &what);

    save(&executor, 4, 4, false).unwrap_or_else(|error| panic!("the next save: {error:?}: {what}"));
    assert_eq!(executor.latest().unwrap().unwrap().step(), 4, "{what}");
    executor.shutdown(LONG).unwrap_or_else(|error| panic!("{error:?}: {what}"));
    drop(executor);
    assert!(sys.open_descriptors().is_empty(), "leaked {:?}: {what}", sys.open_descriptors());
    assert_eq!(seed_of(&clean, 4, &what), Some(4), "{what}");
    clean.sweep(Sweep::default()).unwrap();
    assert!(hidden(directory.path()).is_empty(), "left behind {:?}: {what}", hidden(directory.path()));
    hits > 0
}

fn check(clean: &Arc<dyn Storage>, case: Case, saved: &Result<Committed>, what: &str) {
    let now = seed_of(clean, case.step(), what);
    let before = if case == Case::Overwriting { Some(2) } else { None };
    match saved {
        Ok(_) => assert_eq!(now, Some(3), "not there: {what}"),
        Err(error) if error.kind() == ErrorKind::Indeterminate => assert!(now == Some(3) || now == before, "{what}"),
        Err(_) => assert_eq!(now, before, "not as it was: {what}"),
    }
    if case != Case::Overwriting {
        assert_eq!(seed_of(clean, 2, what), Some(2), "{what}");
    }
    let oldest = seed_of(clean, 1, what);
    assert!(oldest == Some(1) || (oldest.is_none() && case == Case::Pruning && saved.is_ok()), "{what}");
}

/// A file of an attempt, or its directory, whose fsync failed is never fsynced again, and the attempt is not
/// published.
fn fsyncs_are_final(sys: &Faulty, since: usize, saved: bool, what: &str) {
    let log = sys.log();
    for (i, failed) in log.iter().enumerate().skip(since) {
        let in_attempt = failed.path.iter().find(|part| part.to_string_lossy().ends_with(".tmp"));
        let (Call::Fsync, false, Some(attempt)) = (failed.call, failed.ok, in_attempt) else { continue };
        assert!(!saved, "an fsync failed and the save is ok: {what}");
        for later in &log[i + 1..] {
            assert!(!(later.call == Call::Fsync && later.path == failed.path), "fsynced again: {what}");
            let published = later.to.as_ref().is_some_and(|to| !to.to_string_lossy().contains("/.trash-"));
            assert!(!(published && later.path.ends_with(attempt)), "published all the same: {what}");
        }
    }
}

#[test]
fn every_failing_call_ends_a_save_whole_or_not_at_all() {
    let mut cases = 0;
    for effect in [Effect::Refused(libc::EIO), Effect::DoneAndRefused(libc::EIO), Effect::Refused(libc::ENOSPC)] {
        for sticky in [false, true] {
            for case in [Case::New, Case::Overwriting, Case::Pruning] {
                for until in [Until::Save, Until::Shutdown] {
                    let fault = |after| Fault { call: None, after, sticky, effect };
                    let calls = (0..).take_while(|&after| survives(fault(after), case, until)).count();
                    assert!(calls > 20, "only {calls} calls");
                    cases += calls;
                }
            }
        }
    }
    println!("cases={cases}");
}
