//! The writer pool and the arena: how much is written at once, how much waits, and the resulting files.

use crate::fixtures::executor::{LONG, eventually, one, pattern};
use ashore::storage::local::Local;
use ashore::storage::{FileWriting, IoMode, Memory, Reading, Storage, Sweep, Swept, Writing};
use ashore::{Attempt, Checkpoint, CheckpointExecutor, Result};
use safetensors::SafeTensors;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// Storage in memory in which a write ends when `wanted` writes are under way, or `open` is set.
#[derive(Clone, Debug)]
struct Paced {
    memory: Memory,
    pace: Arc<(Mutex<Pace>, Condvar)>,
}

#[derive(Debug, Default)]
struct Pace {
    wanted: usize,
    open: bool,
    under_way: usize,
    most: usize,
}

impl Paced {
    fn new(wanted: usize) -> Self {
        let pace = Pace { wanted, ..Pace::default() };
        Self { memory: Memory::new(), pace: Arc::new((Mutex::new(pace), Condvar::new())) }
    }

    fn open_all(&self) {
        self.pace.0.lock().unwrap().open = true;
        self.pace.1.notify_all();
    }

    fn most(&self) -> usize {
        self.pace.0.lock().unwrap().most
    }
}

impl Storage for Paced {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        Ok(Arc::new(PacedWriting(self.memory.begin(name, attempt, overwrite)?, self.clone())))
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
struct PacedWriting(Arc<dyn Writing>, Paced);

impl Writing for PacedWriting {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        Ok(Arc::new(PacedFile(self.0.create(file, len)?, self.1.clone())))
    }
    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.0.put(file, bytes)
    }
    fn publish(&self, overwrite: bool) -> Result<()> {
        self.0.publish(overwrite)
    }
    fn settle(&self) -> Result<()> {
        self.0.settle()
    }
    fn abandon(&self) -> Result<()> {
        self.0.abandon()
    }
}

#[derive(Debug)]
struct PacedFile(Arc<dyn FileWriting>, Paced);

impl FileWriting for PacedFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let (pace, changed) = &*self.1.pace;
        let mut now = pace.lock().unwrap();
        now.under_way += 1;
        now.most = now.most.max(now.under_way);
        if now.under_way >= now.wanted {
            now.open = true;
            changed.notify_all();
        }
        // Bounded, so that a pool that never has so many writes in flight fails the test and does not hang
        // it.
        now = changed.wait_timeout_while(now, LONG, |now| !now.open).unwrap().0;
        now.under_way -= 1;
        drop(now);
        self.0.write_at(offset, bytes)
    }
    fn seal(&self) -> Result<()> {
        self.0.seal()
    }
    fn mode(&self) -> IoMode {
        self.0.mode()
    }
}

/// A pool of two would leave the third write waiting for ever, and a pool of four would have a fourth under
/// way.
#[test]
fn as_many_chunks_are_written_at_once_as_there_are_writers() {
    for writers in [1, 3] {
        let storage = Paced::new(usize::MAX);
        let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(storage.clone())).writers(writers);
        let executor = builder.arena(8 * 4096).chunk(4096).build().unwrap();
        let save = executor.save(1, one("t", Arc::new(pattern(1, 100_000)))).unwrap();
        eventually("every writer writes", || storage.most() == writers);
        // Time enough for a writer too many.
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(storage.most(), writers);
        storage.open_all();
        save.wait(LONG).unwrap();
    }
}

/// The arena bounds the memory: while storage accepts nothing, the stager stages only what fits, and it
/// continues with the writes.
#[test]
fn staging_stops_when_the_arena_is_full_and_goes_on_as_writes_end() {
    const SLABS: u64 = 3;
    let storage = Paced::new(usize::MAX);
    let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(storage.clone())).writers(1);
    let executor = builder.arena(SLABS * 4096).chunk(4096).build().unwrap();
    let tensor = Arc::new(pattern(1, 100_000));
    let save = executor.save(1, one("t", tensor.clone())).unwrap();
    eventually("the arena is full", || executor.arena().free() == 0);
    std::thread::sleep(Duration::from_millis(5));
    let progress = save.progress();
    assert!(progress.staged <= SLABS * 4096 && progress.written == 0, "{progress:?}");
    storage.open_all();
    let committed = save.wait(LONG).unwrap().committed().unwrap();
    assert!(committed.staged <= committed.durable && committed.tail <= committed.durable, "{committed:?}");
    let checkpoint = Checkpoint::from_storage(Arc::new(storage), "step-00000001").unwrap();
    assert_eq!(checkpoint.read("t").unwrap(), *tensor);
}

/// Whole files, as the stock crate reads them: `just stock` does the same with Python's packages.
#[test]
fn every_file_of_a_step_is_read_whole_by_the_safetensors_crate() {
    let root = tempfile::tempdir().unwrap();
    let builder = CheckpointExecutor::builder(root.path()).storage(Arc::new(Local::open(root.path()).unwrap()));
    let executor = builder.arena(1 << 20).chunk(64 << 10).files(2).build().unwrap();
    let tensors: Vec<_> = (0..6).map(|i| (format!("t{i}"), Arc::new(pattern(i, 50_000 * (i as usize + 1))))).collect();
    let mut state = ashore::StateDict::new();
    for (name, bytes) in &tensors {
        state.tensor(name.as_str(), bytes.clone()).unwrap();
    }
    let path = executor.save(1, state).unwrap().wait(LONG).unwrap().committed().unwrap().path;
    let mut found = 0;
    for entry in std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.extension().is_none_or(|extension| extension != "safetensors") {
            continue;
        }
        let bytes = std::fs::read(entry).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (name, view) in file.tensors() {
            let (_, expected) = tensors.iter().find(|(known, _)| *known == name).unwrap();
            assert_eq!((view.dtype(), view.data()), (safetensors::Dtype::U8, &expected[..]), "{name}");
            found += 1;
        }
    }
    assert_eq!(found, tensors.len());
}
