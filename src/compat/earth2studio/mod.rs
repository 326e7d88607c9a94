//! earth2studio's `Checkpoint` and `CheckpointSession`: restartable inference runs, as rows of a catalog.
//!
//! A [`Checkpoint`] is the catalog of a named run. A [`CheckpointSession`] restores one of its rows, or
//! starts the first. A program [binds](CheckpointSession::bind) typed state to the session and
//! [writes](CheckpointSession::write) restart boundaries; a new row is committed every `flush_interval`
//! writes.
//!
//! ```
//! use ashore::compat::earth2studio::{Checkpoint, Metadata, Tensor, checkpoint_state};
//!
//! struct Rollout {
//!     lead_hours: u32,
//!     field: Tensor<f32>,
//! }
//! checkpoint_state!(Rollout { values: { lead_hours: u32 }, tensors: { field: f32 } });
//!
//! # let directory = tempfile::tempdir().unwrap();
//! let checkpoint = Checkpoint::builder("demo").path(directory.path()).build()?;
//! for _ in 0..2 {
//!     let session = checkpoint.enter()?; // the latest row, or a new run
//!     let new = Rollout { lead_hours: 0, field: Tensor::new(vec![0.0; 6], [2, 3]) };
//!     let rollout = session.bind(new)?; // restored from the row
//!     let lead = rollout.update(|state| {
//!         state.lead_hours += 6;
//!         state.field.make_mut().fill(state.lead_hours as f32);
//!         state.lead_hours
//!     });
//!     session.write(Metadata::new().set("lead_time", &lead)?)?;
//! }
//! let session = checkpoint.select(-1)?;
//! assert_eq!((session.lead_time::<u32>()?, checkpoint.catalog()?.len()), (Some(12), 1));
//! # Ok::<(), ashore::Error>(())
//! ```
//!
//! # Guarantees
//!
//! **Consistency.** A row is a step of the engine in [`Checkpoint::rank_path`], so the catalog *is* the
//! commits. There is no second file that could be damaged or lag behind. A damaged commit is skipped. Rows
//! are numbered in the order of their commits. Each rank commits on its own.
//! **Completion.** A flush that is `Ok` is durable.
//! **Crash.** The rows of completed flushes survive; with [`Mode::Overwrite`] the old row is deleted after
//! the new one is durable.
//! **Failure.** A failed flush restores the session's counters, metadata and dirty flag to their state before
//! the call. Writes made during the flush stay, and are still to be flushed. The next `write` or `flush`
//! returns a failure that no call has waited for.
//! **Retention.** `Overwrite` keeps one row, `Append` the last `history_size`. **Metadata** of the writes of
//! one session accumulates, and a session starts with none; [`CheckpointSession::metadata`] returns the
//! metadata of the row. **Re-entering.** When a session is left, its states wait for the next session of its
//! catalog that is entered on the thread. That session restores the states from its row.
//!
//! | in earth2studio | here |
//! |---|---|
//! | `bind_checkpoint_state` | [`bind_checkpoint_state`]; the state waits as long as the program keeps it |
//! | `checkpoint_is_flush_due`, `checkpoint_level`, `checkpoint_state_loaded` | [`Bound::checkpoint_is_flush_due`], [`Bound::checkpoint_level`], [`Bound::is_loaded`] |
//! | `NullCheckpoint` | [`NullCheckpoint`] |
//! | rank and world size of PhysicsNeMo or the environment | from the environment, or [`Builder::rank`] |
//!
//! | error in earth2studio | here |
//! |---|---|
//! | `ValueError` | `Invalid` |
//! | `IndexError`, `KeyError` | `NotFound` |
//! | `CheckpointStateCollision`, `CheckpointStateSchemaError`, `CheckpointSerializationError` | `Invalid`, with the error of that name as its source |

mod bound;
mod catalog;
mod errors;
mod flush;
mod metadata;
mod null;
mod pending;
mod session;
mod state;

pub use bound::{Bound, CheckpointSession};
pub use catalog::{Builder, Checkpoint, CheckpointEntry, Mode};
pub use errors::{CheckpointSerializationError, CheckpointStateCollision, CheckpointStateSchemaError};
pub use flush::Flush;
pub use metadata::Metadata;
pub use null::NullCheckpoint;
pub use session::{Scope, active, bind_checkpoint_state};
pub use state::{CheckpointState, Field, Fields, Saved, Tensor};

#[doc(inline)]
pub use crate::__checkpoint_state as checkpoint_state;
