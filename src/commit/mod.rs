//! Commit: the receipts of a save become a manifest, and its attempt becomes a step.
//!
//! **Consistency.** The committer publishes only if the bytes written equal the bytes planned and every file
//! is durable. **Completion.** It returns `Ok` after the publish is durable. **Cancellation.** A save can be
//! cancelled until the publish begins. **Failure.** The attempt is abandoned. An error after the publish
//! began is `Indeterminate`, and the attempt stays for a reader to judge.

mod concluded;
pub(crate) mod several;
mod single;

pub(crate) use concluded::{Concluded, Ending};
pub(crate) use single::{conclude, shard_digests};
