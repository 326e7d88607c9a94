//! Sessions: the newest one owns the root, and an older one can change nothing any more.

use super::{LONG, NAME, URL, begun, faulty, over, published, state};
use ashore::storage::{Storage, Sweep};
use ashore::{Attempt, Catalog, Checkpoint, CheckpointExecutor, ErrorKind, SaveOptions};
use std::path::Path;

#[test]
fn of_two_jobs_on_one_root_the_older_gets_a_conflict_at_its_next_commit_and_says_why() {
    let store = faulty();
    let build = || {
        let builder = CheckpointExecutor::builder("unused").storage(over(&store)).arena(4 << 20).chunk(1 << 20);
        builder.build().unwrap()
    };
    let older = build();
    older.save(1, state("t", 1, 1000)).unwrap().wait(LONG).unwrap();
    let newer = build();
    let error = older.save(2, state("t", 2, 1000)).and_then(|save| save.wait(LONG)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error:#}");
    let text = format!("{error:#}");
    assert!(text.contains("newer session") && text.contains("pid=") && text.contains("generation=2"), "{text}");
    newer.save(2, state("t", 22, 1000)).unwrap().wait(LONG).unwrap();
    let catalog = Catalog::over(over(&store));
    assert_eq!(catalog.list().unwrap().len(), 2);
    assert_eq!(catalog.latest().unwrap().unwrap().read_as::<u32>("t").unwrap(), [22; 1000]);
}

#[test]
fn an_attempt_that_was_whole_before_a_take_over_is_never_published_after_it() {
    let store = faulty();
    let older = over(&store);
    let (_, writing) = begun(&older, NAME, false);
    let newer = over(&store);
    newer.take_over().unwrap();
    assert_eq!(writing.publish(false).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(published(&store, NAME), None);
    assert_eq!(older.remove(NAME).unwrap_err().kind(), ErrorKind::Conflict, "nor does it prune");
}

/// A paused rank 0 wakes up and sweeps while its own session writes: an attempt that it does not know.
#[test]
fn a_sweep_leaves_attempts_of_the_newest_session_alone() {
    let store = faulty();
    let storage = over(&store);
    let (attempt, writing) = begun(&storage, NAME, false);
    let bystander = over(&store);
    let swept = bystander.sweep(Sweep::default()).unwrap();
    assert_eq!((swept.removed.len(), swept.left.len()), (0, 1), "{swept:?}");
    writing.publish(false).unwrap();
    assert_eq!(published(&store, NAME), Some(attempt));
}

#[test]
fn a_session_that_was_taken_over_sweeps_nothing_of_the_newer_one() {
    let store = faulty();
    let older = over(&store);
    older.take_over().unwrap();
    let newer = over(&store);
    let (attempt, writing) = begun(&newer, NAME, false);
    assert!(older.sweep(Sweep::default()).unwrap().removed.is_empty());
    writing.publish(false).unwrap();
    assert_eq!(published(&store, NAME), Some(attempt));
}

#[test]
fn readers_take_nothing_over() {
    let store = faulty();
    let owner = over(&store);
    let (attempt, writing) = begun(&owner, NAME, false);
    let reader = over(&store);
    assert!(reader.list().unwrap().is_empty());
    assert_eq!(reader.open(NAME).unwrap_err().kind(), ErrorKind::NotFound);
    Catalog::over(reader).latest().unwrap();
    writing.publish(false).unwrap();
    assert_eq!(published(&store, NAME), Some(attempt));
}

#[test]
fn a_root_that_was_emptied_behind_its_owner_is_a_conflict() {
    let store = faulty();
    let owner = over(&store);
    let (_, writing) = begun(&owner, NAME, false);
    let root = object_store::path::Path::parse("runs/a/ashore.json").unwrap();
    futures_executor::block_on(object_store::ObjectStoreExt::delete(store.plain().as_ref(), &root)).unwrap();
    let error = writing.publish(false).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error:#}");
}

#[test]
fn a_save_into_a_directory_below_the_own_root_takes_nothing_over() {
    let store = faulty();
    let builder = CheckpointExecutor::builder("unused").storage(over(&store)).arena(4 << 20).chunk(1 << 20);
    let executor = builder.build().unwrap();
    let options = SaveOptions::default().directory(format!("{URL}/best"));
    executor.save_with(1, state("t", 1, 1000), options).unwrap().wait(LONG).unwrap();
    executor.save(2, state("t", 2, 1000)).unwrap().wait(LONG).unwrap();
    let best = Checkpoint::from_storage(over(&store), "best").unwrap();
    assert_eq!(best.read_as::<u32>("t").unwrap(), [1; 1000]);
}

#[test]
fn overlapping_saves_into_one_directory_are_of_one_session() {
    let store = faulty();
    let storage = over(&store);
    let there = Path::new("memory://bucket/exports");
    let begin = |name: &str| {
        let elsewhere = storage.elsewhere(there, true).unwrap();
        elsewhere.take_over().unwrap();
        elsewhere.begin(name, Attempt::new(), false).unwrap()
    };
    let both = [begin("a"), begin("b")];
    for writing in both {
        writing.put("manifest.json", b"x").unwrap();
        writing.publish(false).unwrap();
        writing.settle().unwrap();
    }
}

/// A take-over waits for the changes of the root that are in progress, and those look at the session.
#[test]
fn changes_and_take_overs_of_one_process_do_not_wait_for_each_other() {
    let store = faulty();
    let storage = over(&store);
    storage.take_over().unwrap();
    let (done, ended) = std::sync::mpsc::channel();
    for marks in [true, false] {
        let (storage, store, done) = (storage.clone(), store.clone(), done.clone());
        std::thread::spawn(move || {
            for _ in 0..100 {
                if marks {
                    // A take-over may come first: then it is refused.
                    let _ = storage.write_marks(b"{}");
                } else {
                    over(&store).take_over().unwrap();
                    storage.take_over().unwrap();
                }
            }
            done.send(()).unwrap();
        });
    }
    for _ in 0..2 {
        ended.recv_timeout(LONG).expect("no thread waits for ever");
    }
}
