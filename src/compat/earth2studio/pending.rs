//! States that wait for a session: on each thread, those that were bound before one was entered, and those of
//! the one that was left.

use super::catalog::{Checkpoint, Shared};
use super::session::active;
use super::state::{Bound, CheckpointState, Erased, Link};
use crate::error::Result;
use std::cell::RefCell;
use std::sync::{Arc, Weak};

/// A state that waits.
pub(super) struct Pending {
    pub state: Arc<dyn Erased>,
    /// The session that was left had it.
    pub of_session: bool,
}

/// A catalog that is gone has no more sessions, and a state that the program has dropped needs none.
struct Waiting {
    catalog: Weak<Shared>,
    state: Weak<dyn Erased>,
    of_session: bool,
}

thread_local! {
    /// The catalog that was built last on this thread.
    static CURRENT: RefCell<Weak<Shared>> = const { RefCell::new(Weak::new()) };
    static WAITING: RefCell<Vec<Waiting>> = const { RefCell::new(Vec::new()) };
}

/// Binds a state to the session that is active on this thread. Without one the state waits for the next
/// session that is entered of the catalog that was built last on this thread; without that, too, it is bound
/// to nothing.
///
/// # Errors
/// As [`CheckpointSession::bind`](super::CheckpointSession::bind).
pub fn bind_checkpoint_state<T: CheckpointState>(state: impl Into<Bound<T>>) -> Result<Bound<T>> {
    let state = state.into();
    if let Some(session) = active() {
        return session.bind(state);
    }
    if let Some(catalog) = CURRENT.with_borrow(Weak::upgrade).map(Checkpoint) {
        let erased = state.erased();
        erased.link(Link { catalog: Some(catalog.clone()), ..Link::default() });
        put(&catalog, &erased, false);
    }
    Ok(state)
}

/// The catalog was just built.
pub(super) fn set_current(catalog: &Checkpoint) {
    CURRENT.set(Arc::downgrade(&catalog.0));
}

/// The state waits, in place of another of its type.
pub(super) fn put(catalog: &Checkpoint, state: &Arc<dyn Erased>, of_session: bool) {
    WAITING.with_borrow_mut(|waiting| {
        let id = state.id();
        waiting.retain(|there| {
            let same = || there.catalog.as_ptr() == Arc::as_ptr(&catalog.0);
            there.state.upgrade().is_some_and(|other| other.id() != id || !same())
        });
        waiting.push(Waiting { catalog: Arc::downgrade(&catalog.0), state: Arc::downgrade(state), of_session });
    });
}

/// Those that wait for a session of `catalog`; they wait no longer.
pub(super) fn take(catalog: &Checkpoint) -> Vec<Pending> {
    let ours = |there: &Waiting| there.catalog.as_ptr() == Arc::as_ptr(&catalog.0);
    let (ours, others) = WAITING.take().into_iter().partition::<Vec<_>, _>(ours);
    WAITING.set(others);
    let pending = |it: Waiting| Some(Pending { state: it.state.upgrade()?, of_session: it.of_session });
    ours.into_iter().filter_map(pending).collect()
}
