//! Tidying up keeps pace with saves, and is complete when the executor has been shut down.

use crate::fixtures::executor::{LONG, eventually, hidden, one, pattern};
use ashore::storage::local::{Linux, Local};
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{CheckpointExecutor, Overlap, Save, SaveOptions};
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

const SAVES: u64 = 100;
/// The saves that wait for the tidying thread, as many in its hands, one that the committer holds, and one
/// that it publishes.
const LAG: usize = 16 + 16 + 2;

fn executor(sys: &Arc<Faulty>, root: &Path) -> CheckpointExecutor {
    let storage = Arc::new(Local::with_sys(sys.clone(), root).unwrap());
    // One writer, so that saves are committed in their order: the steps that were committed last are kept,
    // whatever their numbers.
    let builder = CheckpointExecutor::builder("unused").storage(storage).arena(4 * 4096).chunk(4096).writers(1);
    builder.keep_last(3).overlap(Overlap::Queue(SAVES as usize)).build().unwrap()
}

fn save(executor: &CheckpointExecutor, step: u64, overwrite: bool) -> Save {
    let options = if overwrite { SaveOptions::default().overwrite() } else { SaveOptions::default() };
    let save = executor.save_with(step, one("t", Arc::new(pattern(step, 900))), options).unwrap();
    executor.fence().unwrap();
    save
}

fn steps(root: &Path) -> BTreeSet<u64> {
    let names = std::fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter_map(|name| ashore::id::parse_step_name(&name)).collect()
}

/// A fast loop got ahead of the tidying thread, whose queue of 64 overflowed and dropped the rest for good: a
/// program that kept the last 3 and shut down in order left 7,188 owner records and 131 steps.
#[test]
fn a_loop_that_is_faster_than_tidying_waits_for_it_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let sys = Faulty::unsynced(Arc::new(Linux));
    let executor = executor(&sys, directory.path());
    let held = sys.hold(Call::Unlink);
    let saves: Vec<Save> = (1..=SAVES).map(|step| save(&executor, step, false)).collect();
    eventually("all but the commits is done", || {
        let written = saves.iter().filter(|save| save.progress().written > 0).count();
        written == saves.len() && executor.arena().free() == executor.arena().report().slabs
    });
    let durable = saves.iter().filter(|save| save.try_get().is_some()).count();
    assert!(durable <= LAG, "{durable} saves are ahead of tidying");
    drop(held);
    for save in saves {
        save.wait(LONG).unwrap();
    }
    executor.shutdown(LONG).unwrap();
    assert_eq!(steps(directory.path()), BTreeSet::from([SAVES - 2, SAVES - 1, SAVES]));
    assert_eq!(hidden(directory.path()), [""; 0]);
}

/// A later round deletes what could not be deleted at once. A sweep that met the same error reported the
/// attempt as left alone, which counted as success, and nothing retried it.
#[test]
fn a_step_that_could_not_be_deleted_at_first_is_gone_after_a_shutdown() {
    for (failing, refusals) in [(false, 3), (true, 2)] {
        let directory = tempfile::tempdir().unwrap();
        let sys = Faulty::unsynced(Arc::new(Linux));
        let executor = executor(&sys, directory.path());
        save(&executor, 1, false).wait(LONG).unwrap();
        eventually("it is tidied up", || hidden(directory.path()).is_empty());

        let refused =
            |call, after| Fault { call: Some(call), after, sticky: false, effect: Effect::Refused(libc::EIO) };
        (0..refusals).for_each(|after| sys.fail(refused(Call::Unlink, after)));
        let saved = if failing {
            // After the owner record and its name comes the shard.
            sys.fail(refused(Call::Fsync, 2));
            save(&executor, 2, false).wait(LONG)
        } else {
            save(&executor, 1, true).wait(LONG)
        };
        assert_eq!(saved.is_err(), failing, "{saved:?}");
        save(&executor, 3, false).wait(LONG).unwrap();
        executor.shutdown(LONG).unwrap();
        assert_eq!(hidden(directory.path()), [""; 0], "failing={failing}");
    }
}
