//! Tests of storage in object stores, on stores in memory that answer as real ones do, or worse.
#![cfg(not(any(loom, miri)))]

#[path = "../all/ranks/board.rs"]
#[expect(dead_code, reason = "the ranks here lose no message")]
mod board;
mod conformance;
mod executors;
mod faults;
mod faulty;
mod forked;
mod ranks;
mod sessions;

use ashore::storage::{ObjectStore, Storage, Writing};
use ashore::{Attempt, StateDict};
use faulty::Faulty;
use object_store::memory::InMemory;
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);
const URL: &str = "memory://bucket/runs/a";
const NAME: &str = "step-00000007";

/// A storage over `store`, as another process has it.
fn over(store: &Arc<Faulty>) -> Arc<ObjectStore> {
    Arc::new(ObjectStore::over(store.clone(), URL).unwrap().patience(Duration::from_secs(20)))
}

fn faulty() -> Arc<Faulty> {
    Arc::new(Faulty::new(InMemory::new()))
}

/// An attempt at `name` with a manifest.
fn begun(storage: &ObjectStore, name: &str, overwrite: bool) -> (Attempt, Arc<dyn Writing>) {
    let attempt = Attempt::new();
    let writing = storage.begin(name, attempt, overwrite).unwrap();
    writing.put("manifest.json", attempt.to_string().as_bytes()).unwrap();
    (attempt, writing)
}

/// The attempt that the step `name` is, as a process sees that has just come.
fn published(store: &Arc<Faulty>, name: &str) -> Option<Attempt> {
    let step = over(store).open(name).ok()?;
    let manifest = step.open("manifest.json").unwrap();
    let mut bytes = vec![0; manifest.len() as usize];
    manifest.read_at(0, &mut bytes).unwrap();
    Attempt::parse(std::str::from_utf8(&bytes).unwrap())
}

fn state(name: &str, step: u64, len: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor(name, vec![step as u32; len]).unwrap();
    state.value("step", &step).unwrap();
    state
}
