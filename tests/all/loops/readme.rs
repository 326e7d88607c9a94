use ashore::{CheckpointExecutor, HostTensor, Result, StateDict, Targets};
use std::{path::Path, sync::Arc, time::Duration};

/// Trains up to `steps` updates, from the newest durable step or from nothing.
pub fn train(root: &Path, steps: u64) -> Result<Arc<Vec<f32>>> {
    let executor = CheckpointExecutor::builder(root).arena(256 << 20).keep_last(3).build()?;
    let (mut done, mut weights) = (0, Arc::new(vec![0.0_f32; 1024 * 1024]));
    if let Some(found) = executor.latest_valid()? {
        let newest = found.checkpoint; // the newest step that is sound; `found.skipped` says what is wrong with newer ones
        newest.read_into(Targets::new().elements("weights", Arc::get_mut(&mut weights).unwrap()))?;
        done = newest.step();
    }
    for step in done + 1..=steps {
        let gradient = weights[0] * 0.5 + 1.0; // forward and backward, which only read the weights
        executor.fence()?; // the last save has read the weights: they may be written
        Arc::get_mut(&mut weights).unwrap().iter_mut().for_each(|weight| *weight -= gradient);
        // The weights after `step` updates are step `step`: a restart goes on with the next update.
        let mut state = StateDict::new();
        state.tensor("weights", HostTensor::new(weights.clone(), [1024, 1024]))?.value("learning_rate", &0.1)?;
        drop(executor.save(step, state)?); // returns at once; `.await` it, or `.wait(...)`, to know that it is durable
    }
    executor.shutdown(Duration::from_secs(60))?; // waits for the last saves, and returns an error that no call has returned
    Ok(weights)
}
