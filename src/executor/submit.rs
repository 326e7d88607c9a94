//! One call of `save`: it admits the save, captures the tensors that must not wait for the fence, and queues
//! the save for the stager.

use super::admission::{Admitted, Kind, shut_down};
use super::history::History;
use super::ranks::{Answer, Described, Gate, LATE, Turn, Turns, Wanted, What};
use super::threads::{Channels, Commits};
use super::{Admission, CheckpointExecutor, again};
use crate::commit::several::identity;
use crate::device::{Dependency, Queued};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{dropped, guarded};
use crate::id::{Attempt, Attempts, parse_step_name, step_name};
use crate::outcome::Outcome;
use crate::plan::{DeferredDigests, Description, Plan, Request, Shape, Share};
use crate::save::{Save, SaveOptions, Snapshot};
use crate::settings::{Detect, Settings};
use crate::staging::{Allocation, Captured, Job, LateCopy, OnDevice, without_kernels};
use crate::state::StateDict;
use crate::storage::StepPlace;
use crate::ticket::{Extent, Place, Ticket};
use crate::writer::{RetryState, Task};
use crossbeam_channel::{RecvTimeoutError, unbounded};
use std::collections::BTreeMap;
use std::path::{Path, absolute};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A requested save.
struct SaveRequest {
    step: u64,
    place: Place,
    options: SaveOptions,
    borrowed: bool,
    /// The ticket of a deferred save, which exists before its state.
    deferred: Option<Arc<Ticket>>,
    began: Instant,
    /// How long the call has waited for earlier saves.
    queued: Duration,
    deadline: Instant,
}

/// The results of the call of `save` before the save is queued.
struct Taken {
    captured: Captured,
    /// Digests of tensors that other ranks write, in the saves that compare them.
    replicas: Option<Vec<(u32, Digest)>>,
    /// The state for another attempt, if the options allow one.
    kept: Option<RetryState>,
    on_device: OnDevice,
    /// The dependency of the copies, and how the device makes late copies. The error is the reason why the
    /// save is refused.
    queued: Result<(Option<Dependency>, Option<Arc<LateCopy>>)>,
}

/// A save that was refused after work was queued on a device.
struct Refused {
    why: Error,
    /// What that work uses.
    allocation: Option<Allocation>,
    queued: Vec<Arc<dyn Queued>>,
}

impl CheckpointExecutor {
    /// Begins a save of `state`. `register` gets its ticket before anything can read the sources after this
    /// call.
    pub(super) fn submit(
        &self,
        step: u64,
        mut state: StateDict<'static>,
        options: SaveOptions,
        borrowed: bool,
        register: impl FnOnce(&Arc<Ticket>),
    ) -> Result<Save> {
        let saved = match &self.turns {
            None => self
                .wanted(step, options, borrowed, None)
                .and_then(|wanted| self.begin(wanted, &mut state, register, None)),
            Some(turns) => self.submit_shared(turns, step, &mut state, options, borrowed, register),
        };
        // Refused state is dropped under a guard: a source that panics in its drop must not unwind through
        // `save`.
        dropped(state);
        saved
    }

    /// Begins a save of several ranks. A call that is refused on this rank counts, too: the other ranks must
    /// learn of it.
    fn submit_shared(
        &self,
        turns: &Turns,
        step: u64,
        state: &mut StateDict<'static>,
        options: SaveOptions,
        borrowed: bool,
        register: impl FnOnce(&Arc<Ticket>),
    ) -> Result<Save> {
        self.alive()?;
        let turn = turns.take();
        let call = Wanted {
            step,
            name: options.name.clone().unwrap_or_else(|| step_name(step)),
            overwrite: options.overwrite,
            deadline: self.deadline(options.timeout),
        };
        let refused = if options.retries > 0 {
            Some("with several ranks a save is not retried, because slabs of later saves wait for its end: save again")
        } else {
            options.attempt.is_some().then_some("with several ranks, rank 0 names the attempt of a save")
        };
        let saved = if let Some(why) = refused {
            Err(Error::invalid(why).with_step(step))
        } else {
            let wanted = self.wanted(step, options, borrowed, None);
            wanted.and_then(|wanted| self.begin(wanted, state, register, Some((&turn, &call))))
        };
        let what = match &saved {
            Ok(save) => save.ended().map(What::Ended),
            Err(error) => Some(What::Refused(error.clone())),
        };
        if let (Some(what), Some(Channels { commits: Commits::Several(calls), .. })) = (what, &*self.threads.channels())
        {
            turn.call(calls, &call, what);
        }
        saved
    }

    /// Begins the deferred save that has `ticket`.
    pub(super) fn submit_deferred(
        &self,
        ticket: &Arc<Ticket>,
        mut state: StateDict<'static>,
        options: SaveOptions,
    ) -> Result<Save> {
        let wanted = self.wanted(ticket.step, options, false, Some(ticket.clone()));
        let saved = wanted.and_then(|wanted| self.begin(wanted, &mut state, |_| (), None));
        dropped(state);
        saved
    }

    /// Moves the tensors and values out of `state`. A refused state stays in it.
    fn begin(
        &self,
        mut wanted: SaveRequest,
        state: &mut StateDict<'static>,
        register: impl FnOnce(&Arc<Ticket>),
        shared: Option<(&Turn<'_>, &Wanted)>,
    ) -> Result<Save> {
        let (mut overlap, mut attempt) = (self.settings.overlap, wanted.options.attempt);
        if let Some((turn, _)) = shared {
            (overlap, attempt) = (turn.overlap(overlap), Some(turn.attempt()));
        }
        let admitted = match &wanted.deferred {
            Some(ticket) => self.admit_deferred(ticket, &wanted.place)?,
            None => {
                let kind = Kind::To(&wanted.place);
                self.admit(wanted.step, attempt, wanted.deadline, wanted.options.last, kind, overlap)?
            }
        };
        let (mut admission, attempt) = match admitted {
            Admitted::Begins(admission, attempt) => (admission, attempt),
            Admitted::Ended(save) => return Ok(save),
        };
        wanted.queued = wanted.began.elapsed();
        let plan = match shared {
            None => admission.plan_for(state, &self.settings, &self.history)?,
            Some((turn, call)) => match self.plan_with_ranks(&mut admission, state, turn, call)? {
                Planned::Plan(plan) => plan,
                Planned::Ended(outcome) => {
                    return Ok(self.resolved(wanted.step, attempt, wanted.began, outcome));
                }
            },
        };
        let taken = self.capture(&wanted, state, &plan)?;
        let (snapshot, ticket) = (wanted.options.snapshot, self.ticket(&wanted, attempt, &plan, state, &taken));
        // `register` comes before any failure that leaves kernels reading borrowed sources: the scope waits
        // for those kernels.
        register(&ticket);
        let queued = self.enqueue(wanted, &ticket, plan, state, taken, shared);
        // A refusal drops the sources, which can run code of the program that saves.
        drop(admission);
        if let Err(Refused { why, allocation, queued }) = queued {
            self.stager.refuse(ticket, why.clone(), std::mem::take(state), allocation, queued);
            return Err(why);
        }
        if snapshot == Snapshot::AtSave && !ticket.extent().kept {
            self.stager.fence_one(&ticket, self.settings.fence_timeout)?;
        }
        Ok(Save::new(ticket))
    }

    /// Checks the request.
    fn wanted(
        &self,
        step: u64,
        mut options: SaveOptions,
        borrowed: bool,
        deferred: Option<Arc<Ticket>>,
    ) -> Result<SaveRequest> {
        self.alive()?;
        let began = Instant::now();
        if let Some(storage) = options.storage.take() {
            let name = options.name.take().unwrap_or_else(|| step_name(step));
            if self.turns.is_some() {
                return Err(Error::invalid("with several ranks no versions are published").with_step(step));
            }
            let place = Place { parent: Some(storage.describe("")), name };
            let deadline = self.deadline(options.timeout);
            let queued = Duration::ZERO;
            // The storage moves with the options to the request.
            options.storage = Some(storage);
            return Ok(SaveRequest { step, place, options, borrowed, deferred, began, queued, deadline });
        }
        let place = match options.directory.take() {
            Some(directory) => {
                let place = self.outside(&directory, &options);
                place.map_err(|error| error.with_step(step).with_path(directory))?
            }
            None => Place { parent: None, name: options.name.take().unwrap_or_else(|| step_name(step)) },
        };
        if place.parent.is_none() && parse_step_name(&place.name).is_some_and(|other| other != step) {
            let why = format!("this is not a name for the step name={:?}", place.name);
            return Err(Error::invalid(why).with_step(step));
        }
        if options.snapshot == Snapshot::AtSave && self.threads.are_here() {
            let why = "a thread of the executor cannot wait for staging: save without `Snapshot::AtSave`";
            return Err(Error::invalid(why).with_step(step));
        }
        let deadline = self.deadline(options.timeout);
        Ok(SaveRequest { step, place, options, borrowed, deferred, began, queued: Duration::ZERO, deadline })
    }

    /// Returns the place of a checkpoint in `directory`. A relative path starts at the present working
    /// directory.
    fn outside(&self, directory: &Path, options: &SaveOptions) -> Result<Place> {
        if options.name.is_some() {
            return Err(Error::invalid("a save has a directory or a name in the root, not both"));
        }
        if self.turns.is_some() {
            return Err(Error::invalid(
                "with several ranks a checkpoint is a step of the root: save without a directory",
            ));
        }
        let unnamed = || Error::invalid("the directory of a checkpoint must end in a UTF-8 name, such as epoch-3");
        let directory = match StepPlace::of(directory)? {
            StepPlace::Store(root, name) => return Ok(Place { parent: Some(root), name }),
            StepPlace::Directory(directory) => directory,
        };
        let path = absolute(directory).map_err(|error| Error::io("cannot tell where the directory is", error))?;
        let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(unnamed)?.to_owned();
        Ok(Place { parent: Some(path.parent().ok_or_else(unnamed)?.to_owned()), name })
    }

    /// Captures what must not wait for the fence: small tensors, and for the first saves digests of the
    /// others.
    fn capture(&self, wanted: &SaveRequest, state: &mut StateDict<'static>, plan: &Plan) -> Result<Taken> {
        let (step, options) = (wanted.step, &wanted.options);
        let kept = again::keep(state, options.retries, options.backoff, wanted.borrowed);
        let kept = kept.map_err(|error| error.with_step(step))?;
        let detect = match self.settings.detect {
            Detect::Never => false,
            Detect::First => self.compared.load(Ordering::Relaxed) < 2,
            Detect::All => true,
        };
        let panicked = "a source panicked while it was read";
        let captured = guarded(panicked, || {
            let captured = Captured::take(state, self.settings.capture_budget, detect)?;
            let replicas = detect.then(|| captured.replicas(state, plan));
            Ok((captured, replicas))
        });
        let (captured, replicas) = captured.map_err(|error| error.with_step(step))?;
        let mut on_device = OnDevice::default();
        let queued = guarded(panicked, || self.queue_on_device(state, plan, &captured, detect, &mut on_device));
        Ok(Taken { captured, replicas, kept, on_device, queued })
    }

    fn ticket(
        &self,
        wanted: &SaveRequest,
        attempt: Attempt,
        plan: &Plan,
        state: &StateDict<'_>,
        taken: &Taken,
    ) -> Arc<Ticket> {
        let Taken { captured, kept, on_device, .. } = taken;
        let issue = || self.issue(wanted.step, attempt, wanted.began, wanted.deadline);
        let ticket = wanted.deferred.clone().unwrap_or_else(issue);
        ticket.begin(Extent {
            chunks: plan.chunks.len(),
            streams: state.streams.clone(),
            bytes: state.bytes(),
            writable: captured.writable || on_device.left,
            over_budget: captured.over_budget + on_device.over_budget,
            kept: kept.is_some(),
            place: wanted.place.clone(),
        });
        ticket.digests_missing.store(on_device.digests_missing, Ordering::Relaxed);
        ticket
    }

    /// Hands the save to the stager, and its task to the writers.
    ///
    /// # Errors
    /// The save is refused, and the caller releases `state`: [`Stager::refuse`].
    fn enqueue(
        &self,
        wanted: SaveRequest,
        ticket: &Arc<Ticket>,
        plan: Arc<Plan>,
        state: &mut StateDict<'static>,
        taken: Taken,
        shared: Option<(&Turn<'_>, &Wanted)>,
    ) -> std::result::Result<(), Refused> {
        let Taken { mut captured, replicas, kept, mut on_device, queued: behind } = taken;
        let (allocation, queued) = (on_device.allocation.take(), std::mem::take(&mut on_device.queued));
        let channels = self.threads.channels();
        // The executor may have been shut down while this thread read the sources.
        let open = || channels.as_ref().ok_or_else(shut_down);
        let ((behind, late_copy), open) = match behind.and_then(|behind| Ok((behind, open()?))) {
            Ok(begun) => begun,
            Err(why) => return Err(Refused { why: why.with_step(wanted.step), allocation, queued }),
        };
        let (values, rank_values) = match shared {
            // Both kinds of values belong to the one process.
            None => (state.take_values(), BTreeMap::new()),
            Some(_) => (std::mem::take(&mut state.values), std::mem::take(&mut state.rank_values)),
        };
        let request = Request {
            ticket: ticket.clone(),
            plan: plan.clone(),
            name: wanted.place.name,
            parent: wanted.place.parent,
            brought: wanted.options.storage.map(|storage| Arc::new(storage) as _),
            overwrite: wanted.options.overwrite,
            session: self.behind.as_ref().filter(|_| shared.is_none()).map(|behind| behind.session()),
            values,
            rank_values,
            metadata: std::mem::take(&mut state.metadata),
            expected: std::mem::take(&mut captured.expected),
            replicas,
            device_digests: DeferredDigests(Box::new(move || on_device.expected())),
        };
        let to_root = request.parent.is_none() && request.brought.is_none();
        let alone = matches!(open.commits, Commits::Alone(_));
        let older = if alone && to_root { self.history.predict(&plan) } else { None };
        let prediction = older.as_ref().map(|older| older.prediction.clone());
        let sink = match (&open.commits, shared) {
            (Commits::Alone(ended), _) => {
                Arc::new(Task::new(request, kept, older, self.destination.clone(), open.pool.sender(), ended.clone()))
            }
            (Commits::Several(calls), shared) => {
                // A bounded channel keeps messages without a receiver until its senders are dropped, and a
                // task owns a sender. So a task that ends after the rounds have abandoned it would keep
                // itself alive.
                let ((ended, ending), gate) = (unbounded(), Gate::new());
                let task = Arc::new(Task::new(request, kept, None, gate.clone(), open.pool.sender(), ended));
                if let Some((turn, call)) = shared {
                    turn.call(calls, call, What::Begun { task: task.clone(), ended: ending, gate });
                }
                task
            }
        };
        ticket.add_call(wanted.began, wanted.queued);
        self.stager.push(Job {
            ticket: ticket.clone(),
            plan,
            state: std::mem::take(state),
            captured,
            behind,
            late_copy,
            allocation,
            queued,
            borrowed: wanted.borrowed,
            not_before: None,
            prediction,
            sink,
        });
        Ok(())
    }

    /// Queues the captures and digests of devices. Runs in the thread that queued the work that wrote the
    /// tensors.
    fn queue_on_device(
        &self,
        state: &mut StateDict<'static>,
        plan: &Plan,
        captured: &Captured,
        detect: bool,
        on_device: &mut OnDevice,
    ) -> Result<(Option<Dependency>, Option<Arc<LateCopy>>)> {
        if state.streams.is_empty() {
            return Ok((None, None));
        }
        self.equipment.complete(&self.stager, &state.streams).map_err(|e| first_on_device(&e, state))?;
        let scratch = self.stager.scratch.get();
        match scratch {
            Some(scratch) => scratch.at_save(state, detect, on_device)?,
            None => without_kernels(state, self.device().gather.as_ref().err().map_or("", String::as_str), on_device)?,
        }
        // The dependency includes the captures queued above.
        let behind = self.stager.device.behind(&state.streams);
        let dependency = behind.map_err(|e| first_on_device(&e, state))?;
        let late_copy = match scratch {
            Some(scratch) => {
                scratch.equip(self.stager.device.as_ref(), &state.streams);
                scratch.late_copy(plan, state, &dependency, |tensor| captured.get(tensor).is_some())?
            }
            None => None,
        };
        Ok((Some(dependency), late_copy))
    }
}

/// Adds the name of the first tensor in device memory to the error of its device.
fn first_on_device(error: &Error, state: &StateDict<'_>) -> Error {
    let first = state.tensors.iter().find(|(_, tensor)| tensor.location.stream().is_some());
    let name = first.map_or("", |(name, _)| name);
    Error::new(error.kind(), format!("{} tensor={name:?}", error.message())).with_source_of(error)
}

/// The result of planning together with other ranks.
enum Planned {
    Plan(Arc<Plan>),
    /// Rank 0 ended the save by its overlap policy.
    Ended(Outcome),
}

impl CheckpointExecutor {
    /// Returns the plan of this rank's part. For a new structure it waits until all ranks have described
    /// their parts, and therefore until earlier saves have ended.
    fn plan_with_ranks(
        &self,
        admission: &mut Admission,
        state: &StateDict<'_>,
        turn: &Turn<'_>,
        call: &Wanted,
    ) -> Result<Planned> {
        let shape = Shape { chunk: self.settings.chunk, files: self.settings.files, rank: None };
        if let (Some(plan), Some(described)) = (&admission.plan, &admission.described)
            && plan.fits(state, shape)
        {
            let newer = turn.newer_share(described);
            let plan = match newer {
                None => plan.clone(),
                Some(share) => {
                    let part = Share::decode(&share)?;
                    let plan = Arc::new(Plan::of_share(state, shape, &described.order, &part)?);
                    let described = Described { share, ..described.clone() };
                    (admission.plan, admission.described) = (Some(plan.clone()), Some(described));
                    plan
                }
            };
            turn.uses(admission.described.clone());
            return Ok(Planned::Plan(plan));
        }
        if self.threads.are_here() {
            let why = "a thread of the executor cannot wait until all ranks have described a new structure";
            return Err(Error::invalid(why).with_step(call.step));
        }
        let (description, order) = Description::of(state, shape.files)?;
        let (bytes, _) = description.encode()?;
        let digest = identity(&bytes);
        let described = Described { bytes: bytes.into(), digest, order: order.into(), share: Arc::from([]) };
        let answer = match &*self.threads.channels() {
            Some(Channels { commits: Commits::Several(calls), .. }) => turn.describe(calls, call, described.clone()),
            _ => return Err(shut_down()),
        };
        match answer.recv_deadline(call.deadline + LATE) {
            Ok(Answer::Share(share)) => {
                let part = Share::decode(&share)?;
                let plan = Arc::new(Plan::of_share(state, shape, &described.order, &part)?);
                (admission.plan, admission.described) = (Some(plan.clone()), Some(Described { share, ..described }));
                Ok(Planned::Plan(plan))
            }
            Ok(Answer::Ended(outcome)) => Ok(Planned::Ended(outcome)),
            Ok(Answer::Refused(error)) => Err(error),
            Err(RecvTimeoutError::Timeout) => {
                let why = "a save with a new structure waited for earlier saves, or for a planner or storage writer \
                    that has the ranks, until its deadline";
                Err(Error::new(ErrorKind::Deadline, why).with_step(call.step))
            }
            Err(RecvTimeoutError::Disconnected) => Err(shut_down()),
        }
    }
}

impl Admission {
    /// Makes an admission without a plan.
    pub(super) fn new() -> Self {
        Self { plan: None, still: Arc::from([]), described: None, attempts: Attempts::new() }
    }

    /// Returns the plan of the last save if the structure is the same and the same tensors are taken for
    /// frozen. Otherwise returns a new plan.
    fn plan_for(&mut self, state: &StateDict<'_>, settings: &Settings, history: &History) -> Result<Arc<Plan>> {
        let shape = Shape { chunk: settings.chunk, files: settings.files, rank: None };
        let still = history.still(state.fingerprint());
        match &self.plan {
            Some(plan) if Arc::ptr_eq(&self.still, &still) && plan.fits(state, shape) => Ok(plan.clone()),
            _ => {
                let plan = Plan::new(state, shape, &still)?;
                self.still = still;
                Ok(self.plan.insert(Arc::new(plan)).clone())
            }
        }
    }
}
