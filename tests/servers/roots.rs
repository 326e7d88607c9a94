//! Storages over the servers, and states to save in them.

use crate::servers;
use ashore::storage::{ObjectStore, Storage};
use ashore::{Builder, CheckpointExecutor, HostTensor, StateDict};
use std::sync::Arc;
use std::time::Duration;

/// The root `prefix` in the bucket of the server of S3 at this URL.
pub fn on_s3(url: &str, prefix: &str) -> Arc<dyn Storage> {
    over(servers::s3(url, "bucket"), prefix)
}

/// The same on Azure.
pub fn on_azure(url: &str, prefix: &str) -> Arc<dyn Storage> {
    over(servers::azure(url, "bucket"), prefix)
}

/// An executor with a small arena.
pub fn executor(storage: Arc<dyn Storage>) -> Builder {
    let builder = CheckpointExecutor::builder("unused").storage(storage).alone();
    builder.arena(512 << 10).chunk(16 << 10).save_timeout(Duration::from_secs(60))
}

/// A state of 100 kB in which every number belongs to its step and place alone.
pub fn state(step: u64) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor("weights", HostTensor::new(Arc::new(numbers(step)), [numbers(step).len()])).unwrap();
    state.value("step", &step).unwrap();
    state
}

pub fn numbers(step: u64) -> Vec<u64> {
    (0..12_500).map(|at| step * 1_000_003 + at).collect()
}

/// The root `prefix` in a store that a test has opened. Requests are given up after seconds.
pub fn over<S: object_store::ObjectStore + object_store::multipart::MultipartStore>(
    store: S,
    prefix: &str,
) -> Arc<dyn Storage> {
    patient(store, prefix, Duration::from_secs(10))
}

/// The same, with another time after which requests are given up.
pub fn patient<S: object_store::ObjectStore + object_store::multipart::MultipartStore>(
    store: S,
    prefix: &str,
    patience: Duration,
) -> Arc<dyn Storage> {
    let root = ObjectStore::over(Arc::new(store), &format!("s3://bucket/{prefix}")).unwrap();
    Arc::new(root.patience(patience))
}
