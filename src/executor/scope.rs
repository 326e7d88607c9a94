//! Scopes, which save borrowed state. A scope ends only when no borrowed memory will be read any more.
//!
//! # Safety argument
//! `Scope::save_with` lengthens the lifetime of a state dict to `'static` to send it to the stager. That is
//! sound because the memory that its sources borrow lives for `'env`, which outlives the call of `scope`, and
//! `scope` does not return or unwind before the stager has dropped every state dict of the scope: the guard
//! `Ending` waits for that in its `Drop`, also during a panic. The guard is a local of `scope`, so no safe
//! code can forget it. Forgetting a `Save` changes nothing, because the guard keeps its own tickets. A forked
//! child has no stager, and the parent's memory is not ours, so the guard does not wait there.
//!
//! With a fence on streams, queued work may still read borrowed GPU memory when `scope` returns: copies to
//! the host, and kernels that make late copies. No further work that reads it is queued. Sources are released
//! only when two conditions are met. First, all copies of the save are queued; or the save is frozen, under a
//! lock that the stager holds while it queues a chunk, and the kernels of its late copies are launched.
//! Second, every given stream, and every stream that made a tensor of the save, has been made to wait for
//! these copies and kernels. By the contract of such sources, the program writes or frees that memory in one
//! of these streams, or after one of them. If any of this is refused, fails or takes too long, the host waits
//! instead, until the stager has released the save: by then nothing reads its memory any more, on the host or
//! on a device. The waiting streams are alive: the given streams are borrowed until the scope has ended. For
//! the tensors' streams, the scope keeps their owners, or the unsafe code that named these streams promised
//! that they live.
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

/// The fence at the end of a scope: the calling thread or streams wait, so that borrowed tensors may then be
/// written.
///
/// ```
/// use ashore::{CheckpointExecutor, Fence, StateDict};
/// # let root = tempfile::tempdir().unwrap();
/// # let executor = CheckpointExecutor::builder(root.path()).arena(16 << 20).chunk(1 << 20).build()?;
/// let mut weights = vec![0.0_f32; 6];
/// let save = executor.scope(Fence::host(), |scope| {
///     let mut state = StateDict::new();
///     state.tensor("weights", &weights[..])?;
///     scope.save(1, state)
/// })??;
/// weights[0] = 1.0; // the thread has waited until the save does not read them any more
/// # save.wait(std::time::Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Fence<'a>(Option<&'a [DeviceStream<'a>]>);

impl<'a> Fence<'a> {
    /// Makes `streams`, and the streams that made the tensors, wait on the GPU for the remaining reads. The
    /// calling thread waits until all copies are queued, or until the remaining chunks fit in the scratch
    /// ([`Builder::scratch`](crate::Builder::scratch)), which then takes late copies of them. See
    /// [`CheckpointExecutor::fence_on`].
    pub fn on(streams: &'a [DeviceStream<'a>]) -> Self {
        Self(Some(streams))
    }

    /// Makes the calling thread wait. It is for tensors in host memory.
    pub fn host() -> Self {
        Self(None)
    }
}

/// A scope in which borrowed state can be saved; see [`CheckpointExecutor::scope`].
pub struct Scope<'scope, 'env: 'scope> {
    executor: &'scope CheckpointExecutor,
    tickets: Mutex<Vec<Arc<Ticket>>>,
    /// Owners of the streams of the saves. These streams wait at the end of the scope, when the sources and
    /// their memory may already be dropped.
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
    /// As [`CheckpointExecutor::save`].
    pub fn save(&self, step: u64, state: StateDict<'env>) -> Result<Save> {
        self.save_with(step, state, SaveOptions::default())
    }

    /// [`CheckpointExecutor::save_with`] for state that is borrowed for the scope.
    ///
    /// # Errors
    /// As [`CheckpointExecutor::save_with`].
    pub fn save_with(&self, step: u64, state: StateDict<'env>, options: SaveOptions) -> Result<Save> {
        lock(&self.stream_owners).extend(state.stream_owners.iter().cloned());
        // SAFETY: only the lifetime changes; the guard of the scope keeps `'env` alive until the dict is
        // dropped.
        let state = unsafe { std::mem::transmute::<StateDict<'env>, StateDict<'static>>(state) };
        self.executor.submit(step, state, options, true, |ticket| lock(&self.tickets).push(ticket.clone()))
    }

    /// [`CheckpointExecutor::fence`].
    ///
    /// # Errors
    /// As [`CheckpointExecutor::fence`].
    pub fn fence(&self) -> Result<()> {
        self.executor.fence()
    }
}

/// Waits in its `Drop` until the sources of the scope's saves are released.
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
        // The tickets are cloned, not taken: if this call unwinds, the next call must find them again.
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
    /// Runs `f` with a scope that can save borrowed state, and fences at its end, also during a panic. After
    /// that, borrowed tensors may be written.
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
    /// State that the scope's own closure owns cannot be saved:
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
    /// Outside a scope borrowed state is refused:
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
    /// `Deadline` when staging took longer than the fence deadline: the saves that were still reading have
    /// failed, and the tensors may be written nevertheless. `Invalid`, without a call of `f`, in a function
    /// given to [`Save::on_done`], or in a waker. An error of a device fails only the save that it concerns,
    /// and that save's handle returns it.
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
