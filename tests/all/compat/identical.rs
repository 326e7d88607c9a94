//! Every compatibility interface has one write path: it saves the bytes that the executor saves of the same
//! state.

use ashore::{Checkpoint, CheckpointExecutor, HostTensor, SaveOptions, StateDict};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// Every file below `path` and its bytes.
pub fn files(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let (mut found, mut folders) = (BTreeMap::new(), vec![path.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()) {
            let name = entry.strip_prefix(path).unwrap().to_str().unwrap().to_owned();
            if entry.is_dir() {
                found.insert(format!("{name}/"), Vec::new());
                folders.push(entry);
            } else {
                found.insert(name, std::fs::read(&entry).unwrap());
            }
        }
    }
    found
}

/// Saves the state of the checkpoint at `path` with an executor, under the same attempt, and compares the
/// directories byte by byte.
#[track_caller]
pub fn assert_saved_by_the_executor(path: &Path) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let mut state = StateDict::new();
    for tensor in checkpoint.tensors().unwrap() {
        let bytes = checkpoint.read(tensor.name).unwrap();
        state.tensor(tensor.name, HostTensor::with_dtype(bytes, tensor.dtype, tensor.shape)).unwrap();
    }
    for name in checkpoint.value_names() {
        state.value(name, &checkpoint.value::<serde_json::Value>(name).unwrap()).unwrap();
    }
    for key in checkpoint.metadata_keys() {
        state.metadata(key, &checkpoint.metadata::<serde_json::Value>(key).unwrap()).unwrap();
    }
    let root = tempfile::tempdir().unwrap();
    let executor = CheckpointExecutor::builder(root.path()).arena(1 << 20).chunk(1 << 16).build().unwrap();
    let options = SaveOptions::default().attempt(checkpoint.attempt()).name(checkpoint.name());
    let save = executor.save_with(checkpoint.step(), state, options).unwrap();
    save.wait(Duration::from_secs(60)).unwrap();
    let (theirs, ours) = (files(path), files(&root.path().join(checkpoint.name())));
    assert_eq!(theirs.keys().collect::<Vec<_>>(), ours.keys().collect::<Vec<_>>());
    for (name, bytes) in theirs {
        assert!(ours[&name] == bytes, "{name} differs");
    }
}
