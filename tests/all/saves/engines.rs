//! Every engine and priority writes the same checkpoint.

use ashore::{Checkpoint, CheckpointExecutor, Engine, HostTensor, Priority, StateDict};
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

#[test]
fn every_engine_and_priority_writes_the_same_bytes() {
    let tensors: Vec<Arc<Vec<u32>>> =
        (0..3).map(|t| Arc::new((0..1_500_000_u32).map(|i| (i + t).wrapping_mul(2_654_435_761)).collect())).collect();
    for engine in [Engine::Auto, Engine::Pwrite, Engine::Uring] {
        for priority in [Priority::Normal, Priority::Low] {
            let root = tempfile::tempdir().unwrap();
            let builder = CheckpointExecutor::builder(root.path()).arena(12 << 20).chunk(4 << 20).files(2);
            let executor = builder.engine(engine).priority(priority).build().unwrap();
            for step in 1..=2 {
                let mut state = StateDict::new();
                for (i, tensor) in tensors.iter().enumerate() {
                    state.tensor(format!("t{i}"), HostTensor::new(tensor.clone(), [1_500_000])).unwrap();
                }
                let path = executor.save(step, state).unwrap().wait(LONG).unwrap().committed().unwrap().path;
                let checkpoint = Checkpoint::open(path).unwrap();
                for (i, tensor) in tensors.iter().enumerate() {
                    let same = checkpoint.read_as::<u32>(&format!("t{i}")).unwrap() == **tensor;
                    assert!(same, "{engine:?} {priority:?} ({}) step={step} tensor={i}", executor.engine());
                }
            }
            executor.shutdown(LONG).unwrap();
        }
    }
}
