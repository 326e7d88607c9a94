//! States that are bound to a session, and the data of a session. Each refers to the other.

use super::catalog::{Checkpoint, CheckpointEntry, Record};
use super::state::{CheckpointState, Field, Fields, Saved};
use crate::checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::save::Save;
use crate::state::StateDict;
use crate::sync::{Mutex, lock};
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

/// A row of a catalog, or a run that has no row yet. Clones refer to the same session.
#[derive(Clone)]
pub struct CheckpointSession(pub(super) Arc<Inner>);

/// The data of a session.
pub(super) struct Inner {
    pub catalog: Checkpoint,
    pub work: Mutex<Work>,
}

/// The mutable data of a session.
pub(super) struct Work {
    pub entry: Option<CheckpointEntry>,
    /// The selected row, kept open: states are restored from it regardless of later commits.
    pub selected: Option<(checkpoint::Checkpoint, Record)>,
    pub counters: Counters,
    pub bound: Vec<Arc<dyn Erased>>,
    /// The types of states taken over from the previous session; a new state of the type may replace one of
    /// them.
    pub replaceable: Vec<&'static str>,
    /// Whether the session was entered and has taken over the waiting states.
    pub adopted: bool,
    pub in_flight: Option<InFlightSave>,
}

/// The data that a failed flush restores.
#[derive(Clone)]
pub(super) struct Counters {
    pub write_count: u64,
    pub metadata: BTreeMap<String, serde_json::Value>,
    pub dirty: bool,
}

/// A flush whose end the session has not seen.
pub(super) struct InFlightSave {
    pub save: Save,
    pub row: CheckpointEntry,
    pub before: Counters,
    /// The write count when the flush began. A higher count means that more was written since.
    pub write_count: u64,
}

/// A state that is bound to a session. Clones refer to the same state. The state outlives the session: the
/// next session of its catalog that is entered on the thread takes the state over.
#[derive(Debug)]
pub struct Bound<T>(Arc<Shared<T>>);

#[derive(Debug)]
pub(super) struct Shared<T> {
    state: Mutex<T>,
    link: Mutex<Link>,
}

/// The catalog and session that a state belongs to.
#[derive(Clone, Debug, Default)]
pub(super) struct Link {
    pub catalog: Option<Checkpoint>,
    pub session: Weak<Inner>,
    pub loaded: bool,
}

impl<T> Clone for Bound<T> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<T: CheckpointState> From<T> for Bound<T> {
    fn from(state: T) -> Self {
        Self(Arc::new(Shared { state: Mutex::new(state), link: Mutex::default() }))
    }
}

impl<T: CheckpointState> Bound<T> {
    /// Reads or changes the state. A session that commits meanwhile gets `Busy`, also on this thread.
    pub fn update<R>(&self, change: impl FnOnce(&mut T) -> R) -> R {
        change(&mut lock(&self.0.state))
    }

    /// Whether the state was restored from the selected row: `checkpoint_state_loaded`.
    pub fn is_loaded(&self) -> bool {
        lock(&self.0.link).loaded
    }

    /// The catalog that the state belongs to; None without a catalog, or with a
    /// [`NullCheckpoint`](super::NullCheckpoint).
    pub fn checkpoint(&self) -> Option<Checkpoint> {
        lock(&self.0.link).catalog.clone()
    }

    /// The session that the state is bound to; None after the session was left, until the next session is
    /// entered.
    pub fn session(&self) -> Option<CheckpointSession> {
        lock(&self.0.link).session.upgrade().map(CheckpointSession)
    }

    /// How much components keep, from 0 to 2; 0 without a catalog.
    pub fn checkpoint_level(&self) -> u8 {
        self.checkpoint().map_or(0, |catalog| catalog.level())
    }

    /// Whether the next write of its session is expected to flush.
    pub fn checkpoint_is_flush_due(&self) -> bool {
        self.session().is_some_and(|session| session.is_flush_due())
    }

    pub(super) fn erased(&self) -> Arc<dyn Erased> {
        self.0.clone()
    }
}

/// A state of any type.
pub(super) trait Erased: Send + Sync {
    fn id(&self) -> &'static str;
    fn fields(&self) -> &'static [Field];
    fn link(&self, link: Link);
    fn save(&self, to: &mut StateDict<'static>) -> Result<()>;
    fn restore(&self, from: &Saved<'_>) -> Result<()>;
}

impl<T: CheckpointState> Erased for Shared<T> {
    fn id(&self) -> &'static str {
        T::ID
    }

    fn fields(&self) -> &'static [Field] {
        T::FIELDS
    }

    fn link(&self, link: Link) {
        *lock(&self.link) = link;
    }

    fn save(&self, to: &mut StateDict<'static>) -> Result<()> {
        let busy = |_| Error::new(ErrorKind::Busy, format!("a state is being changed state={}", T::ID));
        let state = match self.state.try_lock() {
            // A change that panicked may have left the state partly changed; it is saved as it is.
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            guard => guard.map_err(busy)?,
        };
        state.save(&mut Fields { id: T::ID, state: to })
    }

    fn restore(&self, from: &Saved<'_>) -> Result<()> {
        lock(&self.state).load(from)
    }
}
