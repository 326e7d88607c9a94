//! Writing: a pool of threads writes staged chunks to storage.
//!
//! **Consistency.** A chunk is digested once and written at its offset. The writer of the last chunk of a
//! shard seals the shard.
//! **Completion.** When the last chunk of a save is written or dropped, the pool hands the save to the
//! committer.
//! **Cancellation.** Writers return the slabs of a failed save unwritten.
//! **Failure.** The first error or panic fails the save. The threads continue.

mod older;
mod pool;
mod task;

pub(crate) use older::{Older, OlderFile};
pub(crate) use pool::Pool;
pub(crate) use task::{Begin, RetryState, Task};
