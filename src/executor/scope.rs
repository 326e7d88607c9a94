//! Saving borrowed state: a scope that does not end before nothing borrowed will be read any more.
//!
//! # Safety argument
//! The lifetime of a state dict is lengthened to `'static` to send it to the stager. That is sound because the memory that
//! its sources borrow lives for `'env`, which outlives the call of `scope`, and `scope` does not return or unwind before the
//! stager has dropped every state dict of the scope: the guard `Ending` waits for that in its `Drop`, a panic included. The
//! guard is a local of `scope`, so no safe code can forget it; forgetting a `Save` changes nothing, because the guard keeps
//! tickets of its own. In a forked child there is no stager, and the parent's memory is not ours: nothing is waited for.
//!
//! With a fence on streams, what was queued may still read borrowed memory of a device when `scope` returns: copies to the host, and
//! kernels that set aside what is not copied yet. Nothing more is queued from it then. Sources are let go only when all copies of a
//! save are queued, or when it is frozen, by a lock that the stager holds while it queues a chunk, and its kernels are launched; and
//! only when every stream that was given, and every stream that made a tensor of the save, has been made to wait for both. Whoever
//! writes or frees that memory does so in one of these streams, or after one of them, by the contract of such sources. Where any step
//! of this is refused, fails or comes too late, the host waits instead, until the stager has let go of the save: by then nothing
//! reads its memory any more, on the host or on a device. The streams that are made to wait live: those that were given are borrowed
//! until the scope has ended, and what owns those of the tensors is kept by the scope, or promised by the unsafe code that named them.
#![expect(unsafe_code, reason = "lifetime of scoped state; argument above")]

use super::CheckpointExecutor;
use crate::error::{Error, Result};
use crate::save::{Save, SaveOptions};
use crate::staging::freeze;
use crate::state::{DeviceStream, StateDict};
use crate::sync::{Mutex, lock};
use crate::ticket::Ticket;
use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

/// How a scope makes sure at its end that borrowed tensors may be written.
#[derive(Clone, Copy, Debug)]
pub struct Fence<'a>(Option<&'a [DeviceStream<'a>]>);

impl<'a> Fence<'a> {
    /// These streams, and those that made the tensors, wait on the GPU for what still reads them; the calling thread waits until all
    /// copies are queued, or until what is left of them fits the memory of [`Builder::scratch`](crate::Builder::scratch), where it is set
    /// aside then. See [`CheckpointExecutor::fence_on`].
    pub fn on(streams: &'a [DeviceStream<'a>]) -> Self {
        Self(Some(streams))
    }

    /// The calling thread waits: for tensors in host memory.
    pub fn host() -> Self {
        Self(None)
    }
}

/// A scope in which borrowed state can be saved; see [`CheckpointExecutor::scope`].
pub struct Scope<'scope, 'env: 'scope> {
    executor: &'scope CheckpointExecutor,
    tickets: Mutex<Vec<Arc<Ticket>>>,
    /// The streams of the saves, which wait at the end: sources, and what they own, may be gone by then.
    stream_owners: Mutex<Vec<Arc<dyn Any + Send + Sync>>>,
    env: PhantomData<&'env mut &'env ()>,
}

impl fmt::Debug for Scope<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Scope").field("saves", &lock(&self.tickets).len()).finish()
    }
}

impl<'env> Scope<'_, 'env> {
    /// [`CheckpointExecutor::save`] for state that is borrowed for the scope.
    ///
    /// # Errors
    /// As there.
    pub fn save(&self, step: u64, state: StateDict<'env>) -> Result<Save> {
        self.save_with(step, state, SaveOptions::default())
    }

    /// [`CheckpointExecutor::save_with`] for state that is borrowed for the scope.
    ///
    /// # Errors
    /// As there.
    pub fn save_with(&self, step: u64, state: StateDict<'env>, options: SaveOptions) -> Result<Save> {
        lock(&self.stream_owners).extend(state.stream_owners.iter().cloned());
        // SAFETY: only the lifetime changes; the guard of the scope keeps `'env` alive until the dict is dropped.
        let state = unsafe { std::mem::transmute::<StateDict<'env>, StateDict<'static>>(state) };
        self.executor.submit(step, state, options, true, |ticket| lock(&self.tickets).push(ticket.clone()))
    }

    /// [`CheckpointExecutor::fence`].
    ///
    /// # Errors
    /// As there.
    pub fn fence(&self) -> Result<()> {
        self.executor.fence()
    }
}

/// Waits, when dropped, for the sources of the scope's saves.
struct Ending<'a> {
    executor: &'a CheckpointExecutor,
    fence: Fence<'a>,
    tickets: &'a Mutex<Vec<Arc<Ticket>>>,
}

impl Ending<'_> {
    fn freeze(&self) -> Result<()> {
        if self.executor.alive().is_err() {
            return Ok(());
        }
        // Not taken out: should this unwind, the next call must find them again.
        let tickets = lock(self.tickets).clone();
        let timeout = self.executor.settings.fence_timeout;
        match self.fence.0 {
            None => freeze(&tickets, timeout),
            Some(streams) => self.executor.stager.freeze_on(&tickets, streams, timeout),
        }
    }
}

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.freeze() {
            tracing::error!(error = format_args!("{error:#}"), "a scope that panicked ended late");
        }
    }
}

impl CheckpointExecutor {
    /// Runs `f` with a scope in which state can be saved that is only borrowed, and fences at its end, a panic included:
    /// after it, borrowed tensors may be written.
    ///
    /// ```
    /// # use ashore::{CheckpointExecutor, Fence, HostTensor, StateDict};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let executor = CheckpointExecutor::builder(dir.path()).arena(16 << 20).chunk(1 << 20).build()?;
    /// let mut weights = vec![1.0_f32; 6];
    /// let save = executor.scope(Fence::host(), |scope| {
    ///     let mut state = StateDict::new();
    ///     state.tensor("weights", HostTensor::new(&weights[..], [2, 3]))?;
    ///     scope.save(1, state)
    ///     // ... forward and backward may read `weights` here ...
    /// })??;
    /// weights[0] = 2.0; // the scope has ended: nothing reads them any more
    /// save.wait(std::time::Duration::from_secs(60))?;
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// Inside the scope the tensors cannot be written:
    /// ```compile_fail,E0506
    /// # use ashore::{CheckpointExecutor, Fence, StateDict};
    /// # fn demo(executor: &CheckpointExecutor) -> ashore::Result<()> {
    /// let mut weights = vec![1.0_f32; 6];
    /// executor.scope(Fence::host(), |scope| {
    ///     let mut state = StateDict::new();
    ///     state.tensor("weights", &weights[..])?;
    ///     let save = scope.save(1, state);
    ///     weights = vec![2.0; 6];
    ///     save
    /// })??;
    /// # Ok(()) }
    /// ```
    /// nor can what the scope's own closure owns be saved:
    /// ```compile_fail,E0597
    /// # use ashore::{CheckpointExecutor, Fence, StateDict};
    /// # fn demo(executor: &CheckpointExecutor) -> ashore::Result<()> {
    /// executor.scope(Fence::host(), |scope| {
    ///     let weights = vec![1.0_f32; 6];
    ///     let mut state = StateDict::new();
    ///     state.tensor("weights", &weights[..])?;
    ///     scope.save(1, state)
    /// })??;
    /// # Ok(()) }
    /// ```
    /// and outside a scope borrowed state is refused:
    /// ```compile_fail,E0597
    /// # use ashore::{CheckpointExecutor, StateDict};
    /// # fn demo(executor: &CheckpointExecutor) -> ashore::Result<()> {
    /// let weights = vec![1.0_f32; 6];
    /// let mut state = StateDict::new();
    /// state.tensor("weights", &weights[..])?;
    /// let save = executor.save(1, state)?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `Deadline` when staging took longer than the fence deadline: the saves that were still reading have been failed, and
    /// the tensors may be written all the same. `Invalid`, and `f` is not called, in a function given to
    /// [`Save::on_done`], or a waker. What a device refuses fails the save that it is about, whose handle says so.
    pub fn scope<'env, R>(
        &self,
        fence: Fence<'_>,
        f: impl for<'scope> FnOnce(&'scope Scope<'scope, 'env>) -> R,
    ) -> Result<R> {
        if self.threads.are_here() {
            return Err(Error::invalid("a thread of the executor cannot wait for the end of a scope"));
        }
        let (tickets, stream_owners) = (Mutex::default(), Mutex::default());
        let scope = Scope { executor: self, tickets, stream_owners, env: PhantomData };
        let ending = Ending { executor: self, fence, tickets: &scope.tickets };
        let result = f(&scope);
        ending.freeze()?;
        Ok(result)
    }
}
