//! The state of a manager, which it shares with the thread that waits for its saves to end.

use crate::completion::Signal;
use crate::error::Error;
use crate::sync::Mutex;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

/// The state of one manager.
#[derive(Debug)]
pub(super) struct ManagerState {
    pub progress: Mutex<Progress>,
    pub changed: Signal,
    pub preempted: AtomicBool,
}

/// What a manager knows of its steps and saves.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The existing steps, as far as this manager knows.
    pub steps: BTreeSet<u64>,
    /// The number of saves under way for each step: an overwriting save may begin before the manager's thread
    /// has seen the end of the previous one.
    pub saving: BTreeMap<u64, usize>,
    pub last_save: Option<Instant>,
    pub errors: VecDeque<Error>,
}

impl ManagerState {
    pub fn of(steps: BTreeSet<u64>) -> Arc<Self> {
        let progress = Mutex::new(Progress { steps, ..Progress::default() });
        let (changed, preempted) = (Signal::default(), AtomicBool::new(false));
        Arc::new(Self { progress, changed, preempted })
    }
}
