//! An object store keeps the promises of a storage, but one: it deletes what a reader has open.

use super::{LONG, NAME, begun, faulty, over};
use ashore::storage::{ObjectStore, Storage};
use ashore::testing::conformance::BEHAVIOURS;
use ashore::{Catalog, CheckpointExecutor, ErrorKind};
use object_store::memory::InMemory;
use std::sync::Arc;

/// Objects are deleted, open or not; what holds instead is tested below.
const NOT_SO: &str = "a reader keeps its step";

#[test]
fn store_conformance() {
    let behaviours: Vec<_> = BEHAVIOURS.iter().filter(|(name, _)| *name != NOT_SO).collect();
    assert_eq!(behaviours.len() + 1, BEHAVIOURS.len());
    for (name, behaviour) in behaviours {
        println!("behaviour: {name}");
        behaviour(&(Arc::new(ObjectStore::over(Arc::new(InMemory::new()), super::URL).unwrap()) as _));
    }
}

#[test]
fn a_reader_whose_step_is_deleted_learns_that_it_was_pruned_and_not_that_it_is_damaged() {
    let store = faulty();
    let storage = over(&store);
    let executor = CheckpointExecutor::builder("unused").storage(storage.clone()).arena(4 << 20).chunk(1 << 20);
    let executor = executor.build().unwrap();
    executor.save(1, super::state("t", 1, 10_000)).unwrap().wait(LONG).unwrap();
    let open = Catalog::over(storage.clone()).checkpoint(1).unwrap();
    storage.remove(open.name()).unwrap();
    let error = open.read("t").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error:#}");
    assert!(format!("{error:#}").contains("pruned"), "{error:#}");
}

#[test]
fn a_file_that_is_gone_from_a_step_that_is_there_is_damage() {
    let store = faulty();
    let storage = over(&store);
    let executor = CheckpointExecutor::builder("unused").storage(storage.clone()).arena(4 << 20).chunk(1 << 20);
    let executor = executor.build().unwrap();
    executor.save(1, super::state("t", 1, 10_000)).unwrap().wait(LONG).unwrap();
    let open = Catalog::over(storage.clone()).checkpoint(1).unwrap();
    let shard = store.keys().into_iter().find(|key| key.ends_with(".safetensors")).unwrap();
    let shard = object_store::path::Path::parse(shard).unwrap();
    futures_executor::block_on(object_store::ObjectStoreExt::delete(store.plain().as_ref(), &shard)).unwrap();
    let error = open.read("t").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
    let error = Catalog::over(storage).checkpoint(1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
}

#[test]
fn a_manifest_that_is_not_the_one_the_root_names_is_damage() {
    let store = faulty();
    let storage = over(&store);
    let (_, writing) = begun(&storage, NAME, false);
    writing.publish(false).unwrap();
    let manifest = store.keys().into_iter().find(|key| key.ends_with("manifest.json")).unwrap();
    let manifest = object_store::path::Path::parse(manifest).unwrap();
    let put = object_store::ObjectStoreExt::put(store.plain().as_ref(), &manifest, "another".into());
    futures_executor::block_on(put).unwrap();
    let error = storage.open(NAME).unwrap().open("manifest.json").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
}

#[test]
fn a_store_that_does_not_hear_conditions_is_refused_before_anything_is_saved() {
    let store = faulty();
    store.deaf.store(true, std::sync::atomic::Ordering::SeqCst);
    let builder = CheckpointExecutor::builder("unused").storage(over(&store)).arena(4 << 20).chunk(1 << 20);
    let error = builder.build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:#}");
    assert!(error.message().contains("ignores conditions of puts"), "{error:#}");
    assert!(store.keys().is_empty(), "{:?}", store.keys());
}
