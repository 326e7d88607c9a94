//! A thread for blocking work, so that tasks of an async runtime never block.
//!
//! **Protocol.** The thread runs jobs one at a time, in the order in which their futures were first polled.
//! It runs a job even if its future was dropped. **Completion.** A job's future resolves when the job has
//! run. **Cancellation.** None: records change whole or not at all. **Fork.** A child has no such thread:
//! every call is `Invalid`.

use super::records::Records;
use crate::completion::{Completion, Waiter};
use crate::error::{Error, Result};
use crate::fork::ForkGuard;
use crate::guard::guarded;
use crate::sync::{self, Mutex, lock};
use crate::thread::spawn;
use crossbeam_channel::{Sender, unbounded};
use std::sync::Arc;
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce(&mut dyn Records) + Send>;

/// The thread and its job channel. Dropping it waits until every job has run.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    origin: ForkGuard,
}

impl Worker {
    pub fn start(mut records: impl Records + 'static) -> Result<Self> {
        let (jobs, todo) = unbounded::<Job>();
        let thread = spawn("ashore-graph".into(), move || todo.iter().for_each(|job| job(&mut records)))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), origin: ForkGuard::new() })
    }

    /// Runs `job` on the thread.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Records) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.origin.check("a checkpointer cannot be used in a forked child; make a new one there")?;
        let result = Arc::new(Mutex::new(None));
        let done = sync::Arc::new(Completion::new());
        let (put, complete) = (result.clone(), done.clone());
        let job: Job = Box::new(move |records| {
            *lock(&put) = Some(guarded("a checkpointer panicked", || job(records)));
            complete.complete(());
        });
        let gone = || Error::internal("the thread of a checkpointer has ended");
        self.jobs.as_ref().ok_or_else(gone)?.send(job).map_err(|_| gone())?;
        Waiter::new(done).await;
        let result = lock(&result).take();
        result.unwrap_or_else(|| Err(gone()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && self.origin.is_ours()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a checkpointer panicked");
        }
    }
}
