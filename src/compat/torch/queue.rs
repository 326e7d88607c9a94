//! One thread for saves that somebody has to wait for: a staging future, a writer of the user's, a retry. In the order of calls,
//! admitted by the engine's overlap policy.

use super::plan::Metadata;
use crate::compat::overdue::{Cell, Overdue};
use crate::compat::unseen::first;
use crate::completion::{Completion, Signal, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::guard::guarded;
use crate::outcome::Phase;
use crate::save::Save;
use crate::settings::Overlap;
use crate::sync::{Arc as CellArc, Mutex, lock};
use crate::writer::spawn;
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A save in the queue, as its future and its job see it.
pub(super) struct Record {
    pub done: Cell<Option<Metadata>>,
    pub staged: Cell<()>,
    begun: Mutex<Begun>,
    observed: AtomicBool,
    origin: ForkGuard,
}

/// Whether the engine has a save.
enum Begun {
    NotYet,
    /// And never will.
    Cancelled,
    Save(Arc<Save>),
}

impl Record {
    fn new() -> Arc<Self> {
        let (done, staged) = (CellArc::new(Completion::new()), CellArc::new(Completion::new()));
        let (observed, origin) = (AtomicBool::new(false), ForkGuard::new());
        Arc::new(Self { done, staged, begun: Mutex::new(Begun::NotYet), observed, origin })
    }

    /// A save that ended before it began.
    pub fn ended(result: Result<Option<Metadata>>) -> Arc<Self> {
        let record = Self::new();
        record.end(result);
        record
    }

    pub fn end(&self, result: Result<Option<Metadata>>) {
        self.staged.complete(result.as_ref().map(|_| ()).map_err(Clone::clone));
        self.done.complete(result);
    }

    pub fn observe(&self) {
        self.observed.store(true, Ordering::Release);
    }

    pub fn alive(&self) -> Result<()> {
        self.origin.check("a save of the parent cannot be waited for in a forked child")
    }

    /// The engine has it from here on. False, and the save is cancelled, when the record has ended meanwhile.
    pub fn hand_over(&self, save: &Arc<Save>) -> bool {
        let mut begun = lock(&self.begun);
        if self.done.is_complete() || matches!(*begun, Begun::Cancelled) {
            save.cancel();
            return false;
        }
        *begun = Begun::Save(save.clone());
        true
    }

    pub fn cancel(&self) -> bool {
        if self.alive().is_err() {
            return false;
        }
        let save = match &mut *lock(&self.begun) {
            Begun::Save(save) => Some(save.clone()),
            begun => {
                *begun = Begun::Cancelled;
                None
            }
        };
        if save.is_some_and(|save| !save.cancel()) {
            return false;
        }
        self.observe();
        let cancelled = Error::new(ErrorKind::Cancelled, "the save was cancelled");
        let first = self.done.complete(Err(cancelled.clone()));
        self.staged.complete(Err(cancelled));
        first
    }
}

type Job = Box<dyn FnOnce(&Record) -> Result<Option<Metadata>> + Send>;

#[derive(Default)]
struct Shared {
    waiting: Mutex<VecDeque<(Arc<Record>, Job)>>,
    records: Mutex<Vec<Arc<Record>>>,
    signal: Signal,
    stopped: AtomicBool,
}

/// The queue and its threads.
pub(super) struct Queue {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    overdue: Overdue,
    /// Saves that the engine was given at once: they have no record.
    direct: Mutex<Vec<Save>>,
    origin: ForkGuard,
}

impl Queue {
    pub fn start() -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let mine = shared.clone();
        let thread = spawn("ashore-torch".into(), move || run(&mine))?;
        let (overdue, direct, origin) = (Overdue::start()?, Mutex::default(), ForkGuard::new());
        Ok(Self { shared, thread: Some(thread), overdue, direct, origin })
    }

    /// The first error that nobody has seen.
    pub fn unobserved(&self) -> Option<Error> {
        let mut records = lock(&self.shared.records);
        let mut error = None;
        records.retain(|record| match record.done.get() {
            None => true,
            Some(Err(e)) if !record.observed.load(Ordering::Acquire) => {
                if error.is_some() {
                    return true;
                }
                record.observe();
                error = Some(e);
                false
            }
            Some(_) => false,
        });
        error
    }

    /// Remembers a save that ended before it began, so that its error is not lost.
    pub fn failed(&self, error: Error) -> Arc<Record> {
        let record = Record::ended(Err(error));
        lock(&self.shared.records).push(record.clone());
        record
    }

    /// Remembers a save that the engine was given, so that `close` waits for it.
    pub fn remember(&self, save: &Save) {
        let mut direct = lock(&self.direct);
        direct.retain(under_way);
        direct.push(save.clone());
    }

    fn unfinished(&self) -> Vec<Arc<Record>> {
        lock(&self.shared.records).iter().filter(|r| !r.done.is_complete()).cloned().collect()
    }

    /// Takes a save, if the policy has room for it.
    ///
    /// # Errors
    /// `Busy` when there was no room by `deadline`.
    pub fn push(&self, overlap: Overlap, deadline: Instant, job: Job) -> Result<Arc<Record>> {
        let room = match overlap {
            Overlap::Queue(room) => room,
            Overlap::Latest => usize::MAX,
            Overlap::Block | Overlap::Skip => 0,
        };
        let record = Record::new();
        self.overdue.watch(&record.done, deadline, "the save deadline passed in the queue of the executor");
        self.overdue.watch(&record.staged, deadline, "the save deadline passed before the state was staged");
        loop {
            // Looked for and taken under one lock: two callers must not both find the last place free.
            let (first, saves) = {
                let mut records = lock(&self.shared.records);
                let mut unfinished = records.iter().filter(|record| !record.done.is_complete());
                let (first, saves) = (unfinished.next().cloned(), unfinished.count() + 1);
                match first {
                    Some(first) if saves > room => (first, saves),
                    _ => {
                        records.push(record.clone());
                        let mut waiting = lock(&self.shared.waiting);
                        let superseded = if overlap == Overlap::Latest { waiting.pop_back() } else { None };
                        waiting.push_back((record.clone(), job));
                        drop((waiting, records));
                        self.shared.signal.notify();
                        if let Some((superseded, job)) = superseded {
                            drop(job);
                            superseded.end(Ok(None));
                        }
                        return Ok(record);
                    }
                }
            };
            if overlap == Overlap::Skip {
                record.end(Ok(None));
                return Ok(record);
            }
            if first.done.wait(deadline).is_none() {
                let busy = Error::new(ErrorKind::Busy, format!("earlier saves have not ended unfinished={saves}"));
                record.end(Err(busy.clone()));
                return Err(busy);
            }
        }
    }

    /// Waits for what is under way, then ends the thread.
    ///
    /// # Errors
    /// The first error that no call has returned; others are logged. `Deadline` when saves were unfinished, which
    /// have failed then; `Indeterminate` when one was being published, which may become durable.
    pub fn close(&mut self, timeout: Duration) -> Result<()> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        if !self.origin.is_ours() {
            return Ok(()); // in a forked child: saves, and the thread that carries them out, are the parent's
        }
        let deadline = deadline_after(timeout);
        let grace = deadline.max(Instant::now() + Duration::from_millis(500));
        let late = || Error::new(ErrorKind::Deadline, "the executor was closed before a save ended");
        let published = || {
            let what = "the executor was closed while a save was being published: it may become durable";
            Error::new(ErrorKind::Indeterminate, what)
        };
        let mut errors = Vec::new();
        for record in self.unfinished() {
            if record.done.wait(deadline).is_some() {
                continue;
            }
            if record.cancel() {
                errors.push(late());
            } else if record.done.wait(grace).is_none() {
                errors.push(published());
            }
        }
        let ended = |save: &Save, until: Instant| {
            let _ = save.wait(until.saturating_duration_since(Instant::now()));
            save.try_get()
        };
        for save in std::mem::take(&mut *lock(&self.direct)).iter().filter(|save| under_way(save)) {
            let ended = match ended(save, deadline) {
                Some(ended) => ended,
                None if save.cancel() => Err(late()),
                None => ended(save, grace).unwrap_or_else(|| Err(published())),
            };
            errors.extend(ended.err().filter(|error| error.kind() != ErrorKind::Cancelled));
        }
        self.shared.stopped.store(true, Ordering::Release);
        self.shared.signal.notify();
        while !thread.is_finished() && Instant::now() < grace {
            std::thread::sleep(Duration::from_micros(200));
        }
        first(std::iter::from_fn(|| self.unobserved()).chain(errors))
    }
}

fn under_way(save: &Save) -> bool {
    save.progress().phase < Phase::Ended
}

fn run(shared: &Shared) {
    loop {
        let idle = Instant::now() + Duration::from_secs(3600);
        let next = shared.signal.wait_until(idle, || match lock(&shared.waiting).pop_front() {
            Some(job) => Some(Some(job)),
            None => shared.stopped.load(Ordering::Acquire).then_some(None),
        });
        match next {
            None => {}
            Some(None) => return,
            Some(Some((record, job))) => {
                let result = if record.done.is_complete() {
                    Err(Error::new(ErrorKind::Cancelled, "the save ended before its turn came"))
                } else {
                    guarded("a save panicked", || job(&record))
                };
                record.end(result);
            }
        }
    }
}
