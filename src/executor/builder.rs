//! Building an executor: settings, which are plain data, and components, which are not.
//!
//! # Safety argument
//! The one unsafe function calls nothing: it takes memory of a device, and its caller promises what the kernels that use it rely on.
#![expect(unsafe_code, reason = "takes memory for kernels; argument above")]

use super::equipment::{Equipment, Offer, Wish};
use super::place::Place;
use super::threads::{Lines, Threads};
use super::{Admission, CheckpointExecutor, ending, tidy, touch};
use crate::catalog::{Keeping, PreservationPolicy, Verify};
use crate::completion::Signal;
use crate::device::{Device, DeviceReport, LentMemory, choose_later};
use crate::error::{Error, Result};
use crate::fork::ForkGuard;
use crate::guard::dropped;
use crate::id::Attempts;
use crate::memory::{AlignedBuffer, Arena, Node, Pages, Register};
use crate::settings::{Detect, DeviceChoice, Engine, Locks, OnDamaged, OnUnseenError, Overlap, Priority, Settings};
use crate::staging::Stager;
use crate::storage::local::Local;
use crate::storage::{Storage, Sweep};
use crate::sync::Mutex;
use crate::thread::{adopt, spawn};
use crate::writer::{Pool, Task};
use crate::{Catalog, Retention, call_thread, own_threads};
use crossbeam_channel::{bounded, unbounded};
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Collects what an executor needs; [`Builder::build`] takes memory and starts threads.
#[derive(Debug)]
#[must_use = "nothing happens until `build`"]
pub struct Builder {
    root: PathBuf,
    settings: Settings,
    storage: Option<Arc<dyn Storage>>,
    /// Instead of the one that the settings choose.
    device: Option<Arc<dyn Device>>,
    /// For the scratch, and how much it is.
    lent: Option<(LentMemory, u64)>,
    /// What is kept beyond the retention of the settings.
    policy: Policy,
    /// How often live attempts are touched.
    pub(super) touch: Duration,
}

/// A policy, if there is one.
#[derive(Clone, Default)]
struct Policy(Option<Arc<dyn PreservationPolicy>>);

impl std::fmt::Debug for Policy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Policy({})", self.0.is_some())
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $name:ident: $type:ty),* $(,)?) => { $(
        $(#[$doc])*
        pub fn $name(mut self, $name: $type) -> Self {
            self.settings.$name = $name.into();
            self
        }
    )* };
}

impl Builder {
    pub(super) fn new(root: PathBuf) -> Self {
        let (settings, policy) = (Settings::default(), Policy::default());
        Self { root, settings, storage: None, device: None, lent: None, policy, touch: touch::TOUCH }
    }

    /// Replaces all settings.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    setters! {
        /// Size of the pinned arena in bytes: 256 MiB.
        arena: u64,
        /// Size of a chunk in bytes, a multiple of 4096: 8 MiB. Above 16 MiB on a GPU, what the program reads from it waits long.
        chunk: u64,
        /// Number of writer threads: 4.
        writers: usize,
        /// Number of shard files per save: 1.
        files: usize,
        /// Whether to ask for direct I/O: yes.
        direct: bool,
        /// How files are written: `Auto`.
        engine: Engine,
        /// How owner records are locked: by flock(2).
        locks: Locks,
        /// When an attempt of which no lock tells whether its owner is alive counts as abandoned: unchanged for a day.
        abandoned_after: Duration,
        /// How much writers give way to other threads: `Normal`.
        priority: Priority,
        /// What `save` does while earlier saves are unfinished: `Queue(1)`.
        overlap: Overlap,
        /// What becomes of errors of saves that no handle and no call has returned: the next `save` returns them.
        on_unseen_error: OnUnseenError,
        /// When to look for forgotten fences: for the first two saves.
        detect: Detect,
        /// Memory of the GPU, in bytes, in which small tensors are captured at `save`: 16 MiB. With 0 nothing is gathered.
        gather: u64,
        /// Memory of the GPU, in bytes, in which fences, and the ends of scopes, set aside what has not left it: 0, none. Of states
        /// that span devices nothing is set aside. Experimental.
        scratch: u64,
        /// Whether streams wait at fences for a number in memory, so that a save that fails lets them go: no. See
        /// [`Settings::memory_waits`].
        memory_waits: bool,
        /// Whether to queue the copies of a chunk from a GPU in one call, where its driver has that: no. Not measured yet.
        batch: bool,
        /// How much a save may copy on the calling thread, in bytes: 1 MiB.
        capture_budget: u64,
        /// Keep this many newest steps, and delete older ones after a commit. All are kept by default.
        keep_last: usize,
        /// Keep every step that is a multiple of this, beyond `keep_last`, without which it is refused.
        keep_every: u64,
        /// Whether a step that an earlier process wrote is read whole before it counts for `keep_last`: no.
        verify_kept: bool,
        /// What a save does about a damaged step of the same number: `Replace`.
        damaged: OnDamaged,
        /// A save that is not durable after so long fails: 30 minutes.
        save_timeout: Duration,
        /// A save that is still read when a fence has waited this long fails: 10 minutes.
        fence_timeout: Duration,
        /// How long dropping the executor waits for saves in flight: 5 minutes.
        shutdown_timeout: Duration,
    }

    /// Keeps steps that `policy` chooses, such as the [best](crate::catalog::Best), beyond those of
    /// `keep_last` and `keep_every`; without these, beyond the newest durable one.
    pub fn preserve(mut self, policy: impl PreservationPolicy + 'static) -> Self {
        self.policy = Policy(Some(Arc::new(policy)));
        self
    }

    /// Keeps checkpoints in `storage` instead of the root directory.
    pub fn storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.storage = Some(storage);
        self
    }

    /// Copies with this device: by default that of the tensors.
    pub fn device(mut self, choice: DeviceChoice) -> Self {
        (self.settings.device, self.device) = (choice, None);
        self
    }

    /// Copies with a device that exists already.
    #[doc(hidden)]
    pub fn made_device(mut self, device: Arc<dyn Device>) -> Self {
        self.device = Some(device);
        self
    }

    /// Sets aside in memory of the program's own, so that its own allocator accounts for it: `bytes` bytes at `address` on the device
    /// `ordinal`, which must be that of the executor, instead of as many as [`Builder::scratch`] says.
    ///
    /// # Safety
    /// Until `keep_alive` is dropped, the memory stays allocated in the primary context of that device, any stream may read and write
    /// it, and nobody else does; work of the program's that uses it has ended when [`Builder::build`] is called. `keep_alive` is dropped,
    /// by any thread, when the executor has ended, or could not be built, and nothing on the device will use the memory any more; where
    /// that is not known in time, never.
    pub unsafe fn scratch_in(
        mut self,
        ordinal: u32,
        address: u64,
        bytes: u64,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        self.lent = Some((LentMemory { ordinal, address, keep_alive: Box::new(keep_alive) }, bytes));
        self
    }

    /// Creates the root if it is missing, takes the arena, starts the threads, and sweeps what dead processes left behind.
    ///
    /// # Errors
    /// `Invalid`, naming the setting; errors of the storage and of the device; `Busy` when there are no threads to be had.
    pub fn build(self) -> Result<CheckpointExecutor> {
        let Self { root, mut settings, storage, device, lent, policy, touch } = self;
        settings.scratch = lent.as_ref().map_or(settings.scratch, |(_, bytes)| *bytes);
        settings.check()?;
        let storage = match storage {
            Some(storage) => storage,
            None => Arc::new(Local::open_with(&root, settings.engine)?.direct(settings.direct).locks(settings.locks)),
        };
        let (device, report) = match device {
            Some(device) => {
                let report = DeviceReport::new(device.as_ref(), "as it was given".into());
                (device, report)
            }
            None => choose_later(settings.device, lent.as_ref().map(|(lent, _)| lent.ordinal))?,
        };
        let lent = lent.map(|(lent, bytes)| fits(lent, bytes, device.as_ref())).transpose()?;
        let signal = Arc::new(Signal::default());
        let arena =
            Arena::new(settings.arena, settings.chunk, &Both(device.as_ref(), storage.as_ref()), signal.clone())?;
        let mut pool = Pool::start(settings.writers, arena.report().slabs, settings.priority, &signal)?;
        let wish = Wish::new(&settings, lent, &arena.report().pinned);
        let (equipment, Offer { scratch, waits, batch }) = Equipment::of(device.as_ref(), report, wish);
        let at_most = (settings.overlap == Overlap::Latest).then_some(2);
        let stager = Arc::new(Stager::new(signal.clone(), arena, device, at_most, batch));
        stager.offer(scratch, waits);
        let catalog = Arc::new(Catalog::over(storage.clone()));
        let priority = settings.priority;
        let sweep = Sweep::default().older_than(settings.abandoned_after);
        let keeping = Keeping {
            retention: Retention { keep_last: settings.keep_last, keep_every: settings.keep_every },
            policy: policy.0,
            verify: if settings.verify_kept { Verify::All } else { Verify::No },
        };
        let place = Arc::new(Place { storage: storage.clone(), catalog: catalog.clone(), damaged: settings.damaged });

        let (ended, endings) = unbounded::<Arc<Task>>();
        // Bounded, because what waits holds descriptors and room on the medium.
        let (leftovers, leavings) = bounded(tidy::LAG);
        let executor = CheckpointExecutor {
            catalog: catalog.clone(),
            stager: stager.clone(),
            threads: Arc::new(Threads::new(stager.clone())),
            admission: Mutex::new(Admission { plan: None, attempts: Attempts::new() }),
            origin: ForkGuard::new(),
            compared: Arc::default(),
            storage: storage.clone(),
            place,
            equipment,
            settings,
        };
        let (place, steps, compared) = (storage.clone(), catalog.clone(), executor.compared.clone());
        let (staging, committing, tidying) = (signal.clone(), signal.clone(), signal);
        let stages = stager.clone();
        let commit = move || {
            own_threads::mark(&committing);
            adopt(priority);
            let mut manifest = AlignedBuffer::new(0);
            for task in endings {
                let left = ending::conclude(&task, &stages, place.as_ref(), &steps, &compared, &mut manifest);
                dropped(task);
                if let Some(left) = left {
                    // Waits while tidying is behind. Refused by a thread that is gone: then the next process sweeps.
                    dropped(leftovers.send(left));
                }
            }
        };
        // Attempts are touched until the last is tidied up.
        let (alive, ended_tidying) = bounded(0);
        let touched = storage.clone();
        let tidy = move || {
            own_threads::mark(&tidying);
            adopt(priority);
            tidy::run(&leavings, storage.as_ref(), &catalog, &keeping, sweep);
            drop(alive);
        };
        let calling = spawn(call_thread::NAME.into(), stager.calls.body())?;
        let stage = move || {
            own_threads::mark(&staging);
            stager.run();
        };
        let mut handles = std::mem::take(&mut pool.threads);
        handles.push(spawn("ashore-stage".into(), stage)?);
        handles.push(spawn("ashore-commit".into(), commit)?);
        handles.push(spawn("ashore-tidy".into(), tidy)?);
        handles.push(spawn("ashore-touch".into(), move || touch::run(&ended_tidying, touched.as_ref(), touch))?);
        executor.threads.keep(Lines { pool, ended }, handles, calling);
        Ok(executor)
    }
}

/// Makes sure that memory that was handed in can be the scratch of this device.
fn fits(lent: LentMemory, bytes: u64, device: &dyn Device) -> Result<LentMemory> {
    let (ordinal, address, name) = (lent.ordinal, lent.address, device.name());
    let why = if name != format!("cuda:{ordinal}") {
        "the memory for the scratch is not of the device of the executor"
    } else if address == 0 || bytes == 0 || address.checked_add(bytes).is_none() {
        "the memory for the scratch is no memory"
    } else {
        return Ok(lent);
    };
    let memory = format!("scratch={bytes} address={address:#x} memory=cuda:{ordinal} device={name}");
    Err(Error::invalid(format!("{why} {memory}")))
}

/// One buffer that the device copies to and the storage writes from.
struct Both<'a>(&'a dyn Device, &'a dyn Storage);

impl Register for Both<'_> {
    fn register(&self, pages: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new((self.0.register(pages)?, self.1.register(pages))))
    }

    fn node(&self) -> Result<Node, String> {
        self.0.node()
    }
}
