//! The thread of an adapter. It does the work that it is sent, in order.

use crate::completion::Completion;
use crate::error::{Error, Result};
use crate::fork::ForkGuard;
use crate::guard::logged;
use crate::thread::spawn;
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::fmt;
use std::sync::Arc;
use std::thread::ThreadId;
use std::time::Instant;

/// The thread and its channel. In a forked child the thread does not exist. Dropping this value there does
/// nothing, because closing the channel could wait for a lock that the thread held at the fork.
pub(crate) struct Background<T> {
    /// None when it is closed.
    work: Option<Sender<T>>,
    ended: Arc<Completion<()>>,
    thread: ThreadId,
    origin: ForkGuard,
}

impl<T: Send + 'static> Background<T> {
    /// Starts the thread `name` with `run`, which returns when its channel is closed and empty.
    ///
    /// # Errors
    /// `Busy` when no thread is available.
    pub fn start(name: &str, run: impl FnOnce(Receiver<T>) + Send + 'static) -> Result<Self> {
        let ((work, coming), ended) = (unbounded(), Arc::new(Completion::new()));
        let end = ended.clone();
        let handle = spawn(name.into(), move || {
            logged("the thread of an adapter panicked", || run(coming));
            end.complete(());
        })?;
        Ok(Self { work: Some(work), ended, thread: handle.thread().id(), origin: ForkGuard::new() })
    }
}

impl<T> Background<T> {
    /// Sends `work` to the thread.
    ///
    /// # Errors
    /// `Internal` when the thread has ended.
    pub fn send(&self, work: T) -> Result<()> {
        let gone = || Error::internal("the thread of an adapter has ended");
        self.work.as_ref().ok_or_else(gone)?.send(work).map_err(|_| gone())
    }

    /// The process that has the thread.
    pub fn origin(&self) -> ForkGuard {
        self.origin
    }

    /// Whether the calling thread is the thread of this adapter.
    pub fn is_here(&self) -> bool {
        std::thread::current().id() == self.thread
    }

    /// Ends the thread when it has done the work that it was sent. Returns false when the thread had not
    /// ended at `deadline`. Returns false at once in the thread itself, which runs wakers and may drop the
    /// last owner.
    pub fn close(&mut self, deadline: Instant) -> bool {
        let Some(work) = self.work.take() else { return true };
        if !self.origin.is_ours() {
            std::mem::forget(work);
            return true;
        }
        drop(work);
        !self.is_here() && self.ended.wait(deadline).is_some()
    }
}

impl<T> Drop for Background<T> {
    fn drop(&mut self) {
        self.close(Instant::now());
    }
}

impl<T> fmt::Debug for Background<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Background(ended={})", self.ended.is_complete())
    }
}
