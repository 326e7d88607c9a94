//! Datarax's `OrbaxCheckpointHandler`: the state of pipelines and modules, by directory and step.
//!
//! | in Datarax | here |
//! |---|---|
//! | `save(directory, target, step, keep, overwrite, metadata)` | [`save`](OrbaxCheckpointHandler::save) with [`SaveArgs`]; `ckpt-<step>`, or `checkpoint` without a step |
//! | `restore(directory, target, step)` | [`restore`](OrbaxCheckpointHandler::restore), [`restore_into`](OrbaxCheckpointHandler::restore_into) |
//! | nested dictionaries | [`State::nested`], [`State::get_nested`] |
//! | `save_to_directory` | [`save_to_directory`](OrbaxCheckpointHandler::save_to_directory) |
//! | `IteratorCheckpoint`, `PipelineCheckpoint` | [`IteratorCheckpoint`], with the identity check of both |
//! | `restore(directory, metadata_only=True)` | [`restore_metadata`](OrbaxCheckpointHandler::restore_metadata): no tensor is read |
//! | `get_state`, `set_state` | [`Checkpointable`], with a [`State`] of arrays, PRNG keys and values |
//! | `get_checkpoint_steps`, `latest_step`, `list_checkpoints` | the same |
//! | `with OrbaxCheckpointHandler() as handler` | dropping the handler waits; [`close`](OrbaxCheckpointHandler::close) waits and returns errors |
//! | `async_checkpointing=True` | [`OrbaxCheckpointHandler::asynchronous`] |
//!
//! Differences: a requested step that is missing is `NotFound`, and another checkpoint is never returned
//! instead. A step also counts as existing under another name (`7` for `ckpt-7`). `overwrite` and `keep`
//! leave the old checkpoint whole until the new one is durable. A PRNG key keeps the name of its
//! implementation. Strings are saved as strings.

mod handler;
mod iterator;
mod state;

pub use handler::{Metadata, OrbaxCheckpointHandler, SaveArgs};
pub use iterator::IteratorCheckpoint;
pub use state::{Array, Checkpointable, PrngKey, State};
