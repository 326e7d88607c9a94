//! The interfaces of other systems, each a thin face on the one executor: their names and their meaning, one write path, one
//! format. A save through a face leaves the bytes that
//! [`CheckpointExecutor::save`](crate::CheckpointExecutor::save) leaves; but for [`graph::InMemory`], the
//! database of the feature `sqlite`, and storage writers of a program's own.
//!
//! **Ends.** A handler, manager or executor of a face waits for its saves when it is dropped, and returns their errors from `close`;
//! its threads keep no executor alive. In a forked child, dropping it waits for nothing, and the parent does
//! not hear of it.
//!
//! **Floor 5**: above everything, and nothing below imports it. The faces know nothing of each other.
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

mod open;
mod place;
mod unseen;
