//! The metadata of a step that the engine has saved with several ranks. It is read from the tables of the
//! step, so no rank needs the plans of the others.

use super::plan::{ChunkStorageMetadata, Metadata, StorageMeta, StorageMetadata, TensorStorageMetadata, WriteResult};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::{MANIFEST, SliceEntry, TensorEntry};
use crate::outcome::Committed;
use crate::storage::Storage;
use serde_json::{Value, json};
use std::sync::Arc;

/// Reads the metadata of a durable step. Each result says, as torch's `_StorageInfo` does, in which file the
/// bytes are, and where in that file.
///
/// # Errors
/// `NotFound` when the step was deleted or replaced since; errors of the storage.
pub(super) fn metadata(
    storage: &Arc<dyn Storage>,
    committed: &Committed,
    planner_data: Option<Value>,
) -> Result<Metadata> {
    let name = committed.path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let checkpoint = Checkpoint::from_storage(storage.clone(), name)?;
    if checkpoint.attempt() != committed.attempt {
        let why = "the step was durable, and has been replaced since: its metadata is that of another save";
        return Err(Error::new(ErrorKind::NotFound, why).with_step(committed.step).with_path(&committed.path));
    }
    let contents = checkpoint.contents()?;
    let mut saved = Metadata { planner_data, ..Metadata::default() };
    for TensorEntry { name, dtype, shape, slices } in contents.tensors {
        let chunk = |slice: &SliceEntry| ChunkStorageMetadata { offsets: slice.at.clone(), sizes: slice.shape.clone() };
        let chunks = slices.iter().map(chunk).collect();
        let tensor = TensorStorageMetadata { dtype: *dtype, size: shape.clone(), chunks };
        saved.state_dict_metadata.insert(name.clone(), StorageMetadata::Tensor(tensor));
        let result = |slice: &SliceEntry| {
            let file = contents.files.get(slice.file).map_or("", |file| file.name.as_str());
            let storage_data = json!({ "file": file, "offset": slice.offset, "at": slice.at });
            WriteResult { fqn: name.clone(), size_in_bytes: slice.length, storage_data }
        };
        saved.storage_data.extend(slices.iter().map(result));
    }
    for name in checkpoint.value_names() {
        saved.state_dict_metadata.insert(name.to_owned(), StorageMetadata::Bytes);
        let storage_data = json!({ "file": MANIFEST });
        saved.storage_data.push(WriteResult { fqn: name.to_owned(), size_in_bytes: 0, storage_data });
    }
    let (checkpoint_id, save_id) = (committed.path.clone(), Some(committed.attempt.to_string()));
    saved.storage_meta = Some(StorageMeta { checkpoint_id, save_id });
    Ok(saved)
}
