//! Runs in memory: for tests, and for graphs that resume within one process only.

use super::records::{Kind, Records, checkpointer};
use crate::error::Result;
use crate::sync::{Mutex, lock};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use uuid::Uuid;

/// Keeps runs in memory, in the encoding of the other implementations, so it refuses the same states.
#[derive(Debug, Default)]
pub struct InMemory(Here);

impl InMemory {
    /// A store without runs.
    pub fn new() -> Self {
        Self::default()
    }
}

checkpointer!(InMemory);

/// Runs jobs in the calling task: nothing here blocks, so it needs no thread.
#[derive(Debug, Default)]
struct Here(Mutex<Runs>);

impl Here {
    async fn run<T>(&self, job: impl FnOnce(&mut dyn Records) -> Result<T>) -> Result<T> {
        job(&mut *lock(&self.0))
    }
}

#[derive(Debug, Default)]
struct Runs(HashMap<Uuid, Run>);

#[derive(Debug, Default)]
struct Run {
    states: BTreeMap<u64, Value>,
    active: BTreeMap<u64, Value>,
}

impl Run {
    fn of(&mut self, kind: Kind) -> &mut BTreeMap<u64, Value> {
        match kind {
            Kind::State => &mut self.states,
            Kind::Active => &mut self.active,
        }
    }
}

impl Records for Runs {
    fn put(&mut self, run: Uuid, kind: Kind, step: u64, value: Value) -> Result<()> {
        self.0.entry(run).or_default().of(kind).insert(step, value);
        Ok(())
    }

    fn get(&mut self, run: Uuid, kind: Kind, step: Option<u64>) -> Result<Option<Value>> {
        let Some(records) = self.0.get_mut(&run).map(|run| run.of(kind)) else { return Ok(None) };
        let found = match step {
            Some(step) => records.get(&step),
            None => records.last_key_value().map(|(_, value)| value),
        };
        Ok(found.cloned())
    }

    fn list(&mut self, run: Uuid) -> Result<Vec<u64>> {
        Ok(self.0.get(&run).map_or_else(Vec::new, |run| run.states.keys().copied().collect()))
    }

    fn prune(&mut self, run: Uuid, keep_last: usize) -> Result<()> {
        let Some(above) = keep_last.checked_sub(1) else {
            self.0.remove(&run);
            return Ok(());
        };
        let Some(run) = self.0.get_mut(&run) else { return Ok(()) };
        if let Some(&oldest) = run.states.keys().rev().nth(above) {
            run.states = run.states.split_off(&oldest);
            run.active = run.active.split_off(&oldest);
        }
        Ok(())
    }
}
