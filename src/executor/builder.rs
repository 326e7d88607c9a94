//! The builder of an executor: it takes settings, which are plain data, and components, which are not.
//!
//! # Safety argument
//! The one unsafe function makes no unsafe call. It takes an address in GPU memory, and its caller promises
//! the properties that the kernels using that memory rely on.
#![expect(unsafe_code, reason = "takes memory for kernels; argument above")]

use super::destination::{Destination, Elsewhere};
use super::ending::{Committing, Leftover};
use super::equipment::{Equipment, Offer, Wish};
use super::history::History;
use super::meeting::{self, Ranks};
use super::ranks::{self, Called, Rounds, Wanted};
use super::threads::{Channels, Commits, Threads};
use super::{Admission, CheckpointExecutor, ending, telling, tidy, touch};
use crate::catalog::{Hold, Keeping, PreservationPolicy, Verify};
use crate::commit::several::Group;
use crate::commit::{self, several};
use crate::completion::Signal;
use crate::device::{Device, DeviceReport, ProgramMemory, choose_later};
use crate::error::{Error, Result};
use crate::fork::ForkGuard;
use crate::guard::dropped;
use crate::memory::{AlignedBuffer, Arena, Node, Pages, Register};
use crate::ranks::Coordinator;
use crate::settings::{Detect, DeviceChoice, Engine, Locks, OnDamaged, OnUnseenError, Overlap, Priority, Settings};
use crate::staging::Stager;
use crate::storage::{self, Storage, Sweep, Writers};
use crate::sync::Mutex;
use crate::thread::{adopt, spawn};
use crate::tiers::{Behind, Note, Tier};
use crate::writer::{Pool, Task};
use crate::{Catalog, Retention, call_thread, own_threads, telemetry};
use crossbeam_channel::{Receiver, bounded, unbounded};
use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// Collects the settings and components of an executor; [`Builder::build`] allocates memory and starts
/// threads.
///
/// ```
/// use ashore::{CheckpointExecutor, Overlap};
/// # let root = tempfile::tempdir().unwrap();
/// let executor = CheckpointExecutor::builder(root.path())
///     .arena(64 << 20)
///     .chunk(4 << 20)
///     .overlap(Overlap::Latest)
///     .keep_last(3)
///     .build()?;
/// assert_eq!(executor.arena().report().slabs, 16);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "nothing happens until `build`"]
pub struct Builder {
    root: PathBuf,
    settings: Settings,
    storage: Option<Arc<dyn Storage>>,
    /// The device that replaces the one chosen by the settings.
    device: Option<Arc<dyn Device>>,
    /// The program's memory for the scratch, with its size in bytes.
    given: Option<(ProgramMemory, u64)>,
    /// Keeps steps beyond the retention of the settings.
    policy: Policy,
    /// How often live attempts are touched.
    touch: Duration,
    ranks: Ranks,
    run: Option<String>,
    tiers: Vec<Tier>,
    no_tier_from_env: bool,
}

/// An optional policy.
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
        let (touch, ranks, run, tiers) = (touch::TOUCH_INTERVAL, Ranks::Unsaid, None, Vec::new());
        let (storage, device, given, no_tier_from_env) = (None, None, None, false);
        Self { root, settings, storage, device, given, policy, touch, ranks, run, tiers, no_tier_from_env }
    }

    /// Replaces all settings.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    setters! {
        /// Sets the size of the pinned arena in bytes. Default: 256 MiB.
        arena: u64,
        /// Sets the size of a chunk in bytes, a multiple of 4096. Default: 8 MiB. Chunks above 16 MiB delay
        /// the program's own reads from a GPU.
        chunk: u64,
        /// Sets the number of writer threads. Default: 4.
        writers: usize,
        /// Sets the maximum number of shard files per save. Default: 1.
        files: usize,
        /// Sets whether to request direct I/O. Default: true.
        direct: bool,
        /// Sets which system calls write files. Default: `Auto`.
        engine: Engine,
        /// Sets how owner records are locked. Default: `Flock`, by flock(2).
        locks: Locks,
        /// Sets the age at which a sweep deletes an attempt whose lock cannot tell whether its owner is
        /// alive. Default: a day without a change.
        abandoned_after: Duration,
        /// Sets the priority of the threads that follow the stager. Default: `Normal`.
        priority: Priority,
        /// Sets what `save` does while earlier saves are unfinished. Default: `Queue(1)`.
        overlap: Overlap,
        /// Sets what happens to errors of saves that no handle and no call has returned. Default: `NextCall`,
        /// the next `save` returns them.
        on_unseen_error: OnUnseenError,
        /// Sets which saves detect forgotten fences. Default: `First`, the first two.
        detect: Detect,
        /// Sets the size of the capture pool in bytes, GPU memory for small tensors that are captured at
        /// `save`. Default: 16 MiB. With 0 the GPU gathers nothing.
        gather: u64,
        /// Sets the size of the scratch in bytes, GPU memory for late copies at fences and ends of scopes.
        /// Default: 0, none. Each GPU with tensors of a state allocates this much. Experimental.
        scratch: u64,
        /// Sets whether streams at a fence wait for a number in memory instead of an event, so that a save
        /// that fails releases them. Default: false. See [`Settings::memory_waits`].
        memory_waits: bool,
        /// Sets whether the copies of a chunk from a GPU are queued in one call, if its driver supports that.
        /// Default: false. Not measured yet.
        batch: bool,
        /// Sets how many bytes one save may copy on the calling thread. Default: 1 MiB.
        capture_budget: u64,
        /// Sets how many newest steps to keep. Older steps are deleted after a commit. The default keeps all.
        keep_last: usize,
        /// Keeps every step that is a multiple of this, beyond `keep_last`. Refused without `keep_last`.
        keep_every: u64,
        /// Sets whether a step of an earlier process is verified, by reading it whole, before it counts for
        /// `keep_last`. Default: false.
        verify_kept: bool,
        /// Sets what a save does with a damaged step of the same number. Default: `Replace`.
        damaged: OnDamaged,
        /// Sets whether a line for each save is written to a log in the root, which `ashore report` reads.
        /// Default: true.
        run_log: bool,
        /// Sets whether unchanged files of older steps are shared. Default: true. See [`Settings::links`].
        links: bool,
        /// Sets the number of saves after which a shared file is written again, if `link_age` has passed,
        /// too. Default: 16.
        link_saves: u32,
        /// Sets the time after which a shared file is written again. Default: a day.
        link_age: Duration,
        /// Sets the time after which a save that is not durable fails. Default: 30 minutes.
        save_timeout: Duration,
        /// Sets how long a fence waits before a save that still reads its tensors fails. Default: 10 minutes.
        fence_timeout: Duration,
        /// Sets how long dropping the executor waits for saves in flight. Default: 5 minutes.
        shutdown_timeout: Duration,
    }

    /// Traces saves to the file `path`: see [`Settings::trace`]. By default the variable `ASHORE_TRACE` names
    /// the file, if it is set.
    pub fn trace(mut self, path: impl Into<String>) -> Self {
        self.settings.trace = Some(path.into());
        self
    }

    /// Keeps steps that `policy` chooses, such as the [best](crate::catalog::Best), beyond those that
    /// `keep_last` and `keep_every` keep. If neither is set, keeps them beyond the newest durable step.
    pub fn preserve(mut self, policy: impl PreservationPolicy + 'static) -> Self {
        self.policy = Policy(Some(Arc::new(policy)));
        self
    }

    /// Stores checkpoints in `storage` instead of the root directory.
    pub fn storage(mut self, storage: Arc<dyn Storage>) -> Self {
        self.storage = Some(storage);
        self
    }

    /// Sets the device that copies. Default: the device of the tensors.
    pub fn device(mut self, choice: DeviceChoice) -> Self {
        (self.settings.device, self.device) = (choice, None);
        self
    }

    /// Sets an existing device that copies.
    #[doc(hidden)]
    pub fn made_device(mut self, device: Arc<dyn Device>) -> Self {
        self.device = Some(device);
        self
    }

    /// Sets how often live attempts are touched.
    #[doc(hidden)]
    pub fn touch_every(mut self, interval: Duration) -> Self {
        self.touch = interval;
        self
    }

    /// Ignores `ASHORE_TIER`. It is for executors other than the one of a job, because a tier has one owner.
    #[doc(hidden)]
    pub fn no_tier_from_env(mut self) -> Self {
        self.no_tier_from_env = true;
        self
    }

    /// Uses the program's own memory as scratch, so that the program's allocator accounts for it: `bytes`
    /// bytes at `address` on the device `ordinal`, which must be the executor's. `bytes` replaces the size
    /// given to [`Builder::scratch`]. Other devices get no scratch then: fences wait for the copies of states
    /// with tensors on them.
    ///
    /// # Safety
    /// Until `keep_alive` is dropped, the memory stays allocated in the primary context of that device, any
    /// stream may read and write it, and only this executor reads or writes it. Work of the program that uses
    /// the memory has ended when [`Builder::build`] is called. Any thread may drop `keep_alive`. The executor
    /// drops it after it has ended, or could not be built, and when nothing on the device will use the memory
    /// any more. If the executor cannot know that in time, it never drops `keep_alive`.
    pub unsafe fn scratch_in(
        mut self,
        ordinal: u32,
        address: u64,
        bytes: u64,
        keep_alive: impl Any + Send + Sync,
    ) -> Self {
        self.given = Some((ProgramMemory { ordinal, address, keep_alive: Box::new(keep_alive) }, bytes));
        self
    }

    /// Saves together with other ranks, which `coordinator` reaches: each rank saves its part, and the step
    /// becomes visible as a whole or not at all. Every rank builds its executor and calls `save` for the same
    /// steps in the same order. Only rank 0 applies the overlap policy and the retention, and only its values
    /// and metadata are saved.
    ///
    /// [`Builder::build`] then waits until all ranks have joined, at most for `save_timeout`, and takes the
    /// root over from earlier runs of the job. List steps after that. The first save of a structure waits in
    /// the call of `save` until all ranks have described their tensors, and therefore also for earlier saves.
    ///
    /// ```
    /// use ashore::ranks::{Member, SharedDirectory};
    /// use ashore::{CheckpointExecutor, HostTensor, StateDict};
    /// use std::{sync::Arc, time::Duration};
    /// # let root = tempfile::tempdir().unwrap();
    /// # let root = root.path();
    /// // A launcher starts a process for each rank; `ranks::launcher::detect` says which one this is.
    /// let train = |member: Member| -> ashore::Result<()> {
    ///     let coordinator = Arc::new(SharedDirectory::new(root, member)?);
    ///     let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20);
    ///     let executor = builder.ranks(coordinator).run("run-7").build()?;
    ///     let rows = Arc::new(vec![member.rank as f32; 3]); // this rank's row of a matrix
    ///     let mut state = StateDict::new();
    ///     state.tensor_box("weights", [2, 3], [member.rank as usize, 0], HostTensor::new(rows, [1, 3]))?;
    ///     executor.save(1, state)?.wait(Duration::from_secs(60))?; // durable on all ranks, or failed on all
    ///     executor.shutdown(Duration::from_secs(60))
    /// };
    /// std::thread::scope(|scope| {
    ///     let ranks = [0, 1].map(|rank| scope.spawn(move || train(Member { rank, world: 2, local_rank: rank })));
    ///     ranks.into_iter().try_for_each(|rank| rank.join().unwrap())
    /// })?;
    /// let step = ashore::Catalog::open(root)?.latest()?.unwrap();
    /// assert_eq!(step.read_as::<f32>("weights")?, [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]);
    /// # Ok::<(), ashore::Error>(())
    /// ```
    pub fn ranks(mut self, coordinator: Arc<dyn Coordinator>) -> Self {
        self.ranks = Ranks::Several(coordinator);
        self
    }

    /// Saves alone, although a launcher has started this process as one of several ranks.
    pub fn alone(mut self) -> Self {
        self.ranks = Ranks::Alone;
        self
    }

    /// Sets the identity of the run, the same on all its ranks. It keeps the ranks of two jobs apart. The
    /// default is the identity from the [launcher](crate::ranks::launcher), if it gives one.
    pub fn run(mut self, run: impl Into<String>) -> Self {
        self.run = Some(run.into());
        self
    }

    /// Also copies durable steps to another root, a tier behind this executor's root: a directory of a shared
    /// file system, a neighbour's or `/dev/shm`, or an object store. Call it once for each tier, the nearest
    /// first. Without a call, the setting `tier` or the variable `ASHORE_TIER` names one tier. A tier belongs
    /// to one executor. With several ranks, all ranks give the same tiers and must see them. Rank 0 promotes,
    /// and only its saves have [`Save::durable_in`](crate::Save::durable_in).
    ///
    /// [`Builder::build`] takes each tier over, so that no earlier session of the job, such as that of a node
    /// that comes back late, can promote to it. List steps after that, with [`CheckpointExecutor::latest`].
    /// See [`crate::tiers`].
    pub fn tier(mut self, tier: Tier) -> Self {
        self.tiers.push(tier);
        self
    }

    /// Builds the executor: creates the root if it is missing, allocates the arena, starts the threads, and
    /// sweeps files that dead processes left.
    ///
    /// # Errors
    /// `Invalid`, naming the setting; errors of the storage and of the device; `Busy` if the system has no
    /// more threads.
    pub fn build(self) -> Result<CheckpointExecutor> {
        self.probe()?.start()
    }

    /// Checks the settings, opens the storage, meets the other ranks and chooses the device.
    fn probe(self) -> Result<Probed> {
        let Self { root, mut settings, storage, device, given, policy, touch, ranks, run, mut tiers, no_tier_from_env } =
            self;
        settings.trace_from(|name| std::env::var(name).ok());
        settings.scratch = given.as_ref().map_or(settings.scratch, |(_, bytes)| *bytes);
        if tiers.is_empty() {
            let var = |name: &str| std::env::var(name).ok();
            if no_tier_from_env {
                // Settings that were read from the environment contain this tier, too.
                settings.tier = settings.tier.filter(|tier| var("ASHORE_TIER").as_ref() != Some(tier));
            } else {
                settings.tier_from(var)?;
            }
            tiers.extend(Tier::of(&settings));
        }
        settings.check()?;
        let storage = match storage {
            Some(storage) => storage,
            None => storage::open_with(&root, &settings)?,
        };
        // The take-over of the root deletes the notes of earlier sessions, so the note is read first.
        let note = if tiers.is_empty() { Note::default() } else { Note::read(storage.as_ref()) };
        let group = ranks.meet(storage.as_ref(), run, &note, settings.save_timeout)?;
        if group.is_none() {
            storage.take_over()?;
        }
        let (device, report) = match device {
            Some(device) => {
                let report = DeviceReport::new(device.as_ref(), "as it was given".into());
                (device, report)
            }
            None => choose_later(settings.device, given.as_ref().map(|(given, _)| given.ordinal))?,
        };
        let given = given.map(|(given, bytes)| fits(given, bytes, device.as_ref())).transpose()?;
        let behind = meeting::take_over(&storage, note, tiers, group.as_deref(), settings.save_timeout)?;
        Ok(Probed { settings, storage, group, behind, device, report, given, policy, touch })
    }
}

/// The settings, and what this process has found: the storage, the ranks and the device of an executor. No
/// memory is allocated and no thread runs yet.
struct Probed {
    settings: Settings,
    storage: Arc<dyn Storage>,
    group: Option<Arc<Group>>,
    behind: Option<Arc<Behind>>,
    device: Arc<dyn Device>,
    report: DeviceReport,
    /// The program's memory for the scratch.
    given: Option<ProgramMemory>,
    policy: Policy,
    touch: Duration,
}

impl Probed {
    /// Allocates the arena, equips the device and starts the threads.
    fn start(self) -> Result<CheckpointExecutor> {
        let Self { settings, storage, group, behind, device, report, given, policy, touch } = self;
        let signal = Arc::new(Signal::default());
        let arena =
            Arena::new(settings.arena, settings.chunk, &Registrars(device.as_ref(), storage.as_ref()), signal.clone())?;
        storage.equip(Writers::new(arena.report().bytes, settings.chunk, settings.writers));
        let mut pool = Pool::start(settings.writers, arena.report().slabs, settings.priority, &signal)?;
        let wish = Wish::new(&settings, given, &arena.report().pinned);
        let (equipment, Offer { scratch, waits, batch }) = Equipment::of(device.as_ref(), report, wish);
        let leads = group.as_ref().is_none_or(|group| group.member.rank == 0);
        let at_most = (settings.overlap == Overlap::Latest && leads).then_some(2);
        let stager = Arc::new(Stager::new(signal.clone(), arena, device, at_most, batch));
        stager.offer(scratch, waits);
        let catalog = Arc::new(Catalog::over(storage.clone()));
        let priority = settings.priority;
        let sweep = Sweep::default().older_than(settings.abandoned_after);
        let keeping = Keeping {
            retention: Retention { keep_last: settings.keep_last, keep_every: settings.keep_every },
            policy: policy.0,
            verify: if settings.verify_kept { Verify::All } else { Verify::No },
            hold: behind.clone().map(|behind| behind as Arc<dyn Hold>),
        };
        let elsewhere = Arc::new(Elsewhere::new(storage.clone()));
        let destination = Arc::new(Destination {
            storage: storage.clone(),
            elsewhere: elsewhere.clone(),
            catalog: catalog.clone(),
            damaged: settings.damaged,
        });

        // Bounded, because each entry keeps file descriptors open and space on the medium in use.
        let (leftovers, leavings) = bounded(tidy::MOST_UNTIDIED);
        let compared = Arc::<AtomicU64>::default();
        let history = Arc::new(History::new(&settings, storage.as_ref(), group.is_none()));
        let committing = Committing {
            stager: stager.clone(),
            storage: storage.clone(),
            elsewhere,
            catalog: catalog.clone(),
            compared: compared.clone(),
            behind: behind.clone(),
            history: history.clone(),
            table: AlignedBuffer::new(0),
        };
        let member = group.as_ref().map(|group| group.member);
        let tell = telling::body(&stager, &settings, &storage, member, equipment.report());
        let (turns, rounds) =
            group.map(|group| ranks::turns_and_rounds(group, meeting::first_save(behind.is_some()))).unzip();
        let executor = CheckpointExecutor {
            catalog: catalog.clone(),
            stager: stager.clone(),
            threads: Arc::new(Threads::new(stager.clone())),
            turns,
            admission: Mutex::new(Admission::new()),
            behind: behind.clone(),
            origin: ForkGuard::new(),
            compared,
            history: history.clone(),
            storage: storage.clone(),
            destination: destination.clone(),
            equipment,
            settings,
        };
        let (staging, committer, tidying) = (signal.clone(), signal.clone(), signal);

        // The send waits while the tidying thread is behind. If that thread has ended, the send fails and the
        // next process sweeps.
        let leave = move |left: Option<Leftover>| left.into_iter().for_each(|left| dropped(leftovers.send(left)));
        let (commits, commit): (_, Box<dyn FnOnce() + Send>) = match rounds {
            None => {
                let (ended, endings) = unbounded::<Arc<Task>>();
                (Commits::Alone(ended), Box::new(move || commit_alone(&endings, committing, leave)))
            }
            Some(rounds) => {
                let (call, calls) = unbounded();
                (
                    Commits::Several(call),
                    Box::new(move || commit_several(calls, rounds, committing, &destination, leave)),
                )
            }
        };
        let commit = move || {
            own_threads::mark(&committer);
            adopt(priority);
            commit();
        };
        // The touch thread runs until the last attempt is tidied up.
        let (alive, ended_tidying) = bounded(0);
        let touched = storage.clone();
        let tidy = move || {
            own_threads::mark(&tidying);
            adopt(priority);
            tidy::run(&leavings, storage.as_ref(), &catalog, &keeping, sweep, &history.scrub);
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
        // Only rank 0 prunes and sweeps, and owns the attempts.
        if leads {
            handles.push(spawn("ashore-tidy".into(), tidy)?);
            handles.push(spawn("ashore-touch".into(), move || touch::run(&ended_tidying, touched.as_ref(), touch))?);
        }
        if let Some(behind) = behind.filter(|behind| behind.promotes()) {
            executor.threads.keep_behind(behind.clone());
            behind.start(&executor.catalog, &executor.stager.signal)?;
        }
        let last = vec![calling, spawn(telemetry::NAME.into(), tell)?];
        executor.threads.keep(Channels { pool, commits }, handles, last);
        Ok(executor)
    }
}

/// The body of the committer of one process: it commits saves as they end.
fn commit_alone(endings: &Receiver<Arc<Task>>, mut committing: Committing, leave: impl Fn(Option<Leftover>)) {
    for task in endings {
        leave(ending::conclude(&mut committing, &task, commit::conclude));
        dropped(task);
    }
    // The tidying thread ends next, and must not read a long file first.
    committing.history.close();
}

/// The body of the committer of several ranks: it commits saves in the order of calls.
fn commit_several(
    calls: Receiver<Called>,
    rounds: Rounds,
    mut committing: Committing,
    destination: &Destination,
    leave: impl Fn(Option<Leftover>),
) {
    let allow = |wanted: &Wanted| destination.allow(wanted.step, &wanted.name);
    rounds.run(calls, &allow, |task, group, attempted| {
        let left = ending::conclude(&mut committing, task, |ending| several::conclude(group, attempted, ending));
        leave(left.filter(|_| group.member.rank == 0));
    });
}

/// Refuses the program's memory if it cannot be the scratch of this device.
fn fits(given: ProgramMemory, bytes: u64, device: &dyn Device) -> Result<ProgramMemory> {
    let (ordinal, address, name) = (given.ordinal, given.address, device.name());
    let why = if name != format!("cuda:{ordinal}") {
        "the memory for the scratch is not of the device of the executor"
    } else if address == 0 || bytes == 0 || address.checked_add(bytes).is_none() {
        "scratch memory is invalid: null address, zero length or overflow"
    } else {
        return Ok(given);
    };
    let memory = format!("scratch={bytes} address={address:#x} memory=cuda:{ordinal} device={name}");
    Err(Error::invalid(format!("{why} {memory}")))
}

/// Registers one buffer with the device, which copies to it, and with the storage, which writes from it.
struct Registrars<'a>(&'a dyn Device, &'a dyn Storage);

impl Register for Registrars<'_> {
    fn register(&self, pages: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new((self.0.register(pages)?, self.1.register(pages))))
    }

    fn node(&self) -> Result<Node, String> {
        self.0.node()
    }
}
