//! A training loop that can be killed at any moment and goes on from its newest durable step.
//!
//! `cargo run --example 01_save_and_resume -- runs/example` twice: the second run goes on where the first one ended.

use ashore::{Checkpoint, CheckpointExecutor, HostTensor, StateDict};
use std::{sync::Arc, time::Duration};

struct Training {
    step: u64,
    weights: Arc<Vec<f32>>,
    momentum: Arc<Vec<f32>>,
}

impl Training {
    fn restore(checkpoint: &Checkpoint) -> ashore::Result<Self> {
        let weights = Arc::new(checkpoint.read_as("weights")?);
        let momentum = Arc::new(checkpoint.read_as("momentum")?);
        Ok(Self { step: checkpoint.step(), weights, momentum })
    }

    fn state(&self) -> ashore::Result<StateDict<'static>> {
        let mut state = StateDict::new();
        state.tensor("weights", HostTensor::new(self.weights.clone(), [1000, 1000]))?;
        state.tensor("momentum", HostTensor::new(self.momentum.clone(), [1000, 1000]))?;
        state.value("learning_rate", &0.01)?.metadata("run", "example")?;
        Ok(state)
    }

    fn optimize(&mut self) {
        let weights = Arc::get_mut(&mut self.weights).expect("the fence has released them");
        let momentum = Arc::get_mut(&mut self.momentum).expect("the fence has released them");
        for (w, m) in weights.iter_mut().zip(momentum) {
            *m = 0.9 * *m + *w - 1.0;
            *w -= 0.01 * *m;
        }
        self.step += 1;
    }
}

fn main() -> ashore::Result<()> {
    let root = std::env::args().nth(1).unwrap_or_else(|| "ashore-example".into());
    let executor = CheckpointExecutor::builder(&root).arena(32 << 20).chunk(4 << 20).keep_last(2).build()?;
    let new = || vec![0.0; 1_000_000].into();
    let mut training = match executor.latest()? {
        Some(newest) => Training::restore(&newest)?,
        None => Training { step: 0, weights: new(), momentum: new() },
    };
    let first = training.step;
    for _ in 0..20 {
        if training.step.is_multiple_of(5) && training.step > first {
            drop(executor.save(training.step, training.state()?)?); // an error would come back from the next call
        }
        // Forward and backward would run here, while the stager copies.
        executor.fence()?;
        training.optimize();
    }
    executor.shutdown(Duration::from_secs(60))?;
    println!("went from step {first} to {}; the newest durable step is in {root}", training.step);
    Ok(())
}
