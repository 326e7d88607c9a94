//! A graph engine's `Checkpointer<S>`: the state of a run at each superstep, by run id and step, beside the set of tasks that
//! were active then.
//!
//! The trait is the original's, method for method. An implementation written for it with `#[async_trait]` compiles after its
//! imports and its bound on the state are changed. The other way round, [`checkpointer_for`] hands a store of
//! ours to an engine that owns the trait, such as `cognis-graph`, and [`Namespaced`] keeps the states of its
//! subgraphs apart. What the original leaves open is decided here, for every implementation in this module,
//! and `testing::graph` is the suite that checks it:
//!
//! | question | answer |
//! |---|---|
//! | what is a record | a state and an active set are two records under one run id and step; each call replaces its own whole, and neither needs the other |
//! | `save` of a step that is there | replaces it, at once or not at all: a run that resumed repeats supersteps |
//! | `save_active` of a step that is there, saved or not | replaces the active set and leaves the state alone |
//! | `Ok` from a save | it is durable: it survives a crash of the machine ([`InMemory`]: as long as the process) |
//! | a save whose future is dropped | happens whole or not at all |
//! | `list` | steps that have a state, ascending; steps with an active set alone are not among them |
//! | `load(None)` | the state of the highest step |
//! | a run or a step that is not there | `Ok(None)`, or an empty list: never another step |
//! | a state that is not an `S` (any more) | `Invalid`, and nothing is changed |
//! | a state that cannot be kept exactly | `Invalid` at `save`, naming it, and nothing is changed |
//! | calls at the same time | each is atomic; of two saves of one step the one that was polled last stays |
//! | deletion | nothing goes by itself: see [`Prune`] |

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
#[doc(hidden)] // for what the macro makes
pub use async_trait::async_trait;
#[doc(hidden)]
pub use uuid::Uuid;

use crate::error::Result;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a state must be able to do: whatever serde can write and read. Every such type is one.
pub trait GraphState: Serialize + DeserializeOwned + Send + Sync + 'static {}

impl<S: Serialize + DeserializeOwned + Send + Sync + 'static> GraphState for S {}

/// A task that was active at a superstep: the node to run, and what it was sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActiveSnapshot {
    /// The node.
    pub node_name: String,
    /// What the node was sent, if it was sent anything of its own.
    pub payload: Option<serde_json::Value>,
}

/// Stores and finds the state of a graph at the boundaries of its supersteps; see the [module](self) for what is promised.
#[async_trait]
pub trait Checkpointer<S: GraphState>: Send + Sync {
    /// Saves `state` as that of `step` of the run.
    async fn save(&self, run_id: Uuid, step: u64, state: &S) -> Result<()>;

    /// The state at `step`, or at the highest step if that is None; None when there is none.
    async fn load(&self, run_id: Uuid, step: Option<u64>) -> Result<Option<S>>;

    /// Every step of the run that has a state.
    async fn list(&self, run_id: Uuid) -> Result<Vec<u64>>;

    /// Saves the set of active tasks beside the state. Does nothing unless it is implemented: an engine that resumes from an
    /// empty set begins at its start node.
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
    /// Keeps the `keep_last` highest states of the run and the active sets from the lowest of them on; 0 deletes the run.
    /// States that are kept are durable before others go.
    async fn prune(&self, run_id: Uuid, keep_last: usize) -> Result<()>;
}
