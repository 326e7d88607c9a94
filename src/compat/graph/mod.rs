//! A graph engine's `Checkpointer<S>`: the state of a run at each superstep, by run id and step, and the set
//! of tasks that were active then.
//!
//! The trait has the same methods as the original. An implementation written for the original with
//! `#[async_trait]` compiles after a change of its imports and its bound on the state. In the other
//! direction, [`checkpointer_for`] adapts a store of this crate to an engine that defines the trait, such as
//! `cognis-graph`, and [`Namespaced`] separates the states of its subgraphs. Some questions are open in the
//! original. This module decides them for all of its implementations; `testing::graph` is the suite that
//! checks the decisions:
//!
//! | question | answer |
//! |---|---|
//! | what is a record | a state and an active set are two records under one run id and step; each call replaces only its own record, as a whole, and neither record needs the other |
//! | `save` of an existing step | replaces it atomically: a resumed run repeats supersteps |
//! | `save_active` of a step, saved or not | replaces the active set and leaves the state unchanged |
//! | `Ok` from a save | the record is durable: it survives a crash of the machine ([`InMemory`]: as long as the process) |
//! | a save whose future is dropped | happens whole or not at all |
//! | `list` | steps that have a state, ascending; steps with only an active set are omitted |
//! | `load(None)` | the state of the highest step |
//! | a missing run or step | `Ok(None)`, or an empty list, but never another step |
//! | a state that is not an `S` (any more) | `Invalid`, and nothing changes |
//! | a state that cannot be kept exactly | `Invalid` at `save`, naming it, and nothing changes |
//! | concurrent calls | each is atomic; of two saves of one step the one that was polled last wins |
//! | deletion | nothing is deleted automatically: see [`Prune`] |

mod adapter;
mod directory;
mod memory;
mod namespaced;
mod records;
#[cfg(feature = "sqlite")]
mod sqlite;
mod worker;

pub use directory::Directory;
pub use memory::InMemory;
pub use namespaced::Namespaced;
#[cfg(feature = "sqlite")]
pub use sqlite::Sqlite;

#[doc(inline)]
pub use crate::__checkpointer_for as checkpointer_for;
#[doc(hidden)] // used by the macro
pub use async_trait::async_trait;
#[doc(hidden)]
pub use uuid::Uuid;

use crate::error::Result;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The state of a graph: any type that serde can serialize and deserialize, through the blanket
/// implementation.
pub trait GraphState: Serialize + DeserializeOwned + Send + Sync + 'static {}

impl<S: Serialize + DeserializeOwned + Send + Sync + 'static> GraphState for S {}

/// A task that was active at a superstep: the node to run, and the payload that it was sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActiveSnapshot {
    /// The node.
    pub node_name: String,
    /// What the node was sent, if it was sent a payload.
    pub payload: Option<serde_json::Value>,
}

/// Saves and loads the state of a graph at the boundaries of its supersteps; the [module](self) lists the
/// guarantees.
#[async_trait]
pub trait Checkpointer<S: GraphState>: Send + Sync {
    /// Saves `state` as the state of the run at `step`.
    async fn save(&self, run_id: Uuid, step: u64, state: &S) -> Result<()>;

    /// Loads the state at `step`; None means the highest step. Returns None when there is no such state.
    async fn load(&self, run_id: Uuid, step: Option<u64>) -> Result<Option<S>>;

    /// Every step of the run that has a state.
    async fn list(&self, run_id: Uuid) -> Result<Vec<u64>>;

    /// Saves the set of active tasks beside the state. The default does nothing: an engine that resumes from
    /// an empty set starts at its start node.
    async fn save_active(&self, run_id: Uuid, step: u64, active: &[ActiveSnapshot]) -> Result<()> {
        let _ = (run_id, step, active);
        Ok(())
    }

    /// The set of active tasks at `step`; empty when none was saved.
    async fn load_active(&self, run_id: Uuid, step: u64) -> Result<Vec<ActiveSnapshot>> {
        let _ = (run_id, step);
        Ok(Vec::new())
    }
}

/// Deletes what a run no longer needs.
#[async_trait]
pub trait Prune: Send + Sync {
    /// Keeps the `keep_last` highest states of the run, and the active sets from the lowest kept step on. 0
    /// deletes the run. Kept states are durable before others are deleted.
    async fn prune(&self, run_id: Uuid, keep_last: usize) -> Result<()>;
}
