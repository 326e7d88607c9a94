//! Two copies of the weights: readers use one copy while the other is brought to the next version.

use super::inventory::Inventory;
use super::reading::Delta;
use super::weights::Weights;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::sync::{Mutex, lock};
use std::fmt;
use std::sync::Arc;

/// Gives readers the newest version: see [`Follow::reader`](super::Follow::reader). All clones return the
/// same version.
#[derive(Clone)]
pub struct Reader(Arc<Mutex<Arc<Weights<'static>>>>);

impl Reader {
    /// Returns the newest version, which does not change while the returned value is kept. Never waits for an
    /// update: a lock is held for a few instructions.
    pub fn get(&self) -> Arc<Weights<'static>> {
        lock(&self.0).clone()
    }
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Reader({:?})", self.get())
    }
}

pub(super) struct Double {
    front: Arc<Weights<'static>>,
    shown: Reader,
    /// The older copy.
    back: Option<Arc<Weights<'static>>>,
    /// The delta that the older copy lacks.
    lag: Option<(Delta, Inventory)>,
}

impl Double {
    pub fn new(weights: Weights<'static>) -> Self {
        let front = Arc::new(weights);
        let shown = Reader(Arc::new(Mutex::new(front.clone())));
        Self { front, shown, back: None, lag: None }
    }

    pub fn front(&self) -> &Weights<'static> {
        &self.front
    }

    pub fn reader(&self) -> Reader {
        self.shown.clone()
    }

    /// Returns a copy of the newest version that no reader uses: the older copy with the delta that it lacks
    /// if no reader uses it any more, otherwise a new copy.
    fn spare(&mut self) -> Result<Weights<'static>> {
        let back = self.back.take().and_then(Arc::into_inner);
        match (back, self.lag.take()) {
            (Some(mut back), Some((delta, after))) => {
                back.apply(&delta, after)?;
                Ok(back)
            }
            (back, _) => {
                // First, because there is memory for two copies.
                drop(back);
                Ok(self.front.copied())
            }
        }
    }

    /// Applies a checked delta to the other copy, and then shows that copy to readers.
    pub fn apply(&mut self, delta: Delta, after: Inventory) -> Result<()> {
        let mut next = self.spare()?;
        next.apply(&delta, after.clone())?;
        self.show(next);
        self.lag = Some((delta, after));
        Ok(())
    }

    /// Loads a full, and then shows it to readers.
    pub fn load(&mut self, full: &Checkpoint, inventory: Inventory) -> Result<()> {
        // The memory of the older copy is reused.
        let mut next = self.back.take().and_then(Arc::into_inner).unwrap_or_default();
        self.lag = None;
        next.load(full, inventory)?;
        self.show(next);
        Ok(())
    }

    fn show(&mut self, next: Weights<'static>) {
        let next = Arc::new(next);
        *lock(&self.shown.0) = next.clone();
        self.back = Some(std::mem::replace(&mut self.front, next));
    }
}
