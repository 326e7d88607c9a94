//! Tests each compatibility interface against the contract of its system, method by method.

mod datarax;
mod earth2studio;
mod graph;
mod identical;
mod orbax;
mod torch;

use crate::fixtures::executor::LONG;
use ashore::storage::{FileWriting, Memory, Reading, Storage, Sweep, Swept, Writing};
use ashore::{Attempt, CheckpointExecutor, Error, ErrorKind, Result, StateDict};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// A small engine on real files.
fn engine(root: &Path) -> ashore::Builder {
    CheckpointExecutor::builder(root).arena(4 * 4096).chunk(4096).shutdown_timeout(Duration::from_secs(5))
}

/// A state with tensors of several chunks, a value and metadata.
fn state(seed: u64) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor("model.weights", Arc::new(crate::fixtures::executor::pattern(seed, 20_000))).unwrap();
    state.tensor("model.bias", Arc::new(vec![seed as f32; 7])).unwrap();
    state.value("epoch", &seed).unwrap().metadata("run", "a test").unwrap();
    state
}

/// Every file below `root` that is not hidden, and its bytes.
fn files(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(root).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if name.starts_with('.') {
            continue;
        }
        if entry.file_type().unwrap().is_dir() {
            found.extend(files(&entry.path()).into_iter().map(|(file, bytes)| (format!("{name}/{file}"), bytes)));
        } else if name != "latest" {
            found.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    found
}

/// Drops a copy of `value` in a forked child, as forking data loaders do; the child has ten seconds for it.
#[expect(unsafe_code, reason = "fork, and a second owner in the child")]
fn drop_in_a_child<T>(value: &T) {
    // SAFETY: the child drops its copy and exits; the parent keeps its own.
    let status = unsafe {
        let child = libc::fork();
        if child == 0 {
            libc::alarm(10);
            drop(std::ptr::read(value));
            libc::_exit(0);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        status
    };
    assert_eq!(status, 0, "the child hung, or failed");
}

/// A gate at which a thread waits until a test opens it.
#[derive(Debug, Default)]
pub struct Gate {
    /// Whether a thread has arrived, and whether threads may pass.
    state: Mutex<(bool, bool)>,
    changed: Condvar,
}

impl Gate {
    pub fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.0 = true;
        self.changed.notify_all();
        drop(self.changed.wait_timeout_while(state, LONG, |state| !state.1).unwrap());
    }

    /// Waits until a thread has arrived.
    pub fn reached(&self) {
        let state = self.state.lock().unwrap();
        let (_state, late) = self.changed.wait_timeout_while(state, LONG, |state| !state.0).unwrap();
        assert!(!late.timed_out(), "no thread came");
    }

    pub fn open(&self) {
        self.state.lock().unwrap().1 = true;
        self.changed.notify_all();
    }
}

/// A storage that refuses the first few attempts, or their publishes, or publishes nothing before a gate is
/// open.
#[derive(Debug)]
pub struct Flaky {
    memory: Memory,
    refusals: AtomicUsize,
    publishes: Arc<AtomicUsize>,
    gate: Option<Arc<Gate>>,
}

fn refused(refusals: &AtomicUsize) -> Result<()> {
    match refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
        Ok(_) => Err(Error::new(ErrorKind::Unavailable, "not now")),
        Err(_) => Ok(()),
    }
}

impl Flaky {
    pub fn new(refusals: usize) -> Self {
        Self { memory: Memory::new(), refusals: refusals.into(), publishes: Arc::default(), gate: None }
    }

    pub fn at_publish(refusals: usize) -> Self {
        Self { publishes: Arc::new(refusals.into()), ..Self::new(0) }
    }

    pub fn gated(gate: &Arc<Gate>) -> Self {
        Self { gate: Some(gate.clone()), ..Self::new(0) }
    }
}

impl Storage for Flaky {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        refused(&self.refusals)?;
        let attempt = self.memory.begin(name, attempt, overwrite)?;
        Ok(Arc::new(FlakyAttempt { attempt, publishes: self.publishes.clone(), gate: self.gate.clone() }))
    }
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.memory.open(name)
    }
    fn list(&self) -> Result<Vec<String>> {
        self.memory.list()
    }
    fn confirm(&self, name: &str) -> Result<()> {
        self.memory.confirm(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.memory.remove(name)
    }
    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.memory.sweep(how)
    }
    fn hint(&self, name: &str) -> Result<()> {
        self.memory.hint(name)
    }
    fn describe(&self, name: &str) -> PathBuf {
        self.memory.describe(name)
    }
}

#[derive(Debug)]
struct FlakyAttempt {
    attempt: Arc<dyn Writing>,
    publishes: Arc<AtomicUsize>,
    gate: Option<Arc<Gate>>,
}

impl Writing for FlakyAttempt {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        self.attempt.create(file, len)
    }
    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.attempt.put(file, bytes)
    }
    fn publish(&self, overwrite: bool) -> Result<()> {
        refused(&self.publishes)?;
        self.gate.iter().for_each(|gate| gate.pass());
        self.attempt.publish(overwrite)
    }
    fn settle(&self) -> Result<()> {
        self.attempt.settle()
    }
    fn abandon(&self) -> Result<()> {
        self.attempt.abandon()
    }
}
