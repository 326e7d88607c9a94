//! The writer pool and the arena: how much is written at once, how much waits, and the resulting files.

use crate::fixtures::executor::{LONG, eventually, one, pattern};
use crate::fixtures::hooked::{Call, Hooked};
use ashore::storage::Memory;
use ashore::storage::local::Local;
use ashore::{Checkpoint, CheckpointExecutor};
use safetensors::SafeTensors;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

/// What writes wait for: that `open` is set.
#[derive(Default)]
struct Pace {
    now: Mutex<Now>,
    changed: Condvar,
}

#[derive(Default)]
struct Now {
    open: bool,
    under_way: usize,
    most: usize,
}

impl Pace {
    fn write(&self) {
        let mut now = self.now.lock().unwrap();
        now.under_way += 1;
        now.most = now.most.max(now.under_way);
        // Bounded, so that a pool that never has so many writes in flight fails the test and does not hang
        // it.
        now = self.changed.wait_timeout_while(now, LONG, |now| !now.open).unwrap().0;
        now.under_way -= 1;
    }

    fn open_all(&self) {
        self.now.lock().unwrap().open = true;
        self.changed.notify_all();
    }

    fn most(&self) -> usize {
        self.now.lock().unwrap().most
    }
}

/// Storage in memory whose writes wait for the pace.
fn paced() -> (Arc<Pace>, Arc<Hooked>) {
    let pace = Arc::<Pace>::default();
    let waiting = pace.clone();
    let storage = Hooked::new(Memory::new(), move |call| {
        if let Call::Write = call {
            waiting.write();
        }
        Ok(())
    });
    (pace, Arc::new(storage))
}

/// A pool of two would leave the third write waiting for ever, and a pool of four would have a fourth under
/// way.
#[test]
fn as_many_chunks_are_written_at_once_as_there_are_writers() {
    for writers in [1, 3] {
        let (pace, storage) = paced();
        let builder = CheckpointExecutor::builder("in memory").storage(storage).writers(writers);
        let executor = builder.arena(8 * 4096).chunk(4096).build().unwrap();
        let save = executor.save(1, one("t", Arc::new(pattern(1, 100_000)))).unwrap();
        eventually("every writer writes", || pace.most() == writers);
        // Time enough for a writer too many.
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(pace.most(), writers);
        pace.open_all();
        save.wait(LONG).unwrap();
    }
}

/// The arena bounds the memory: while storage accepts nothing, the stager stages only what fits, and it
/// continues with the writes.
#[test]
fn staging_stops_when_the_arena_is_full_and_goes_on_as_writes_end() {
    const SLABS: u64 = 3;
    let (pace, storage) = paced();
    let builder = CheckpointExecutor::builder("in memory").storage(storage.clone()).writers(1);
    let executor = builder.arena(SLABS * 4096).chunk(4096).build().unwrap();
    let tensor = Arc::new(pattern(1, 100_000));
    let save = executor.save(1, one("t", tensor.clone())).unwrap();
    eventually("the arena is full", || executor.arena().free() == 0);
    std::thread::sleep(Duration::from_millis(5));
    let progress = save.progress();
    assert!(progress.staged <= SLABS * 4096 && progress.written == 0, "{progress:?}");
    pace.open_all();
    let committed = save.wait(LONG).unwrap().committed().unwrap();
    assert!(committed.staged <= committed.durable && committed.tail <= committed.durable, "{committed:?}");
    let checkpoint = Checkpoint::from_storage(storage, "step-00000001").unwrap();
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
