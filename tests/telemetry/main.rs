//! What an executor tells of its saves. A program of its own, because a recorder of metrics is one for the
//! whole process.

mod costs;
mod metrics;
mod run_log;
mod scrape;
mod spans;
mod trace;

use ashore::{CheckpointExecutor, StateDict};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

fn executor(root: &Path) -> CheckpointExecutor {
    CheckpointExecutor::builder(root).arena(16 * 4096).chunk(4096).keep_last(2).build().unwrap()
}

fn state(bytes: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor("weights", Arc::new(vec![7_u8; bytes])).unwrap();
    state
}

fn save(executor: &CheckpointExecutor, step: u64) {
    let save = executor.save(step, state(20_000)).unwrap();
    executor.fence().unwrap();
    save.wait(LONG).unwrap();
}
