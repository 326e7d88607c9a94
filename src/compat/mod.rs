//! The interfaces of other systems as thin adapters over one executor. Each adapter keeps the names and the
//! meaning of its system. All adapters share one write path and one format. A save through an adapter writes
//! the same bytes as [`CheckpointExecutor::save`](crate::CheckpointExecutor::save), except for
//! [`graph::InMemory`], the database of the feature `sqlite`, and storage writers that a program supplies.
//!
//! **Shutdown.** A handler, manager or executor of an adapter waits for its saves when it is dropped, and
//! returns their errors from `close`. Its threads keep no executor alive. In a forked child, the drop waits
//! for nothing and does not affect the parent.
//!
//! **Floor 5**: above everything; nothing below imports it. The adapters do not depend on each other.
//!
//! | module | system | its contract |
//! |---|---|---|
//! | [`torch`] | torch's distributed checkpointing | `_AsyncCheckpointExecutor.execute_save`, planners, storage writers |
//! | [`orbax`] | Orbax | `AsyncCheckpointHandler`, deferred paths and their signals, `CheckpointManager` |
//! | [`graph`] | Rust graph engines | `Checkpointer<S>` |
//! | [`earth2studio`] | earth2studio | `Checkpoint`, `CheckpointSession` |
//! | [`datarax`] | Datarax | `OrbaxCheckpointHandler`, `Checkpointable` |

pub mod datarax;
pub mod earth2studio;
pub mod graph;
pub mod orbax;
pub mod torch;

mod background;
mod checkpoint_path;
mod ending;
mod open;
