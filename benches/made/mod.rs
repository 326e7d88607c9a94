//! States for the benches.
#![allow(dead_code, reason = "no bench needs all of it")]

use ashore::storage::Storage;
use ashore::{Builder, CheckpointExecutor, HostTensor, Overlap, StateDict};
use std::sync::Arc;
use std::time::Duration;

#[path = "../../cli/src/bench/null.rs"]
pub mod null;

pub const LONG: Duration = Duration::from_secs(600);

/// Names as long as those of real models.
pub fn names(tensors: usize) -> Vec<String> {
    (0..tensors).map(|i| format!("model.layers.{}.mlp.experts.{}.weight", i / 64, i % 64)).collect()
}

/// One tensor of `data` under each name.
pub fn state(names: &[String], data: &Arc<Vec<f32>>) -> StateDict<'static> {
    let mut state = StateDict::with_capacity(names.len());
    for name in names {
        state.tensor(name.as_str(), HostTensor::new(data.clone(), [data.len()])).expect("a good tensor");
    }
    state
}

/// An executor that saves one step after the other, through an arena that is larger than most states here.
pub fn builder(storage: Arc<dyn Storage>) -> Builder {
    CheckpointExecutor::builder("elsewhere").storage(storage).arena(128 << 20).overlap(Overlap::Block)
}
