//! An object store as the tier behind a directory.

use super::{LONG, executor, open, save, steps, until};
use ashore::storage::{ObjectStore, Storage, local::Local};
use ashore::tiers::{Tier, TierState, copy};
use ashore::{Catalog, ErrorKind};
use object_store::memory::InMemory;
use std::sync::Arc;

/// The store, as another process has it.
fn over(store: &Arc<InMemory>) -> Arc<dyn Storage> {
    Arc::new(ObjectStore::over(store.clone(), "memory://bucket/run").unwrap())
}

fn numbers(store: &Arc<InMemory>) -> Vec<u64> {
    Catalog::over(over(store)).list().unwrap().into_iter().map(|entry| entry.step).collect()
}

#[test]
fn steps_reach_an_object_store_and_a_new_machine_goes_on_from_there() {
    let (root, new, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
    let first = executor(root.path(), [Tier::over("store", over(&store)).keep_last(2)]);
    for step in 1..=3 {
        let promoted = save(&first, step).durable_in("store").wait(LONG).unwrap();
        assert_eq!(promoted.attempt, open(root.path(), step).attempt());
    }
    first.shutdown(LONG).unwrap();
    assert_eq!((steps(root.path()), numbers(&store)), (vec![1, 2, 3], vec![2, 3]));
    let second = executor(new.path(), [Tier::over("store", over(&store)).keep_last(2)]);
    let newest = second.latest_valid().unwrap().unwrap().checkpoint;
    assert_eq!((newest.step(), newest.tier()), (3, Some("store")));
    assert_eq!(newest.read_as::<u64>("weights").unwrap()[9_999], 3);
    save(&second, 4).durable_in("store").wait(LONG).unwrap();
    second.shutdown(LONG).unwrap();
    assert_eq!(numbers(&store), [3, 4]);
    // The first machine comes back.
    let late = executor(root.path(), [Tier::over("store", over(&store)).keep_last(2)]);
    assert_eq!(late.latest().unwrap().unwrap().step(), 4);
    late.shutdown(LONG).unwrap();
    assert_eq!(numbers(&store), [3, 4]);
}

#[test]
fn a_session_that_another_machine_overtook_in_a_store_promotes_nothing_more() {
    let (old, new, store) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Arc::new(InMemory::new()));
    let zombie = executor(old.path(), [Tier::over("store", over(&store))]);
    save(&zombie, 1).durable_in("store").wait(LONG).unwrap();
    let owner = executor(new.path(), [Tier::over("store", over(&store))]);
    let refused = save(&zombie, 2).durable_in("store").wait(LONG).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict, "{refused:#}");
    until("the tier is lost", || zombie.tiers()[0].state == TierState::Lost);
    save(&owner, 2).durable_in("store").wait(LONG).unwrap();
    zombie.shutdown(LONG).unwrap();
    owner.shutdown(LONG).unwrap();
    assert_ne!(Catalog::over(over(&store)).checkpoint(2).unwrap().attempt(), open(old.path(), 2).attempt());
}

#[test]
fn a_step_is_copied_from_a_store_to_a_directory_and_back() {
    let (root, back) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), []);
    drop(save(&running, 5));
    running.shutdown(LONG).unwrap();
    let store = Arc::new(InMemory::new());
    let to = over(&store);
    let copied = copy(&open(root.path(), 5), &to, |_, _| {}).unwrap();
    assert!(!copied.already && copy(&open(root.path(), 5), &to, |_, _| {}).unwrap().already);
    let there = Catalog::over(over(&store)).checkpoint(5).unwrap();
    let local: Arc<dyn Storage> = Arc::new(Local::open(back.path()).unwrap());
    copy(&there, &local, |done, total| assert!(done <= total)).unwrap();
    super::same(root.path(), back.path());
    assert_eq!(steps(back.path()), [5]);
}

#[test]
fn a_tier_may_be_named_by_a_url() {
    let (root, tier) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = executor(root.path(), [Tier::at(format!("file://{}", tier.path().display()))]);
    let name = running.tiers()[0].tier.clone();
    save(&running, 1).durable_in(&name).wait(LONG).unwrap();
    running.shutdown(LONG).unwrap();
    super::same(root.path(), tier.path());
    let builder = ashore::CheckpointExecutor::builder(root.path()).arena(1 << 20).chunk(64 << 10).alone();
    let refused = builder.tier(Tier::at("s4://bucket/run")).build().unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
}
