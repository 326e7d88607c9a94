//! The executor: takes state dicts, gives futures of durable checkpoints.
//!
//! Threads: one stages, a pool writes, one commits, one tidies up, one touches attempts, one calls functions of the program. They talk downwards through channels; what comes back are
//! leases and the completions of futures. The thread that calls `save` does not touch storage.

mod admission;
mod again;
mod builder;
mod deferred_save;
mod ending;
mod equipment;
mod place;
mod scope;
mod submit;
mod threads;
mod tidy;
mod touch;

pub use builder::Builder;
pub(crate) use deferred_save::DeferredSave;
pub use scope::{Fence, Scope};
pub(crate) use threads::Threads;

use crate::Catalog;
use crate::catalog::Found;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceReport;
use crate::error::Result;
use crate::fork::ForkGuard;
use crate::id::Attempts;
use crate::memory::Arena;
use crate::plan::Plan;
use crate::save::{Fenced, Save, SaveOptions};
use crate::settings::Settings;
use crate::staging::Stager;
use crate::state::{DeviceStream, StateDict};
use crate::storage::Storage;
use crate::sync::Mutex;
use equipment::Equipment;
use place::Place;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Saves state dicts under a root directory while the program goes on computing.
///
/// ```
/// use ashore::{CheckpointExecutor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # fn train(root: &std::path::Path, steps: u64) -> ashore::Result<()> {
/// let executor = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).build()?;
/// let (done, mut weights) = match executor.latest()? {
///     Some(newest) => (newest.step(), Arc::new(newest.read_as::<f32>("weights")?)),
///     None => (0, Arc::new(vec![0.0_f32; 1000])),
/// };
/// for step in done + 1..=steps {
///     // ... forward and backward read the weights ...
///     executor.fence()?; // from here on no save reads them
///     Arc::get_mut(&mut weights).unwrap().iter_mut().for_each(|weight| *weight += 1.0);
///     let mut state = StateDict::new();
///     state.tensor("weights", weights.clone())?.value("step", &step)?;
///     let save = executor.save(step, state)?; // returns at once
///     save.wait(Duration::from_secs(60))?; // or `.await`, or drop it and go on
/// }
/// executor.shutdown(Duration::from_secs(60))?;
/// # Ok(())
/// # }
/// # let dir = tempfile::tempdir().unwrap();
/// # let root = dir.path();
/// # for steps in [2, 3, 5] { train(root, steps)?; }
/// let newest = ashore::Catalog::open(root)?.latest()?.unwrap();
/// assert_eq!((newest.step(), newest.read_as::<f32>("weights")?[0]), (5, 5.0)); // after whatever restarts
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// Dropping it waits for saves in flight, for `shutdown_timeout` at most; errors are then only logged. Where a
/// function given to [`Save::on_done`], or a waker, drops the last owner, a thread of its own does so, which `main`
/// does not wait for.
#[derive(Debug)]
pub struct CheckpointExecutor {
    settings: Settings,
    storage: Arc<dyn Storage>,
    place: Arc<Place>,
    catalog: Arc<Catalog>,
    stager: Arc<Stager>,
    threads: Arc<Threads>,
    equipment: Equipment,
    /// The last plan; held by callers of `save` only, one at a time.
    admission: Mutex<Admission>,
    origin: ForkGuard,
    /// Saves that became durable: what was staged was compared with what was there at `save`.
    compared: Arc<AtomicU64>,
}

#[derive(Debug)]
struct Admission {
    plan: Option<Arc<Plan>>,
    /// Attempts are drawn ahead, because randomness is a system call.
    attempts: Attempts,
}

impl CheckpointExecutor {
    /// Begins to build an executor for checkpoints under `root`, a directory that is created when it is missing.
    pub fn builder(root: impl Into<PathBuf>) -> Builder {
        Builder::new(root.into())
    }

    /// Saves `state` as `step`. Returns at once: nothing but small tensors that the program may write has been copied then, and
    /// sources are read until the next [`fence`](Self::fence), or until [`Save::staged`] resolves.
    ///
    /// # Errors
    /// The error of an earlier save that nobody has seen. `Invalid`: a tensor cannot be captured as asked, or an earlier save
    /// of writable sources was not fenced. `Conflict`: a save of this step is under way. `Busy`: the overlap policy found no
    /// room within the save deadline, or the GPU none for what is to be captured or gathered there. Everything that happens later comes out of the future.
    pub fn save(&self, step: u64, state: StateDict<'static>) -> Result<Save> {
        self.save_with(step, state, SaveOptions::default())
    }

    /// [`save`](Self::save), with options.
    ///
    /// # Errors
    /// As `save`; `Invalid` when the name in the options is that of another step.
    pub fn save_with(&self, step: u64, state: StateDict<'static>, options: SaveOptions) -> Result<Save> {
        self.submit(step, state, options, false, |_| ())
    }

    /// Waits until nothing will be read any more from tensors of saves so far; they may be written then. One atomic load when
    /// no save is reading.
    ///
    /// # Errors
    /// `Deadline`: the saves that were still reading have been failed, and nothing more is read on the host. Copies that an
    /// asynchronous device was making cannot be taken back: the tensors may be written when `staged()` of those saves resolves.
    pub fn fence(&self) -> Result<()> {
        self.alive()?;
        self.stager.fence(self.settings.fence_timeout)
    }

    /// A future of [`fence`](Self::fence), for tasks that must not block their thread: nothing will be read any more from tensors of
    /// saves so far. A save that hangs ends it by its own deadline; nothing fails earlier, as at the deadline of `fence`.
    pub fn fenced(&self) -> Fenced {
        Fenced::new(self.alive().map(|()| self.stager.saves.reading()))
    }

    /// Makes `streams`, which will write tensors of saves so far, wait on the GPU for what still has to be read of them; the
    /// calling thread waits only until the copies of those saves are queued, which needs slabs. What other streams write must be
    /// ordered after one of these. Tensors in host memory may be written when it returns. One atomic load when no save is reading.
    ///
    /// # Errors
    /// As [`fence`](Self::fence); `Invalid` for a stream that is being captured into a graph, or of a device that this executor
    /// knows nothing of: nothing is ordered then. `Device`: the saves that were still reading have been failed.
    pub fn fence_on(&self, streams: &[DeviceStream]) -> Result<()> {
        self.alive()?;
        self.stager.fence_on(streams, self.settings.fence_timeout)
    }

    /// The newest durable step under the root, if there is one. Its tensors can be read into memory of the executor's device.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        self.alive()?;
        Ok(self.catalog.latest()?.map(|checkpoint| self.lend_device(checkpoint)))
    }

    /// The checkpoint of `step`; as [`latest`](Self::latest).
    ///
    /// # Errors
    /// `NotFound` when there is none: never another step.
    pub fn checkpoint(&self, step: u64) -> Result<Checkpoint> {
        self.alive()?;
        self.catalog.checkpoint(step).map(|checkpoint| self.lend_device(checkpoint))
    }

    /// The newest step all of whose bytes are what was written, and what was passed over; None when there is
    /// no step at all. Reads that step whole. A newer step that it finds damaged is replaced when its number
    /// is saved again: see [`OnDamaged`](crate::OnDamaged).
    ///
    /// # Errors
    /// As [`Catalog::latest_valid`].
    pub fn latest_valid(&self) -> Result<Option<Found>> {
        self.alive()?;
        let found = self.catalog.latest_valid()?;
        Ok(found.map(|found| Found { checkpoint: self.lend_device(found.checkpoint), skipped: found.skipped }))
    }

    pub(crate) fn lend_device(&self, checkpoint: Checkpoint) -> Checkpoint {
        Checkpoint { device: Some(self.stager.device.clone()), ..checkpoint }
    }

    /// All steps under the root.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Where steps are kept.
    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The device that copies, and why it is this one. With [`DeviceChoice::Auto`](crate::DeviceChoice) it may be `auto` until the first
    /// tensor of a GPU is saved.
    pub fn device(&self) -> &DeviceReport {
        self.equipment.report()
    }

    /// How files are written, as it really is: `pwrite`, `io_uring`, or what the storage says.
    pub fn engine(&self) -> &'static str {
        self.storage.engine()
    }

    /// The arena: what it got of the system, and how many slabs are free.
    pub fn arena(&self) -> &Arena {
        &self.stager.arena
    }

    /// Takes no more saves, waits for those in flight, ends the threads. What is there can still be read. Any
    /// owner of an `Arc` may call it, several at once too; called again it waits for what is left. The arena, and what it has of a
    /// device, are given back when the last owner drops it.
    ///
    /// # Errors
    /// The first error of a save that nobody has seen. `Deadline` when saves were unfinished at the deadline: they have
    /// failed then, and threads that hang in the storage are left behind: a later call waits for them, and the
    /// drop for as long as the last call did.
    /// `Invalid` in a function given to [`Save::on_done`], or a waker: their thread is one that has to end.
    pub fn shutdown(&self, timeout: Duration) -> Result<()> {
        self.alive()?;
        self.threads.shut_down(timeout)
    }

    /// The threads, which live as long as saves do.
    pub(crate) fn threads(&self) -> &Arc<Threads> {
        &self.threads
    }

    /// A save although admission is closed: the last of the program.
    pub(crate) fn save_at_the_end(&self, step: u64, state: StateDict<'static>) -> Result<Save> {
        self.submit(step, state, SaveOptions::default().last(), false, |_| ())
    }

    /// After a fork the threads are in the parent; the child can do nothing with this executor.
    pub(crate) fn alive(&self) -> Result<()> {
        self.origin.check("an executor cannot be used in a forked child; make a new one there")
    }
}

impl Drop for CheckpointExecutor {
    fn drop(&mut self) {
        if self.alive().is_err() {
            // Everything behind it belongs to the parent: descriptors, locks, threads that do not exist here.
            std::mem::forget(self.threads.clone());
            return;
        }
        self.threads.close_dropped(self.settings.shutdown_timeout);
    }
}
