//! The states that wait for a session on each thread: states bound before a session was entered, and states
//! of the session that was left.

use super::bound::Erased;
use super::catalog::{CatalogState, Checkpoint};
use std::cell::RefCell;
use std::sync::{Arc, Weak};

/// A state that waits for a session.
pub(super) struct Pending {
    pub state: Arc<dyn Erased>,
    /// Whether the state comes from the session that was left.
    pub of_session: bool,
}

/// A waiting state. Both references are weak: a dropped catalog has no more sessions, and a dropped state
/// needs none.
struct Waiting {
    catalog: Weak<CatalogState>,
    state: Weak<dyn Erased>,
    of_session: bool,
}

thread_local! {
    static WAITING: RefCell<Vec<Waiting>> = const { RefCell::new(Vec::new()) };
}

/// Makes a state wait, replacing another of its type.
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

/// Removes and returns the states that wait for a session of `catalog`.
pub(super) fn take(catalog: &Checkpoint) -> Vec<Pending> {
    let ours = |there: &Waiting| there.catalog.as_ptr() == Arc::as_ptr(&catalog.0);
    let (ours, others) = WAITING.take().into_iter().partition::<Vec<_>, _>(ours);
    WAITING.set(others);
    let pending = |it: Waiting| Some(Pending { state: it.state.upgrade()?, of_session: it.of_session });
    ours.into_iter().filter_map(pending).collect()
}
