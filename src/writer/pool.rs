//! The writer threads and the bounded channel that feeds them.

use super::task::{Task, Work};
use crate::completion::Signal;
use crate::error::Result;
use crate::guard::guarded;
use crate::own_threads;
use crate::plan::Chunk;
use crate::settings::Priority;
use crate::thread::{adopt, spawn};
use crossbeam_channel::{Receiver, Sender, bounded};
use std::sync::Arc;
use std::thread::JoinHandle;

/// The writer threads.
#[derive(Debug)]
pub(crate) struct Pool {
    work: Sender<Work>,
    pub threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts `writers` threads over a channel of capacity `slabs`. Sending never blocks, because there are
    /// never more chunks than slabs.
    ///
    /// # Errors
    /// `Busy` if the system has no more threads.
    pub fn start(writers: usize, slabs: usize, priority: Priority, signal: &Arc<Signal>) -> Result<Self> {
        let (work, chunks): (Sender<Work>, Receiver<Work>) = bounded(slabs);
        let threads = (0..writers)
            .map(|i| {
                let (chunks, signal) = (chunks.clone(), signal.clone());
                spawn(format!("ashore-write-{i}"), move || {
                    own_threads::mark(&signal);
                    adopt(priority);
                    for (task, chunk) in chunks {
                        carry_out(&task, chunk);
                    }
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self { work, threads })
    }

    /// Returns the sending end of the channel, for tasks.
    pub fn sender(&self) -> Sender<Work> {
        self.work.clone()
    }
}

/// Writes a chunk and returns its slab. No error and no panic ends the thread.
fn carry_out(task: &Arc<Task>, chunk: Chunk) {
    let index = chunk.index;
    let span = tracing::debug_span!("write", step = task.request.ticket.step, chunk = index);
    let _entered = span.enter();
    let panicked = "a writer thread panicked";
    let written = guarded(panicked, || task.write(chunk));
    let written = written.and_then(|()| guarded(panicked, || task.seal_if_last(index)));
    if let Err(error) = written {
        task.request.ticket.fail(error);
    }
    task.leave();
}
