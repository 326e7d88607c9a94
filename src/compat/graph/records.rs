//! Code that the implementations share: records of encoded values, and the trait over them.

use serde_json::Value;
use uuid::Uuid;

use crate::error::Result;

/// Names one of the two records of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    State,
    Active,
}

/// Records by run, kind and step. Changes by `put` and `prune` are durable when they return.
pub(super) trait Records: Send {
    /// Replaces a record atomically.
    fn put(&mut self, run: Uuid, kind: Kind, step: u64, value: Value) -> Result<()>;

    /// The record of a step; None means the highest step.
    fn get(&mut self, run: Uuid, kind: Kind, step: Option<u64>) -> Result<Option<Value>>;

    /// The steps that have a state, ascending.
    fn list(&mut self, run: Uuid) -> Result<Vec<u64>>;

    /// See [`Prune`](super::Prune).
    fn prune(&mut self, run: Uuid, keep_last: usize) -> Result<()>;
}

/// Implements the traits for a type whose field 0 has `run`, which runs a job on the records and awaits it.
macro_rules! checkpointer {
    ($type:ty) => {
        #[async_trait::async_trait]
        impl<S: $crate::compat::graph::GraphState> $crate::compat::graph::Checkpointer<S> for $type {
            async fn save(&self, run_id: uuid::Uuid, step: u64, state: &S) -> $crate::Result<()> {
                let state = $crate::state::encode_value(state).map_err(|e| e.with_step(step))?;
                self.0.run(move |records| records.put(run_id, Kind::State, step, state)).await
            }

            async fn load(&self, run_id: uuid::Uuid, step: Option<u64>) -> $crate::Result<Option<S>> {
                let state = self.0.run(move |records| records.get(run_id, Kind::State, step)).await?;
                let decoded = state.map(|state| $crate::state::decode_value(&state)).transpose();
                decoded.map_err(|e| match step {
                    Some(step) => e.with_step(step),
                    None => e,
                })
            }

            async fn list(&self, run_id: uuid::Uuid) -> $crate::Result<Vec<u64>> {
                self.0.run(move |records| records.list(run_id)).await
            }

            async fn save_active(
                &self,
                run_id: uuid::Uuid,
                step: u64,
                active: &[$crate::compat::graph::ActiveSnapshot],
            ) -> $crate::Result<()> {
                let active = $crate::state::encode_value(active).map_err(|e| e.with_step(step))?;
                self.0.run(move |records| records.put(run_id, Kind::Active, step, active)).await
            }

            async fn load_active(
                &self,
                run_id: uuid::Uuid,
                step: u64,
            ) -> $crate::Result<Vec<$crate::compat::graph::ActiveSnapshot>> {
                let active = self.0.run(move |records| records.get(run_id, Kind::Active, Some(step))).await?;
                let decoded = active.map(|active| $crate::state::decode_value(&active)).transpose();
                Ok(decoded.map_err(|e| e.with_step(step))?.unwrap_or_default())
            }
        }

        #[async_trait::async_trait]
        impl $crate::compat::graph::Prune for $type {
            async fn prune(&self, run_id: uuid::Uuid, keep_last: usize) -> $crate::Result<()> {
                self.0.run(move |records| records.prune(run_id, keep_last)).await
            }
        }
    };
}
pub(super) use checkpointer;
