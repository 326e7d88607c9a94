//! An executor of one process on a store: saves, ends, comes back.

use super::{LONG, NAME, URL, begun, faulty, over, state};
use crate::faulty::Faulty;
use ashore::storage::{ObjectStore, Storage, Sweep};
use ashore::{Catalog, Checkpoint, CheckpointExecutor, ErrorKind, SaveOptions};
use std::sync::Arc;
use std::sync::atomic::Ordering;

fn executor(store: &Arc<Faulty>, keep: usize) -> CheckpointExecutor {
    let builder = CheckpointExecutor::builder("unused").arena(20 << 20).chunk(1 << 20).writers(1).storage(over(store));
    if keep > 0 { builder.keep_last(keep) } else { builder }.build().unwrap()
}

fn steps(store: &Arc<Faulty>) -> Vec<u64> {
    Catalog::over(over(store)).list().unwrap().iter().map(|entry| entry.step).collect()
}

#[test]
fn a_run_saves_restarts_and_goes_on_where_it_was() {
    let store = faulty();
    let first = executor(&store, 0);
    for step in 1..=3 {
        let saved = first.save(step, state("t", step, 700_000)).unwrap().wait(LONG).unwrap();
        let path = saved.committed().unwrap().path.display().to_string();
        assert_eq!(path, format!("{URL}/step-{step:08}"));
    }
    let again = first.save(3, state("t", 9, 700_000)).unwrap().wait(LONG).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Conflict, "{again:#}");
    first.shutdown(LONG).unwrap();
    drop(first);

    let second = executor(&store, 0);
    let newest = second.latest().unwrap().unwrap();
    assert_eq!((newest.step(), newest.read_as::<u32>("t").unwrap()), (3, vec![3; 700_000]));
    assert!(newest.verify().unwrap().is_sound());
    let options = SaveOptions::default().overwrite();
    second.save_with(3, state("t", 33, 700_000), options).unwrap().wait(LONG).unwrap();
    second.shutdown(LONG).unwrap();
    let newest = Catalog::over(over(&store)).latest_valid().unwrap().unwrap().checkpoint;
    assert_eq!((newest.step(), newest.read_as::<u32>("t").unwrap()), (3, vec![33; 700_000]));
    assert_eq!(steps(&store), [1, 2, 3]);
}

#[test]
fn retention_deletes_the_objects_of_old_steps() {
    let store = faulty();
    let executor = executor(&store, 2);
    for step in 1..=5 {
        executor.save(step, state("t", step, 1000)).unwrap().wait(LONG).unwrap();
    }
    executor.shutdown(LONG).unwrap();
    assert_eq!(steps(&store), [4, 5]);
    let keys = store.keys();
    let of = |step: u64| keys.iter().filter(|key| key.contains(&format!("step-{step:08}"))).count();
    assert_eq!([of(1), of(2), of(3)], [0, 0, 0], "{keys:?}");
    assert!(of(4) >= 3 && of(5) >= 3, "{keys:?}");
}

#[test]
fn what_a_dead_process_left_is_swept_by_the_next_one() {
    let store = faulty();
    let dead = over(&store);
    let (_, writing) = begun(&dead, NAME, false);
    writing.put("model.safetensors", &[7; 5000]).unwrap();
    std::mem::forget(writing);
    assert!(store.keys().iter().any(|key| key.contains(NAME)));
    let executor = executor(&store, 0);
    executor.shutdown(LONG).unwrap();
    assert!(!store.keys().iter().any(|key| key.contains(NAME)), "{:?}", store.keys());
}

#[test]
fn a_program_without_an_executor_sweeps_what_older_sessions_left_and_owns_nothing() {
    let store = faulty();
    let dead = over(&store);
    let (_, writing) = begun(&dead, NAME, false);
    std::mem::forget(writing);
    let owner = over(&store);
    owner.take_over().unwrap();
    let swept = over(&store).sweep(Sweep::default()).unwrap();
    assert_eq!((swept.removed.len(), swept.left.len()), (1, 0), "{swept:?}");
    let (attempt, writing) = begun(&owner, NAME, false);
    writing.publish(false).unwrap();
    assert_eq!(super::published(&store, NAME), Some(attempt), "the sweep took nothing over");
}

#[test]
fn a_checkpoint_in_another_prefix_is_a_root_of_its_own() {
    let store = faulty();
    let executor = executor(&store, 0);
    let options = SaveOptions::default().directory("memory://bucket/exports/b");
    executor.save_with(5, state("t", 5, 100), options).unwrap().wait(LONG).unwrap();
    executor.shutdown(LONG).unwrap();
    assert!(steps(&store).is_empty());
    let there = Arc::new(ObjectStore::over(store, "memory://bucket/exports").unwrap());
    assert_eq!(Checkpoint::from_storage(there, "b").unwrap().read_as::<u32>("t").unwrap(), [5; 100]);
}

#[test]
fn a_root_object_that_has_not_changed_is_not_sent_again() {
    let store = faulty();
    let storage = over(&store);
    for step in 1..=5 {
        begun(&storage, &format!("step-{step}"), false).1.publish(false).unwrap();
    }
    let reader = over(&store);
    store.sent.store(0, Ordering::SeqCst);
    for name in reader.list().unwrap() {
        reader.open(&name).unwrap();
    }
    assert_eq!(store.sent.load(Ordering::SeqCst), 1);
    begun(&storage, "step-6", false).1.publish(false).unwrap();
    assert_eq!((reader.list().unwrap().len(), store.sent.load(Ordering::SeqCst)), (6, 2));
}

#[test]
fn marks_stay_with_the_steps() {
    let store = faulty();
    let storage = over(&store);
    let (_, writing) = begun(&storage, NAME, false);
    writing.publish(false).unwrap();
    assert_eq!(storage.read_marks().unwrap(), None);
    over(&store).write_marks(br#"{"version":1,"marks":[]}"#).unwrap();
    let (_, another) = begun(&storage, "step-8", false);
    another.publish(false).unwrap();
    assert_eq!(storage.read_marks().unwrap().unwrap(), br#"{"marks":[],"version":1}"#);
    assert_eq!(storage.write_marks(b"{").unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_step_of_many_slabs_is_whole() {
    let store = faulty();
    // Parts of 8 MiB, as many as there are writers.
    let builder = CheckpointExecutor::builder("unused").arena(64 << 20).chunk(1 << 20).storage(over(&store));
    let executor = builder.build().unwrap();
    let len = 10 << 20;
    executor.save(1, state("t", 7, len)).unwrap().wait(LONG).unwrap();
    let newest = executor.latest().unwrap().unwrap();
    assert!(newest.verify().unwrap().is_sound());
    assert!(newest.read_as::<u32>("t").unwrap() == vec![7; len]);
}
