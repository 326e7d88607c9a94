//! Tests each compatibility interface against the contract of its system, method by method.

mod datarax;
mod earth2studio;
mod graph;
mod identical;
mod orbax;
mod torch;

use crate::fixtures::executor::LONG;
use crate::fixtures::hooked::{Call, Hooked};
use ashore::storage::Memory;
use ashore::{CheckpointExecutor, Error, ErrorKind, Result, StateDict};
use std::collections::BTreeMap;
use std::path::Path;
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

/// A storage that refuses the first few attempts.
pub fn refusing_attempts(refusals: usize) -> Hooked {
    let refusals = AtomicUsize::new(refusals);
    Hooked::new(Memory::new(), move |call| if let Call::Begin = call { refused(&refusals) } else { Ok(()) })
}

/// A storage that refuses the first few publishes.
pub fn refusing_publishes(refusals: usize) -> Hooked {
    let refusals = AtomicUsize::new(refusals);
    Hooked::new(Memory::new(), move |call| if let Call::Publish = call { refused(&refusals) } else { Ok(()) })
}

/// A storage that publishes nothing before the gate is open.
pub fn publishing_after(gate: &Arc<Gate>) -> Hooked {
    let gate = gate.clone();
    Hooked::new(Memory::new(), move |call| {
        if let Call::Publish = call {
            gate.pass();
        }
        Ok(())
    })
}

/// A storage that holds threads of deferred saves at the gate before they know their step.
pub fn describing_after(gate: &Arc<Gate>) -> Hooked {
    let gate = gate.clone();
    Hooked::new(Memory::new(), move |call| {
        if matches!(call, Call::Describe) && std::thread::current().name() == Some("ashore-deferred") {
            gate.pass();
        }
        Ok(())
    })
}

fn refused(refusals: &AtomicUsize) -> Result<()> {
    match refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)) {
        Ok(_) => Err(Error::new(ErrorKind::Unavailable, "not now")),
        Err(_) => Ok(()),
    }
}
