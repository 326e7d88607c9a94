//! Signals between the parts of one save: what has happened, or why it never will.

use crate::completion::{Signal, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, lock};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// What a handler may wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum HandlerAwaitableSignal {
    /// The directory of the step is known.
    StepDirectoryCreation,
    /// The directories of the items are known.
    ItemDirectoryCreation,
}

impl fmt::Display for HandlerAwaitableSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StepDirectoryCreation => "step_directory_creation",
            Self::ItemDirectoryCreation => "item_directory_creation",
        })
    }
}

/// Identifies one save and its signals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperationId(u64);

/// The signals of all saves of a program. Clones share the same signals.
///
/// ```
/// use ashore::compat::orbax::{HandlerAwaitableSignal, Signals};
/// use std::time::Duration;
/// let (signals, created) = (Signals::new(), HandlerAwaitableSignal::StepDirectoryCreation);
/// let save = signals.next_operation_id(&[created]);
/// signals.send(save, created);
/// signals.wait(save, created, Duration::from_secs(60))?;
/// signals.remove(save);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct Signals(Arc<SignalState>);

#[derive(Debug, Default)]
struct SignalState {
    next: AtomicU64,
    operations: Mutex<BTreeMap<OperationId, Operation>>,
    changed: Signal,
}

#[derive(Debug, Default)]
struct Operation {
    contract: Vec<HandlerAwaitableSignal>,
    sent: BTreeSet<HandlerAwaitableSignal>,
    failed: Option<Error>,
}

impl Signals {
    /// Creates an empty set of signals.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts an operation whose futures wait for the signals of `contract`: Orbax's
    /// `AWAITABLE_SIGNALS_CONTRACT`.
    pub fn next_operation_id(&self, contract: &[HandlerAwaitableSignal]) -> OperationId {
        let id = OperationId(self.0.next.fetch_add(1, Ordering::Relaxed));
        lock(&self.0.operations).insert(id, Operation { contract: contract.into(), ..Operation::default() });
        id
    }

    /// The signals that the futures of a save wait for; empty once the save has been removed.
    pub fn contract(&self, id: OperationId) -> Vec<HandlerAwaitableSignal> {
        lock(&self.0.operations).get(&id).map(|operation| operation.contract.clone()).unwrap_or_default()
    }

    /// Sends `signal` to every waiter.
    pub fn send(&self, id: OperationId, signal: HandlerAwaitableSignal) {
        self.change(id, |operation| _ = operation.sent.insert(signal));
    }

    /// Fails a save: waiters for its signals that were not sent get `why` at once.
    pub fn fail(&self, id: OperationId, why: &Error) {
        self.change(id, |operation| _ = operation.failed.get_or_insert_with(|| why.clone()));
    }

    /// Removes a save that has ended, with its contract.
    pub fn remove(&self, id: OperationId) {
        lock(&self.0.operations).remove(&id);
        self.0.changed.notify();
    }

    /// Waits until `signal` is sent.
    ///
    /// # Errors
    /// The failure of the save; `NotFound` when the save has ended; `Deadline` after `timeout`; `Invalid` for
    /// a zero timeout.
    pub fn wait(&self, id: OperationId, signal: HandlerAwaitableSignal, timeout: Duration) -> Result<()> {
        self.wait_or(id, signal, timeout, || false)
    }

    /// [`Self::wait`], but also ends when `stop` returns true.
    pub(super) fn wait_or(
        &self,
        id: OperationId,
        signal: HandlerAwaitableSignal,
        timeout: Duration,
        stop: impl Fn() -> bool,
    ) -> Result<()> {
        if timeout.is_zero() {
            return Err(Error::invalid(format!(
                "the timeout of a wait for a signal must not be zero timeout={timeout:?}"
            )));
        }
        let look = || {
            if stop() {
                return Some(Err(Error::new(ErrorKind::Cancelled, "the wait for a signal was cancelled")));
            }
            match lock(&self.0.operations).get(&id) {
                None => Some(Err(Error::new(ErrorKind::NotFound, format!("the save has ended signal={signal}")))),
                Some(operation) if operation.sent.contains(&signal) => Some(Ok(())),
                Some(operation) => operation.failed.clone().map(Err),
            }
        };
        let late = || {
            let what = format!("a signal did not come waited={timeout:?} signal={signal}");
            Err(Error::new(ErrorKind::Deadline, what))
        };
        self.0.changed.wait_until(deadline_after(timeout), look).unwrap_or_else(late)
    }

    /// Wakes every waiter to check again.
    pub(super) fn wake(&self) {
        self.0.changed.notify();
    }

    fn change(&self, id: OperationId, change: impl FnOnce(&mut Operation)) {
        if let Some(operation) = lock(&self.0.operations).get_mut(&id) {
            change(operation);
        }
        self.0.changed.notify();
    }
}
