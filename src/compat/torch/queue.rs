//! One thread for saves that wait for a staging future or for a storage writer of the program. It runs them
//! in the order of calls.

use crate::compat::background::Background;
use crate::compat::ending::{end_by, first};
use crate::completion::{Signal, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::executor::DeferredSave;
use crate::guard::logged;
use crate::outcome::Phase;
use crate::save::Save;
use crate::sync::{Mutex, lock};
use crossbeam_channel::Receiver;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

type Job = Box<dyn FnOnce(DeferredSave) + Send>;

/// The thread, and the saves of an executor.
pub(super) struct Queue {
    thread: Background<(DeferredSave, Job)>,
    /// The saves that may not have ended, or whose error no call has returned.
    saves: Mutex<Vec<Save>>,
    busy: Arc<Busy>,
}

/// How many jobs are queued or run.
#[derive(Default)]
struct Busy {
    jobs: AtomicUsize,
    changed: Signal,
}

impl Queue {
    pub fn start() -> Result<Self> {
        let busy = Arc::new(Busy::default());
        let counted = busy.clone();
        let run = move |jobs: Receiver<(DeferredSave, Job)>| {
            for (deferred, job) in jobs {
                // A panic drops `deferred`, which ends its save.
                logged("a save panicked", || job(deferred));
                counted.jobs.fetch_sub(1, Ordering::AcqRel);
                counted.changed.notify();
            }
        };
        Ok(Self { thread: Background::start("ashore-torch", run)?, saves: Mutex::default(), busy })
    }

    /// Records a save, so that `close` waits for it and returns its error.
    pub fn remember(&self, save: &Save) {
        let mut saves = lock(&self.saves);
        saves.retain(|save| under_way(save) || save.is_unseen());
        saves.push(save.clone());
    }

    /// Queues a save for the thread.
    pub fn push(&self, deferred: DeferredSave, job: impl FnOnce(DeferredSave) + Send + 'static) {
        self.busy.jobs.fetch_add(1, Ordering::AcqRel);
        // If the thread has ended, the job is dropped, which ends the save.
        let _ = self.thread.send((deferred, Box::new(job)));
    }

    /// Waits until the jobs queued so far have ended. The thread itself, which runs wakers, does not wait for
    /// its own job.
    ///
    /// # Errors
    /// `Busy` when they had not ended at `deadline`.
    pub fn idle(&self, deadline: Instant) -> Result<()> {
        let idle = || (self.busy.jobs.load(Ordering::Acquire) == 0).then_some(());
        if self.thread.is_here() || self.busy.changed.wait_until(deadline, idle).is_some() {
            return Ok(());
        }
        let why = "earlier saves wait for their state or their storage writer, and ranks save in the order of calls";
        Err(Error::new(ErrorKind::Busy, why))
    }

    /// Waits for the saves under way, then ends the thread.
    ///
    /// # Errors
    /// The first error that no call has returned; others are logged. `Deadline` when saves were unfinished:
    /// they then fail. `Indeterminate` when a save was being published: it may still become durable.
    pub fn close(&mut self, timeout: Duration) -> Result<()> {
        if !self.thread.origin().is_ours() {
            return Ok(()); // the saves and the thread belong to the parent
        }
        let deadline = deadline_after(timeout);
        let grace = deadline.max(Instant::now() + Duration::from_millis(500));
        let mut errors = Vec::new();
        for save in std::mem::take(&mut *lock(&self.saves)).iter().filter(|save| under_way(save) || save.is_unseen()) {
            let ended = end_by(save, deadline, grace, "the close of its executor");
            errors.extend(ended.err().filter(|error| error.kind() != ErrorKind::Cancelled));
        }
        self.thread.close(grace);
        first(errors)
    }
}

fn under_way(save: &Save) -> bool {
    save.progress().phase < Phase::Ended
}
