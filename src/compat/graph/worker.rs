//! A thread that does what blocks, so that the tasks of an async runtime never do.
//!
//! **Protocol.** Jobs are done one after the other, in the order in which their futures were first polled; a job whose future
//! was dropped is done all the same. **Completion.** A job's future resolves when it has run. **Cancellation.** None: records
//! change whole or not at all. **Fork.** In a child there is no thread: every call is `Invalid`.

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

/// The thread, and the way to it. Dropping it waits until every job is done.
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

    /// Does `job` on the thread.
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
        let gone = || Error::internal("the thread of a checkpointer is gone");
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
