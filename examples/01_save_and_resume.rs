//! A training loop that can be killed at any moment and resumes from its newest durable step.
//!
//! Run `cargo run --example 01_save_and_resume -- runs/example` twice: the second run resumes the first one.

use ashore::{Checkpoint, CheckpointExecutor, HostTensor, StateDict};
use std::{path::Path, sync::Arc, time::Duration};

#[derive(Debug, PartialEq)]
pub(crate) struct Training {
    step: u64,
    weights: Arc<Vec<f32>>,
    momentum: Arc<Vec<f32>>,
}

impl Training {
    fn restore(from: &Checkpoint) -> ashore::Result<Self> {
        let [weights, momentum] = [from.read_as("weights")?.into(), from.read_as("momentum")?.into()];
        Ok(Self { step: from.step(), weights, momentum })
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

/// Trains `more` updates from the newest durable step. Saves at every fifth step and after the last update.
pub(crate) fn train(root: &Path, more: u64) -> ashore::Result<Training> {
    let executor = CheckpointExecutor::builder(root).arena(32 << 20).chunk(4 << 20).keep_last(2).build()?;
    let new = || Training { step: 0, weights: vec![0.0; 1_000_000].into(), momentum: vec![0.0; 1_000_000].into() };
    let mut training = executor.latest()?.map_or_else(|| Ok(new()), |newest| Training::restore(&newest))?;
    for left in (0..more).rev() {
        executor.fence()?; // forward and backward ran while the stager copied
        training.optimize();
        if training.step.is_multiple_of(5) || left == 0 {
            drop(executor.save(training.step, training.state()?)?); // the next call returns its error
        }
    }
    executor.shutdown(Duration::from_secs(60))?;
    Ok(training)
}

fn main() -> ashore::Result<()> {
    let root = std::env::args().nth(1).unwrap_or_else(|| "ashore-example".into());
    println!("step {} is in {root}", train(Path::new(&root), 20)?.step);
    Ok(())
}
