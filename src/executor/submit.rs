//! One call of `save`: it is admitted, takes what must not wait for the fence, and is queued for the stager.

use super::admission::{self, Verdict};
use super::{Admission, CheckpointExecutor, again};
use crate::completion::{Calls, deadline_after};
use crate::device::Point;
use crate::error::{Error, Result};
use crate::guard::{dropped, guarded};
use crate::id::{Attempt, parse_step_name, step_name};
use crate::outcome::Outcome;
use crate::plan::{Later, Plan, Request, Shape};
use crate::save::{Save, SaveOptions, Snapshot};
use crate::settings::{Detect, OnUnseenError, Settings};
use crate::staging::{Captured, Job, LateCopy, OnDevice, without_kernels};
use crate::state::StateDict;
use crate::sync::{MutexGuard, lock};
use crate::ticket::{Issue, Ticket};
use crate::writer::{Kept, Task};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// A save that is asked for.
struct Asked {
    step: u64,
    name: String,
    options: SaveOptions,
    borrowed: bool,
    began: Instant,
    deadline: Instant,
}

/// Whether it begins.
enum Admitted<'a> {
    /// As this attempt; no other save is admitted while the guard lives.
    Begins(MutexGuard<'a, Admission>, Attempt),
    /// It does not, and has ended like this.
    Ended(Save),
}

/// What was taken of the state in the call of `save`.
struct Taken {
    captured: Captured,
    /// For another attempt, where the options allow one.
    kept: Option<Kept>,
    on_device: OnDevice,
    /// What copies come behind, and how the device makes late copies; or why the save is refused.
    queued: Result<(Option<Point>, Option<Arc<LateCopy>>)>,
}

impl CheckpointExecutor {
    /// Begins a save of `state`. `register` is told of its ticket before anything reads the sources later.
    pub(super) fn submit(
        &self,
        step: u64,
        mut state: StateDict<'static>,
        options: SaveOptions,
        borrowed: bool,
        register: impl FnOnce(&Arc<Ticket>),
    ) -> Result<Save> {
        let saved = self.begin(step, &mut state, options, borrowed, register);
        // What was refused: a source that panics when it is dropped must not unwind through `save`.
        dropped(state);
        saved
    }

    /// Takes what is saved out of `state`, or leaves there what is refused.
    fn begin(
        &self,
        step: u64,
        state: &mut StateDict<'static>,
        options: SaveOptions,
        borrowed: bool,
        register: impl FnOnce(&Arc<Ticket>),
    ) -> Result<Save> {
        let asked = self.asked(step, options, borrowed)?;
        let (mut admission, attempt) = match self.admit(&asked)? {
            Admitted::Begins(admission, attempt) => (admission, attempt),
            Admitted::Ended(save) => return Ok(save),
        };
        let plan = admission.plan_for(state, &self.settings)?;
        let taken = self.capture(&asked, state, &plan)?;
        let (snapshot, ticket) = (asked.options.snapshot, self.ticket(&asked, attempt, &plan, state, &taken));
        // Before anything can fail that leaves kernels behind which read borrowed sources: the scope waits for those.
        register(&ticket);
        self.enqueue(asked, &ticket, plan, state, taken)?;
        drop(admission);
        if snapshot == Snapshot::AtSave && !ticket.kept {
            self.stager.fence_one(&ticket, self.settings.fence_timeout)?;
        }
        Ok(Save::new(ticket))
    }

    /// What is asked for, if that is possible at all.
    fn asked(&self, step: u64, mut options: SaveOptions, borrowed: bool) -> Result<Asked> {
        self.alive()?;
        let began = Instant::now();
        let name = options.name.take().unwrap_or_else(|| step_name(step));
        if parse_step_name(&name).is_some_and(|other| other != step) {
            return Err(Error::invalid(format!("this is not a name for the step name={name:?}")).with_step(step));
        }
        if options.snapshot == Snapshot::AtSave && self.threads.are_here() {
            let why = "a thread of the executor cannot wait for staging: save without `Snapshot::AtSave`";
            return Err(Error::invalid(why).with_step(step));
        }
        let timeout = options.timeout.map_or(self.settings.save_timeout, |d| d.min(self.settings.save_timeout));
        Ok(Asked { step, name, options, borrowed, began, deadline: deadline_after(timeout) })
    }

    /// Waits until the save may begin, or finds that it does not.
    fn admit(&self, asked: &Asked) -> Result<Admitted<'_>> {
        let &Asked { step, began, deadline, ref options, .. } = asked;
        if !options.last
            && let Some(error) = self.stager.saves.unobserved()
        {
            match self.settings.on_unseen_error {
                OnUnseenError::NextCall => return Err(error),
                OnUnseenError::Warn => tracing::error!(
                    error = format_args!("{error:#}"),
                    "a save failed, and no call has returned its error"
                ),
            }
        }
        // One that another save has made room for is begun, even if admission is closed meanwhile.
        let mut superseded = false;
        loop {
            let mut admission = lock(&self.admission);
            if self.threads.lines().is_none() {
                return Err(shut_down());
            }
            self.refuse_unfenced(step)?;
            let attempt = options.attempt.unwrap_or_else(|| admission.attempts.next());
            if self.threads.admission_is_closed() && !options.last && !superseded {
                return Ok(Admitted::Ended(self.resolved(step, attempt, began, self.last_word(step))));
            }
            match admission::admit(&self.stager, self.settings.overlap, step)? {
                Verdict::Begin => return Ok(Admitted::Begins(admission, attempt)),
                Verdict::Ended(outcome) => {
                    return Ok(Admitted::Ended(self.resolved(step, attempt, began, outcome)));
                }
                Verdict::InsteadOf(waiting) => {
                    drop(admission);
                    admission::supersede(&self.stager, *waiting, step);
                    superseded = true;
                }
                Verdict::After(unfinished) => {
                    drop(admission);
                    admission::wait(&self.stager, &unfinished, step, deadline)?;
                }
            }
        }
    }

    /// Takes what must not wait for the fence: small tensors, and digests of the others for the first saves.
    fn capture(&self, asked: &Asked, state: &mut StateDict<'static>, plan: &Plan) -> Result<Taken> {
        let (step, options) = (asked.step, &asked.options);
        let kept = again::keep(state, options.retries, options.backoff, asked.borrowed);
        let kept = kept.map_err(|error| error.with_step(step))?;
        let detect = match self.settings.detect {
            Detect::Never => false,
            Detect::First => self.compared.load(Ordering::Relaxed) < 2,
            Detect::All => true,
        };
        let panicked = "a source panicked while it was read";
        let captured = guarded(panicked, || Captured::take(state, self.settings.capture_budget, detect));
        let captured = captured.map_err(|error| error.with_step(step))?;
        let mut on_device = OnDevice::default();
        let queued = guarded(panicked, || self.queue_on_device(state, plan, &captured, detect, &mut on_device));
        Ok(Taken { captured, kept, on_device, queued })
    }

    fn ticket(
        &self,
        asked: &Asked,
        attempt: Attempt,
        plan: &Plan,
        state: &StateDict<'_>,
        taken: &Taken,
    ) -> Arc<Ticket> {
        let Taken { captured, kept, on_device, .. } = taken;
        let issue = Issue {
            step: asked.step,
            attempt,
            deadline: asked.deadline,
            chunks: plan.chunks.len(),
            streams: state.streams.clone(),
            bytes: state.bytes(),
            writable: captured.writable || on_device.left,
            over_budget: captured.over_budget + on_device.over_budget,
            kept: kept.is_some(),
        };
        let ticket = Arc::new(Ticket::new(issue, asked.began, self.stager.signal.clone(), self.stager.calls.clone()));
        ticket.blind.store(on_device.blind, Ordering::Relaxed);
        ticket
    }

    /// Gives the save to the stager, and its task to the writers.
    ///
    /// # Errors
    /// Why it is refused. What was queued on a device is waited for before its sources are dropped.
    fn enqueue(
        &self,
        asked: Asked,
        ticket: &Arc<Ticket>,
        plan: Arc<Plan>,
        state: &mut StateDict<'static>,
        taken: Taken,
    ) -> Result<()> {
        let Taken { mut captured, kept, mut on_device, queued: behind } = taken;
        let (allocation, queued) = (on_device.allocation.take(), std::mem::take(&mut on_device.queued));
        let lines = self.threads.lines();
        // Shut down while the sources were read here.
        let open = || lines.as_ref().ok_or_else(shut_down);
        let ((behind, late_copy), open) = match behind.and_then(|behind| Ok((behind, open()?))) {
            Ok(begun) => begun,
            Err(error) => {
                let error = error.with_step(asked.step);
                drop(lines);
                self.stager.refuse(ticket.clone(), error.clone(), std::mem::take(state), allocation, queued);
                return Err(error);
            }
        };
        let request = Request {
            ticket: ticket.clone(),
            plan: plan.clone(),
            name: asked.name,
            overwrite: asked.options.overwrite,
            values: std::mem::take(&mut state.values),
            metadata: std::mem::take(&mut state.metadata),
            expected: std::mem::take(&mut captured.expected),
            later: Later(Box::new(move || on_device.expected())),
        };
        let sink = Arc::new(Task::new(request, kept, self.place.clone(), &open.pool, open.ended.clone()));
        ticket.add_blocked(asked.began.elapsed());
        self.stager.push(Job {
            ticket: ticket.clone(),
            plan,
            state: std::mem::take(state),
            captured,
            behind,
            late_copy,
            allocation,
            queued,
            borrowed: asked.borrowed,
            not_before: None,
            sink,
        });
        Ok(())
    }

    /// What devices do at `save`, in the thread that queued the work which wrote the tensors.
    fn queue_on_device(
        &self,
        state: &mut StateDict<'static>,
        plan: &Plan,
        captured: &Captured,
        detect: bool,
        on_device: &mut OnDevice,
    ) -> Result<(Option<Point>, Option<Arc<LateCopy>>)> {
        if state.streams.is_empty() {
            return Ok((None, None));
        }
        self.equipment.complete(&self.stager, &state.streams)?;
        let scratch = self.stager.scratch.get();
        match scratch {
            Some(scratch) => scratch.at_save(state, detect, on_device)?,
            None => without_kernels(state, self.device().gather.as_ref().err().map_or("", String::as_str), on_device)?,
        }
        // Behind what was queued just now, too.
        let point = self.stager.device.behind(&state.streams)?;
        let late_copy = match scratch {
            Some(scratch) => scratch.late_copy(plan, state, &point, |tensor| captured.get(tensor).is_some())?,
            None => None,
        };
        Ok((Some(point), late_copy))
    }

    /// A save of writable tensors was not fenced: a program that goes on would write under a copy.
    fn refuse_unfenced(&self, step: u64) -> Result<()> {
        let Some(ticket) = self.stager.saves.unfenced() else { return Ok(()) };
        let why = "writable tensors are still being read: call `fence` before the next save";
        Err(Error::invalid(format!("{why} unfenced={}", ticket.step)).with_step(step))
    }

    /// What becomes of a save that comes when admission is closed.
    fn last_word(&self, step: u64) -> Outcome {
        Outcome::Skipped { by: self.stager.saves.unfinished().last().map_or(step, |ticket| ticket.step) }
    }

    /// The handle of a save that was not begun.
    fn resolved(&self, step: u64, attempt: Attempt, began: Instant, outcome: Outcome) -> Save {
        let deadline = deadline_after(self.settings.save_timeout);
        let streams = Vec::new();
        let (writable, kept) = (false, false);
        let issue = Issue { step, attempt, deadline, chunks: 0, streams, bytes: 0, writable, over_budget: 0, kept };
        let ticket = Ticket::new(issue, began, self.stager.signal.clone(), self.stager.calls.clone());
        ticket.release();
        ticket.finish(Ok(outcome)).into_iter().for_each(Calls::here);
        Save::new(Arc::new(ticket))
    }
}

impl Admission {
    /// The plan of the last save, if the structure is the same; a new one otherwise.
    fn plan_for(&mut self, state: &StateDict<'_>, settings: &Settings) -> Result<Arc<Plan>> {
        let shape = Shape { chunk: settings.chunk, files: settings.files };
        match &self.plan {
            Some(plan) if plan.fits(state, shape) => Ok(plan.clone()),
            _ => Ok(self.plan.insert(Arc::new(Plan::new(state, shape)?)).clone()),
        }
    }
}

fn shut_down() -> Error {
    Error::invalid("the executor is shut down")
}
