//! A thread that does what blocks, so that the tasks of an async runtime never do.
//!
//! **Protocol.** Jobs are done one after the other, in the order in which their futures were first polled; a job whose future
//! was dropped is done all the same. **Completion.** A job's future resolves when it has run. **Cancellation.** None: records
//! change whole or not at all. **Fork.** In a child there is no thread: every call is `Invalid`.

use super::records::Records;
use crate::completion::{Completion, Waiter};
use crate::error::{Error, Result};
use crate::fork;
use crate::sync::{self, Mutex, lock};
use crate::writer::spawn;
use crossbeam_channel::{Sender, unbounded};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce(&mut dyn Records) + Send>;

/// The thread, and the way to it. Dropping it waits until every job is done.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    generation: u64,
}

impl Worker {
    pub fn start(mut records: impl Records + 'static) -> Result<Self> {
        let (jobs, todo) = unbounded::<Job>();
        let thread = spawn("ashore-graph".into(), move || todo.iter().for_each(|job| job(&mut records)))?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread), generation: fork::generation() })
    }

    /// Does `job` on the thread.
    pub async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce(&mut dyn Records) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let Some(jobs) = self.jobs.as_ref().filter(|_| self.generation == fork::generation()) else {
            return Err(Error::invalid("a checkpointer cannot be used in a forked child; make a new one there"));
        };
        let result = Arc::new(Mutex::new(None));
        let done = sync::Arc::new(Completion::new());
        let (put, complete) = (result.clone(), done.clone());
        let job: Job = Box::new(move |records| {
            let panicked = |_| Err(Error::internal("a checkpointer panicked"));
            *lock(&put) = Some(catch_unwind(AssertUnwindSafe(|| job(records))).unwrap_or_else(panicked));
            complete.complete(());
        });
        let gone = || Error::internal("the thread of a checkpointer is gone");
        jobs.send(job).map_err(|_| gone())?;
        Waiter::new(done).await;
        let result = lock(&result).take();
        result.unwrap_or_else(|| Err(gone()))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take()
            && self.generation == fork::generation()
            && thread.join().is_err()
        {
            tracing::error!("the thread of a checkpointer panicked");
        }
    }
}
