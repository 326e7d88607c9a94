//! The executor: it takes state dicts and returns futures of durable checkpoints.
//!
//! The threads are the stager, the pool of writers, the committer, the tidying thread, the touch thread,
//! which touches attempts, and the call thread, which calls functions of the program. Channels carry work
//! downstream; leases and completions of futures return. The thread that calls `save` does not touch storage.

mod admission;
mod again;
mod builder;
mod deferred_save;
mod destination;
mod ending;
mod equipment;
mod history;
mod meeting;
mod ranks;
mod scope;
mod scrub;
mod submit;
mod telling;
mod threads;
mod tidy;
mod together;
mod touch;

pub use builder::Builder;
pub(crate) use deferred_save::DeferredSave;
pub use scope::{Fence, Scope};
pub(crate) use threads::Threads;
pub(crate) use together::Together;

use crate::Catalog;
use crate::catalog::Found;
use crate::checkpoint::Checkpoint;
use crate::device::DeviceReport;
use crate::error::{Error, Result};
use crate::fork::ForkGuard;
use crate::id::Attempts;
use crate::memory::Arena;
use crate::plan::Plan;
use crate::ranks::Member;
use crate::save::{Fenced, Save, SaveOptions};
use crate::settings::Settings;
use crate::staging::Stager;
use crate::state::{DeviceStream, StateDict};
use crate::storage::Storage;
use crate::sync::Mutex;
use crate::tiers::{Behind, TierReport};
use destination::Destination;
use equipment::Equipment;
use history::History;
use ranks::{Described, Turns};
use serde::de::DeserializeOwned;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Saves state dicts under a root directory while the program continues to compute.
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
/// Dropping the executor waits for saves in flight, for `shutdown_timeout` at most. Errors are then only
/// logged. If a function given to [`Save::on_done`], or a waker, drops the last owner, a separate thread
/// waits instead, and `main` does not wait for that thread.
#[derive(Debug)]
pub struct CheckpointExecutor {
    settings: Settings,
    storage: Arc<dyn Storage>,
    destination: Arc<Destination>,
    catalog: Arc<Catalog>,
    stager: Arc<Stager>,
    threads: Arc<Threads>,
    equipment: Equipment,
    /// The ranks that save together. None: this process saves alone.
    turns: Option<Turns>,
    /// The last plan. Callers of `save` lock it one at a time.
    admission: Mutex<Admission>,
    /// The tiers behind the root.
    behind: Option<Arc<Behind>>,
    origin: ForkGuard,
    /// Number of durable saves whose staged bytes were compared with the digests taken at `save`.
    compared: Arc<AtomicU64>,
    history: Arc<History>,
}

#[derive(Debug)]
struct Admission {
    plan: Option<Arc<Plan>>,
    /// The tensors that the plan took for frozen.
    still: Arc<[bool]>,
    /// The description that the plan was made from, if several ranks made it.
    described: Option<Described>,
    /// Identities of attempts, generated ahead because randomness is a system call.
    attempts: Attempts,
}

impl CheckpointExecutor {
    /// Returns a builder of an executor for checkpoints under `root`, a directory that is created if it is
    /// missing.
    pub fn builder(root: impl Into<PathBuf>) -> Builder {
        Builder::new(root.into())
    }

    /// Saves `state` as `step` and returns at once. By then only small tensors that the program may write
    /// were copied. The executor reads the other sources until the next [`fence`](Self::fence), or until
    /// [`Save::staged`] resolves.
    ///
    /// # Errors
    /// The error of an earlier save that no handle and no call has returned. `Invalid`: a tensor cannot be
    /// captured as requested, or an earlier save of writable sources was not fenced. `Conflict`: a save of
    /// this step is under way. `Busy`: the overlap policy required earlier saves to end, and they had not
    /// ended by the save deadline; or the capture pool of the GPU has no space for the tensors to capture or
    /// gather. The future returns all later errors.
    pub fn save(&self, step: u64, state: StateDict<'static>) -> Result<Save> {
        self.save_with(step, state, SaveOptions::default())
    }

    /// [`save`](Self::save), with options.
    ///
    /// # Errors
    /// As `save`; `Invalid` when the name in the options belongs to another step.
    pub fn save_with(&self, step: u64, state: StateDict<'static>, options: SaveOptions) -> Result<Save> {
        self.submit(step, state, options, false, |_| ())
    }

    /// Waits until no save so far will read its tensors any more. After that the program may write the
    /// tensors. Costs one atomic load if no save is reading.
    ///
    /// # Errors
    /// `Deadline`: the saves that were still reading have failed, and the host reads nothing more. Copies
    /// that an asynchronous device has begun cannot be cancelled: the tensors may be written when `staged()`
    /// of those saves resolves.
    pub fn fence(&self) -> Result<()> {
        self.alive()?;
        self.stager.fence(self.settings.fence_timeout)
    }

    /// Returns a future of [`fence`](Self::fence), for tasks that must not block their thread. The future
    /// resolves when no save so far will read its tensors any more. Unlike `fence`, it has no deadline and
    /// fails no save: when a save hangs, that save's own deadline ends the future.
    pub fn fenced(&self) -> Fenced {
        Fenced::new(self.alive().map(|()| self.stager.saves.reading()))
    }

    /// Makes `streams`, which will write tensors of saves so far, wait on the GPU for the remaining reads.
    /// The calling thread waits only until the copies of those saves are queued, which needs slabs. Writes in
    /// other streams must be ordered after one of `streams`. Tensors in host memory may be written when this
    /// call returns. Costs one atomic load if no save is reading.
    ///
    /// # Errors
    /// As [`fence`](Self::fence). `Invalid`: a stream is being captured into a graph, or belongs to a device
    /// unknown to this executor; no stream is made to wait then. `Device`: the saves that were still reading
    /// have failed.
    pub fn fence_on(&self, streams: &[DeviceStream]) -> Result<()> {
        self.alive()?;
        self.stager.fence_on(streams, self.settings.fence_timeout)
    }

    /// Returns the newest durable step under the root, if there is one. Its tensors can be read into memory
    /// of the executor's device.
    ///
    /// With [tiers](crate::tiers) this is the newest step of all tiers, from the nearest tier whose copy can
    /// be opened: [`Checkpoint::tier`] names that tier. Where two tiers have different attempts at a step,
    /// the attempt of the farthest tier counts. Steps of the root that the job redid elsewhere do not count.
    /// A tier that is away is left out, with a warning. With several ranks, a tier that rank 0 has taken over
    /// is never left out, so that all ranks find the same step.
    ///
    /// # Errors
    /// Errors of the storage. If no step is found and a tier is away, the reason for that.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        self.alive()?;
        let latest = match &self.behind {
            None => self.catalog.latest(),
            Some(behind) => behind.latest(&self.catalog),
        };
        Ok(latest?.map(|checkpoint| self.lend_device(checkpoint)))
    }

    /// Returns the checkpoint of `step`. Its tensors can be read like those of [`latest`](Self::latest).
    ///
    /// # Errors
    /// `NotFound` if the step does not exist: another step is never returned.
    pub fn checkpoint(&self, step: u64) -> Result<Checkpoint> {
        self.alive()?;
        let found = match &self.behind {
            None => self.catalog.checkpoint(step),
            Some(behind) => behind.checkpoint(&self.catalog, step),
        };
        found.map(|checkpoint| self.lend_device(checkpoint))
    }

    /// Returns the newest step whose bytes are all as written, and the newer steps that were skipped. None if
    /// there is no step. Reads that step whole. A newer step that is found damaged is replaced when its
    /// number is saved again: see [`OnDamaged`](crate::OnDamaged).
    ///
    /// # Errors
    /// As [`Catalog::latest_valid`].
    pub fn latest_valid(&self) -> Result<Option<Found>> {
        self.alive()?;
        let found = match &self.behind {
            None => self.catalog.latest_valid()?,
            Some(behind) => behind.latest_valid(&self.catalog)?,
        };
        Ok(found.map(|found| Found { checkpoint: self.lend_device(found.checkpoint), skipped: found.skipped }))
    }

    /// Decodes the value `name` that this rank stored in `checkpoint` for itself with
    /// [`StateDict::rank_value`]. It is for a job that continues with the same number of ranks.
    ///
    /// ```
    /// # use ashore::{CheckpointExecutor, StateDict};
    /// # use std::time::Duration;
    /// # let root = tempfile::tempdir().unwrap();
    /// # let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).build()?;
    /// let mut state = StateDict::new();
    /// state.rank_value("next_sample", &4096_u64)?;
    /// executor.save(1, state)?.wait(Duration::from_secs(60))?;
    /// let checkpoint = executor.latest()?.expect("a step");
    /// assert_eq!(executor.rank_value::<u64>(&checkpoint, "next_sample")?, 4096);
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// # Errors
    /// `Invalid`, with both numbers, when another number of ranks saved the step: values of ranks that are
    /// gone would be lost silently. The program decides what to do with them, with
    /// [`Checkpoint::rank_values`]. Otherwise as [`Checkpoint::rank_value`].
    pub fn rank_value<T: DeserializeOwned>(&self, checkpoint: &Checkpoint, name: &str) -> Result<T> {
        let member = self.turns.as_ref().map_or(Member::ALONE, Turns::member);
        if checkpoint.world() != member.world {
            let what = "another number of ranks kept this value: read those of all ranks with \
                        `Checkpoint::rank_values`, and share them out";
            let (saved, ranks) = (checkpoint.world(), member.world);
            let error = Error::invalid(format!("{what} value={name:?} ranks={ranks} saved_by_ranks={saved}"));
            return Err(checkpoint.located(error));
        }
        checkpoint.rank_value(member.rank, name)
    }

    pub(crate) fn lend_device(&self, checkpoint: Checkpoint) -> Checkpoint {
        Checkpoint { device: Some(self.stager.device.clone()), ..checkpoint }
    }

    /// Reports what each tier behind the root has and lacks. Empty if there are no tiers, or if another rank
    /// promotes.
    pub fn tiers(&self) -> Vec<TierReport> {
        self.behind.as_ref().map_or_else(Vec::new, |behind| behind.report())
    }

    /// The catalog of all steps under the root.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// The storage of the steps.
    pub(crate) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The device that copies, and why it was chosen. With [`DeviceChoice::Auto`](crate::DeviceChoice) it may
    /// be `auto` until the first tensor in GPU memory is saved.
    pub fn device(&self) -> &DeviceReport {
        self.equipment.report()
    }

    /// The engine in use: `pwrite`, `io_uring`, or the storage's own name for its engine.
    pub fn engine(&self) -> &'static str {
        self.storage.engine()
    }

    /// The arena: its memory as the system granted it, and the number of free slabs.
    pub fn arena(&self) -> &Arena {
        &self.stager.arena
    }

    /// Stops taking saves, waits for saves in flight and for promotions to tiers, and ends the threads.
    /// Checkpoints can still be read. Any owner of an `Arc` may call it, and several may call it at once; a
    /// second call waits for the remaining work. The arena and resources of a device are released when the
    /// last owner drops the executor.
    ///
    /// # Errors
    /// The first error of a save that no handle and no call has returned. `Deadline`: saves had not ended by
    /// the deadline, and have failed; or their steps are durable in the root and were not promoted, and the
    /// message names tiers, roots and steps. Threads that hang in the storage are left running: a later call
    /// waits for them, and the drop waits as long as the last call did. `Invalid` in a function given to
    /// [`Save::on_done`], or in a waker: the call would wait for its own thread.
    pub fn shutdown(&self, timeout: Duration) -> Result<()> {
        self.alive()?;
        self.threads.shut_down(timeout)
    }

    /// The threads, which live as long as saves do.
    pub(crate) fn threads(&self) -> &Arc<Threads> {
        &self.threads
    }

    /// Saves `state` even if admission is closed, as the last save of the program.
    pub(crate) fn save_at_the_end(&self, step: u64, state: StateDict<'static>) -> Result<Save> {
        self.submit(step, state, SaveOptions::default().last(), false, |_| ())
    }

    /// Refuses use in a forked child: only the parent has the threads.
    pub(crate) fn alive(&self) -> Result<()> {
        self.origin.check("an executor cannot be used in a forked child; make a new one there")
    }
}

impl Drop for CheckpointExecutor {
    fn drop(&mut self) {
        if self.alive().is_err() {
            // The parent owns everything here: descriptors, locks, and threads that this process does not
            // have.
            std::mem::forget(self.threads.clone());
            return;
        }
        self.threads.close_dropped(self.settings.shutdown_timeout);
    }
}
