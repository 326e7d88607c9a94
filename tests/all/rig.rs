//! The basis of most tests of saves: an executor over storage in memory, with small chunks, on the host or a
//! late device.

use ashore::id::step_name;
use ashore::storage::{Memory, Storage};
use ashore::testing::LateDevice;
use ashore::{Builder, Checkpoint, CheckpointExecutor, Dtype, RawHost, StateDict};
use std::cell::UnsafeCell;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longer than any test takes.
pub const LONG: Duration = Duration::from_secs(60);

pub struct Rig {
    pub executor: CheckpointExecutor,
    pub storage: Arc<dyn Storage>,
    pub device: LateDevice,
}

/// Chunks of 4 KiB in four slabs, on a late device.
pub fn rig(change: impl FnOnce(Builder) -> Builder) -> Rig {
    let (storage, device): (Arc<dyn Storage>, _) = (Arc::new(Memory::new()), LateDevice::default());
    let builder =
        CheckpointExecutor::builder("in memory").storage(storage.clone()).made_device(Arc::new(device.clone()));
    // Short, so that a test that fails with its device held ends soon.
    let builder = builder.arena(4 * 4096).chunk(4096).shutdown_timeout(Duration::from_secs(5));
    let executor = change(builder).build().unwrap();
    Rig { executor, storage, device }
}

impl Rig {
    pub fn checkpoint(&self, step: u64) -> ashore::Result<Checkpoint> {
        Checkpoint::from_storage(self.storage.clone(), &step_name(step))
    }

    /// Waits until every slab is returned.
    pub fn slabs_home(&self) {
        let arena = self.executor.arena();
        eventually("all slabs are home", || arena.free() == arena.report().slabs);
    }
}

/// Waits until `look` is true.
pub fn eventually(what: &str, mut look: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !look() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_micros(50));
    }
}

/// Hidden names in a root, except owner records that are still empty: those can be of another host.
pub fn hidden(root: &std::path::Path) -> Vec<String> {
    let mut left = Vec::new();
    for entry in std::fs::read_dir(root).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        // An executor may delete entries while this lists them.
        let empty_record = name.ends_with(".owner") && entry.metadata().is_ok_and(|metadata| metadata.len() == 0);
        if name.starts_with('.') && !empty_record && entry.path().symlink_metadata().is_ok() {
            left.push(name);
        }
    }
    left
}

/// A state dict with one tensor.
pub fn one(name: &str, source: impl ashore::Source + 'static) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor(name, source).unwrap();
    state
}

/// Bytes that differ at every offset from those of other seeds.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((i * 7 + seed * 13 + (i >> 8)) % 251) as u8).collect()
}

/// Host memory that the test writes while a source of it is alive, as a training program does.
pub struct Buffer(UnsafeCell<Vec<u8>>);

#[expect(unsafe_code, reason = "the test keeps the promises of RawHost, or breaks them in order to be found out")]
mod raw {
    use super::*;

    // SAFETY: written by the test's thread only, as a training program would.
    unsafe impl Sync for Buffer {}

    impl Buffer {
        pub fn new(bytes: Vec<u8>) -> Arc<Self> {
            Arc::new(Self(UnsafeCell::new(bytes)))
        }

        pub fn fill(&self, bytes: &[u8]) {
            // SAFETY: late copies may read meanwhile, on another thread, only in tests that forget a fence on
            // a held device.
            unsafe { (*self.0.get()).copy_from_slice(bytes) };
        }

        pub fn source(self: &Arc<Self>) -> RawHost {
            // SAFETY: the buffer is kept alive; writing it before a fence is what some tests are about.
            let (at, len) = unsafe { ((*self.0.get()).as_ptr(), (*self.0.get()).len()) };
            // SAFETY: as above.
            unsafe { RawHost::new(at, len as u64, Dtype::U8, [len], self.clone()) }
        }
    }
}
