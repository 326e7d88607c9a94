//! Deltas between complete steps, without a chain: for tools.

use super::copying::commit;
use super::encoding::{Held, encode};
use super::inventory::Inventory;
use super::reading::{Delta, manifest_head};
use super::weights::Weights;
use crate::checkpoint::Checkpoint;
use crate::delta::{Form, is_delta};
use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::save::SaveOptions;
use crate::state::{HostTensor, StateDict};
use crate::storage::local::Local;
use crate::storage::{Reading, Storage};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// The length of a delta, and of the step that it describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The version that results from the delta.
    pub version: u64,
    /// How many elements changed.
    pub changed: u64,
    /// The length of its files.
    pub bytes: u64,
    /// The length of the tensors of the step.
    pub full_bytes: u64,
}

/// Writes the delta from the step `base` to the step `step` as the directory `to`.
///
/// # Errors
/// `Invalid` when the steps differ in names, dtypes or shapes, or `step` is not later than `base`; `Conflict`
/// when the directory exists.
pub fn delta_file(base: &Path, step: &Path, form: Form, to: &Path) -> Result<Report> {
    let (old, new) = (Checkpoint::open(base)?, Checkpoint::open(step)?);
    let (old, new) = (held(&old)?, (held(&new)?, new));
    let refuse = |what: String| Err(Error::invalid(what).with_step(new.1.step()).with_path(step));
    if old.holding.version >= new.1.step() {
        return refuse(format!("a delta leads to a later step base={}", old.holding.version));
    }
    if !old.inventory.is_like(&new.0.inventory) {
        return refuse("the two steps differ in names, dtypes or shapes; a delta needs them equal".into());
    }
    let delta = encode(&old, &new.0, &new.1, form)?;
    let (storage, name) = place(to)?;
    commit(&storage, &name, new.1.attempt(), |to| delta.write(to))?.settle()?;
    let (version, full_bytes) = (new.1.step(), new.0.inventory.bytes());
    Ok(Report { version, changed: delta.changed(), bytes: delta.bytes(), full_bytes })
}

/// Applies deltas to the step `base`, in the given order, and writes the result as the step `to`.
///
/// # Errors
/// `Invalid` when a delta was made for another base, `Corrupt` when a delta is damaged; `Conflict` when the
/// directory exists. Nothing is written then.
pub fn apply_files<P: AsRef<Path>>(base: &Path, deltas: &[P], to: &Path) -> Result<Report> {
    let step = Checkpoint::open(base)?;
    let mut weights = Weights::new();
    weights.load(&step, Inventory::of(&step)?.0)?;
    let (mut report, mut state) =
        (Report { version: step.step(), changed: 0, bytes: 0, full_bytes: 0 }, StateDict::new());
    (state.metadata, state.values) = (step.manifest().metadata.clone(), step.manifest().values.clone());
    for path in deltas {
        let path = path.as_ref();
        let (storage, name) = place(path)?;
        let reading: Arc<dyn Reading> = storage.open(&name)?;
        if !is_delta(&manifest_head(reading.as_ref())?) {
            return Err(Error::invalid("the directory is not a delta").with_path(path));
        }
        let delta = Delta::read(reading.as_ref(), path, weights.inventory())?;
        let after = weights.check(&delta)?;
        weights.apply(&delta, after)?;
        report.version = delta.manifest.number;
        report.changed += delta.manifest.tensors.iter().map(|entry| entry.changed).sum::<u64>();
        report.bytes += delta.manifest.bytes;
        (state.metadata, state.values) = (delta.manifest.metadata, delta.manifest.values);
    }
    let attempt = weights.holding().map(|holding| holding.attempt);
    let (inventory, memory) = weights.into_memory();
    report.full_bytes = inventory.bytes();
    let own = inventory.tensors.iter().enumerate().filter(|(number, tensor)| tensor.holder == *number);
    for ((_, tensor), bytes) in own.zip(memory.into_iter().filter({
        let mut holders = inventory.tensors.iter().enumerate().map(|(number, tensor)| tensor.holder == number);
        move |_| holders.next().unwrap_or(false)
    })) {
        state.tensor(tensor.name.clone(), HostTensor::from_owner(bytes, tensor.dtype, &tensor.shape))?;
    }
    for (number, tensor) in inventory.tensors.iter().enumerate().filter(|(number, tensor)| tensor.holder != *number) {
        debug_assert!(tensor.holder < number);
        state.alias(tensor.name.clone(), &inventory.tensors[tensor.holder].name)?;
    }
    // The storage is opened here, because an executor without a storage would create a missing root.
    let (storage, name) = place(to)?;
    let parent = storage.path();
    let builder =
        CheckpointExecutor::builder(parent).alone().no_tier_from_env().storage(Arc::new(storage)).arena(64 << 20);
    // The directory belongs to the user.
    let executor = builder.run_log(false).build()?;
    let mut options = SaveOptions::default().directory(to);
    options.attempt = attempt;
    let saved = executor.save_with(report.version, state, options)?.wait(Duration::from_secs(24 * 3600));
    saved.map_err(|error| error.with_path(name))?;
    executor.shutdown(Duration::from_secs(60))?;
    Ok(report)
}

/// A step in memory.
fn held(step: &Checkpoint) -> Result<Held> {
    let (inventory, _) = Inventory::of(step)?;
    let holding = super::listing::holding(step, &inventory);
    let mut weights = Weights::new();
    weights.load(step, inventory)?;
    Ok(Held::read(weights, holding, step.bytes()))
}

/// The storage and the name of a directory.
fn place(path: &Path) -> Result<(Local, String)> {
    let named = || Error::invalid("a directory of a version needs a name in UTF-8").with_path(path);
    let path = std::path::absolute(path).map_err(|e| Error::io("cannot tell where the directory is", e))?;
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(named)?.to_owned();
    Ok((Local::at(path.parent().ok_or_else(named)?)?, name))
}
