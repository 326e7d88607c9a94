//! Writing: a pool of threads brings staged chunks to storage.
//!
//! **Consistency.** A chunk is digested once and written at its place; a shard is sealed by whoever wrote its last chunk.
//! **Completion.** A save leaves the pool when its last chunk is done, one way or the other, for `commit`. **Cancellation.**
//! Chunks of a failed save go home unwritten. **Failure.** The first error fails the save, a panic too; the threads live on.

mod pool;
mod task;

pub(crate) use pool::Pool;
pub(crate) use task::{Begin, Kept, Task};
