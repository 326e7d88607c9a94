//! Model, optimizer and scheduler of one moment as one step.

use crate::invalid;
use crate::record::{Record, located, put, record};
use ashore::{Checkpoint, Result, StateDict};
use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::Module;
use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::store::ModuleRecord;

/// What a training resumes from. The three are saved together, and so restored from the same moment.
#[derive(Clone)]
pub struct Training<M> {
    /// Saved as `model`.
    pub model: M,
    /// Saved as `optimizer`.
    pub optimizer: ModuleOptimizer,
    /// Saved as `scheduler`.
    pub scheduler: ModuleLrScheduler,
}

impl<M: Module> Training<M> {
    /// Returns the state to save. The program may add more: the place in the data, its random numbers.
    ///
    /// The tensors are read from the device, and packed, in this call; the training may go on as soon as it
    /// returns.
    ///
    /// # Errors
    /// As [`put`].
    pub fn state(&self) -> Result<StateDict<'static>> {
        let mut state = StateDict::new();
        put(&mut state, ModuleRecord::NAME, self.model.clone().into_record())?;
        put(&mut state, OptimizerRecord::NAME, self.optimizer.to_record())?;
        put(&mut state, LrSchedulerRecord::NAME, self.scheduler.to_record())?;
        Ok(state)
    }

    /// Restores all three. Parameters get the ids that they had, which are the keys of the optimizer's state,
    /// and the dtypes that they had; nothing is converted.
    ///
    /// # Errors
    /// As [`record`]; `Invalid`, naming them, when the model has parameters that the checkpoint lacks, or the
    /// reverse, or a parameter has another shape; `Invalid` when optimizer or scheduler did not take all of
    /// their state: they are of another kind than those that were saved.
    pub fn restore(self, checkpoint: &Checkpoint) -> Result<Self> {
        let refused = |what: &str| located(checkpoint, invalid(what));
        let model = self.model.try_load_record(record::<ModuleRecord>(checkpoint, ModuleRecord::NAME)?);
        let model =
            model.map_err(|e| refused("the model is another one than that of the checkpoint").with_source(e))?;

        let saved: OptimizerRecord = record(checkpoint, OptimizerRecord::NAME)?;
        let tensors = saved.len();
        let optimizer = self.optimizer.load_record(saved);
        if optimizer.to_record().len() != tensors {
            return Err(refused("the optimizer is of another kind than that of the checkpoint"));
        }

        let saved: LrSchedulerRecord = record(checkpoint, LrSchedulerRecord::NAME)?;
        let scheduler = self.scheduler.load_record(saved.clone());
        let packed =
            |record: LrSchedulerRecord| record.into_bytes().map_err(|e| refused("cannot pack a record").with_source(e));
        if packed(scheduler.to_record())? != packed(saved)? {
            return Err(refused("the scheduler is of another kind than that of the checkpoint"));
        }
        Ok(Self { model, optimizer, scheduler })
    }
}
