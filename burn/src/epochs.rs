//! Combines the three checkpointers of burn's training loop into one.

use crate::record::{Record, packed, put_packed, record};
use ashore::catalog::Pruned;
use ashore::{CheckpointExecutor, Error, ErrorKind, PruneOptions, Result, SaveOptions, StateDict};
use burn::tensor::Bytes;
use burn::train::checkpoint::{Checkpoint, Checkpointer, CheckpointerError};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The number of records that burn saves per epoch: of the model, the optimizer and the scheduler.
const RECORDS: usize = 3;

/// burn's `Checkpointer` for model, optimizer and scheduler. The three records of an epoch become one durable
/// step, whose number is the number of the epoch. The step has the same form as a step of
/// [`Training`](crate::Training), which can restore it too.
///
/// Give clones of one `Epochs` to `SupervisedTraining::with_custom_checkpointers`, for all three. Create a
/// new `Epochs` for each training. burn calls the checkpointers in separate threads:
///
/// - **Saving.** The call that brings the last of the three records begins the save, and returns when the
///   step is durable. The training continues meanwhile, until it saves or deletes an epoch. An epoch is not
///   saved if one of its records cannot be packed. A step that exists is replaced.
/// - **Deleting.** An epoch that a strategy of burn deletes stays until another step is durable. Steps that
///   people have marked keep stay.
/// - **Failures** end the training, and are in the `error` of its result. When `launch` returns without an
///   error, the last epoch that was saved is durable.
///
/// ```
/// use ashore_burn::{Epochs, ashore::CheckpointExecutor};
/// use burn::train::{Learner, LearnerModel, LearningResult, SupervisedTraining};
/// use std::sync::Arc;
///
/// fn launch<M: LearnerModel>(
///     training: SupervisedTraining<M>,
///     learner: Learner<M>,
///     executor: Arc<CheckpointExecutor>,
/// ) -> ashore_burn::ashore::Result<LearningResult<M>> {
///     let epochs = Epochs::new(executor.clone());
///     let mut training = training.with_custom_checkpointers(epochs.clone(), epochs.clone(), epochs);
///     if let Some(newest) = executor.latest()? {
///         training = training.checkpoint(newest.step() as usize);
///     }
///     Ok(training.launch(learner))
/// }
/// ```
#[derive(Clone)]
pub struct Epochs(Arc<Shared>);

struct Shared {
    executor: Arc<CheckpointExecutor>,
    /// Records by epoch and name, of epochs that still lack a record. A record is None if it could not be
    /// packed.
    arrived: Mutex<BTreeMap<u64, Vec<(&'static str, Option<Bytes>)>>>,
    /// Epochs to delete once another step is durable. Locked while they are deleted, so that the save that
    /// ends next sees an epoch whose deletion was refused.
    doomed: Mutex<BTreeSet<u64>>,
}

impl Epochs {
    /// Creates the checkpointers of one training. `executor` saves its steps.
    pub fn new(executor: impl Into<Arc<CheckpointExecutor>>) -> Self {
        Self(Arc::new(Shared { executor: executor.into(), arrived: Mutex::default(), doomed: Mutex::default() }))
    }
}

impl<R: Record + Checkpoint> Checkpointer<R> for Epochs {
    fn save(&self, epoch: usize, record: R) -> std::result::Result<(), CheckpointerError> {
        let (packed, failure) = match packed(R::NAME, record) {
            Ok(packed) => (Some(packed), Ok(())),
            Err(error) => (None, Err(error)),
        };
        self.0.arrive(epoch as u64, R::NAME, packed).and(failure).map_err(failed)
    }

    fn delete(&self, epoch: usize) -> std::result::Result<(), CheckpointerError> {
        self.0.delete(Some(epoch as u64)).map_err(failed)
    }

    fn restore(&self, epoch: usize) -> std::result::Result<R, CheckpointerError> {
        self.0.executor.checkpoint(epoch as u64).and_then(|saved| record(&saved, R::NAME)).map_err(failed)
    }
}

impl Shared {
    fn arrive(&self, step: u64, name: &'static str, packed: Option<Bytes>) -> Result<()> {
        let mut arrived = locked(&self.arrived);
        let records = arrived.entry(step).or_default();
        records.push((name, packed));
        if records.len() < RECORDS {
            return Ok(());
        }
        let records = arrived.remove(&step).unwrap_or_default();
        drop(arrived);
        match records.into_iter().map(|(name, packed)| Some((name, packed?))).collect() {
            Some(records) => self.save(step, records),
            None => Ok(()),
        }
    }

    fn save(&self, step: u64, records: Vec<(&str, Bytes)>) -> Result<()> {
        let mut state = StateDict::new();
        for (name, packed) in records {
            put_packed(&mut state, name, packed)?;
        }
        let save = self.executor.save_with(step, state, SaveOptions::default().overwrite())?;
        // The save ends at its own deadline, the setting `save_timeout`.
        if save.wait(Duration::MAX)?.committed().is_none() {
            let what = "the executor skipped the save of an epoch: give `Epochs` an executor with `Overlap::Queue`";
            return Err(Error::new(ErrorKind::Cancelled, what).with_step(step));
        }
        self.delete(None)
    }

    /// Deletes an epoch, and the epochs whose deletion was refused before.
    fn delete(&self, step: Option<u64>) -> Result<()> {
        let mut doomed = locked(&self.doomed);
        doomed.extend(step);
        let mut result = Ok(());
        doomed.retain(|&step| {
            let deleted = self.executor.catalog().delete(step, PruneOptions::new()).and_then(Pruned::complete);
            match deleted.map_err(|e| (e.kind(), e)) {
                Ok(_) | Err((ErrorKind::NotFound, _)) => false,
                // The step is the only durable one, or is marked keep.
                Err((ErrorKind::Invalid, _)) => true,
                Err((_, error)) => {
                    result = Err(error);
                    true
                }
            }
        });
        result
    }
}

fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failed(error: ashore::Error) -> CheckpointerError {
    CheckpointerError::Unknown(format!("{error:#}"))
}
