//! Runs within runs: separates the states of a subgraph from those of its graph under the same run id.

use super::{ActiveSnapshot, Checkpointer, GraphState, Prune};
use crate::error::Result;
use async_trait::async_trait;
use uuid::Uuid;

/// The runs of one namespace in a store. The empty namespace is the store itself. Every other namespace has
/// its own run id for each run, derived from the namespace and the run id (a UUID of version 5).
///
/// ```
/// use ashore::compat::graph::{Checkpointer, InMemory, Namespaced, Uuid};
/// use std::sync::Arc;
/// # futures_executor::block_on(async {
/// let (store, run) = (Arc::new(InMemory::new()), Uuid::new_v4());
/// let subgraph = Namespaced::new(store.clone(), "planner");
/// store.save(run, 1, &"of the graph".to_owned()).await?;
/// subgraph.save(run, 1, &"of the subgraph".to_owned()).await?;
/// let kept: Option<String> = store.load(run, None).await?;
/// assert_eq!(kept.as_deref(), Some("of the graph"));
/// # Ok::<(), ashore::Error>(())
/// # }).unwrap();
/// ```
#[derive(Clone, Debug)]
pub struct Namespaced<C> {
    store: C,
    namespace: String,
}

impl<C> Namespaced<C> {
    /// The namespace `namespace` of `store`.
    pub fn new(store: C, namespace: impl Into<String>) -> Self {
        Self { store, namespace: namespace.into() }
    }

    fn run(&self, run: Uuid) -> Uuid {
        if self.namespace.is_empty() { run } else { Uuid::new_v5(&run, self.namespace.as_bytes()) }
    }
}

#[async_trait]
impl<S: GraphState, C: Checkpointer<S>> Checkpointer<S> for Namespaced<C> {
    async fn save(&self, run_id: Uuid, step: u64, state: &S) -> Result<()> {
        self.store.save(self.run(run_id), step, state).await
    }

    async fn load(&self, run_id: Uuid, step: Option<u64>) -> Result<Option<S>> {
        self.store.load(self.run(run_id), step).await
    }

    async fn list(&self, run_id: Uuid) -> Result<Vec<u64>> {
        self.store.list(self.run(run_id)).await
    }

    async fn save_active(&self, run_id: Uuid, step: u64, active: &[ActiveSnapshot]) -> Result<()> {
        self.store.save_active(self.run(run_id), step, active).await
    }

    async fn load_active(&self, run_id: Uuid, step: u64) -> Result<Vec<ActiveSnapshot>> {
        self.store.load_active(self.run(run_id), step).await
    }
}

#[async_trait]
impl<C: Prune> Prune for Namespaced<C> {
    async fn prune(&self, run_id: Uuid, keep_last: usize) -> Result<()> {
        self.store.prune(self.run(run_id), keep_last).await
    }
}
