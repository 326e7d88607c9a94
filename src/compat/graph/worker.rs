//! A thread for blocking work, so that tasks of an async runtime never block.
//!
//! **Protocol.** The thread runs jobs one at a time, in the order in which their futures were first polled.
//! It runs a job even if its future was dropped.
//! **Completion.** A job's future resolves when the job has run.
//! **Cancellation.** None: records change whole or not at all.
//! **Fork.** A child has no such thread: every call is `Invalid`.

use super::records::Records;
use crate::compat::background::Background;
use crate::completion::{Completion, Waiter, deadline_after};
use crate::error::{Error, Result};
use crate::guard::guarded;
use crate::sync::{self, Mutex, lock};
use crossbeam_channel::Receiver;
use std::sync::Arc;
use std::time::Duration;

type Job = Box<dyn FnOnce(&mut dyn Records) + Send>;

/// The thread and its job channel. Dropping it waits until every job has run, except in the thread itself.
#[derive(Debug)]
pub(super) struct Worker(Background<Job>);

impl Worker {
    pub fn start(mut records: impl Records + 'static) -> Result<Self> {
        let run = move |jobs: Receiver<Job>| jobs.iter().for_each(|job| job(&mut records));
        Ok(Self(Background::start("ashore-graph", run)?))
    }

    /// Runs `job` on the thread.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Records) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.0.origin().check("a checkpointer cannot be used in a forked child; make a new one there")?;
        let result = Arc::new(Mutex::new(None));
        let done = sync::Arc::new(Completion::new());
        let (put, complete) = (result.clone(), done.clone());
        let job: Job = Box::new(move |records| {
            *lock(&put) = Some(guarded("a checkpointer panicked", || job(records)));
            complete.complete(());
        });
        self.0.send(job)?;
        Waiter::new(done).await;
        let result = lock(&result).take();
        result.unwrap_or_else(|| Err(Error::internal("a job of a checkpointer has left no result")))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // The saves of the jobs have their own deadlines.
        self.0.close(deadline_after(Duration::MAX));
    }
}
