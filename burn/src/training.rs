//! Saves model, optimizer and scheduler of one moment as one step.

use crate::invalid;
use crate::record::{Record, located, put, record};
use ashore::{Checkpoint, Result, StateDict};
use burn::lr_scheduler::LrSchedulerRecord;
use burn::lr_scheduler::module_lr_scheduler::ModuleLrScheduler;
use burn::module::Module;
use burn::optim::{ModuleOptimizer, OptimizerRecord};
use burn::store::ModuleRecord;

/// The state from which a training resumes. Its three parts are saved together, and so are restored from the
/// same moment.
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
    /// Returns the state to save. The program may add more, for example the position in the data and random
    /// number states.
    ///
    /// This call reads the tensors from the device and packs them. The training may continue as soon as the
    /// call returns.
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

    /// Restores all three. Parameters get their saved ids, which are the keys of the optimizer's state, and
    /// their saved dtypes. Nothing is converted.
    ///
    /// # Errors
    /// As [`record`]; `Invalid`, naming the parameters, when the model has parameters that the checkpoint
    /// lacks, or the reverse, or a parameter has a different shape; `Invalid` when the optimizer or scheduler
    /// did not take all of its state, because it is of a different kind than the saved one.
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
