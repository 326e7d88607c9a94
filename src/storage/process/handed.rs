//! Records which attempts were handed to a writer process.

use crate::completion::{Cell, Completion};
use crate::id::Attempt;
use crate::sync::{Arc, Mutex, lock};
use std::collections::HashMap;

/// A cell for each attempt. Once the cell is complete, the save does not need this process any more.
#[derive(Debug, Default)]
pub(crate) struct HandedOver(Mutex<HashMap<Attempt, Cell<()>>>);

impl HandedOver {
    pub fn cell(&self, attempt: Attempt) -> Cell<()> {
        lock(&self.0).entry(attempt).or_insert_with(|| Arc::new(Completion::new())).clone()
    }

    pub fn done(&self, attempt: Attempt) {
        self.cell(attempt).complete(Ok(()));
    }

    pub fn forget(&self, attempt: Attempt) {
        lock(&self.0).remove(&attempt);
    }
}
