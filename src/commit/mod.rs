//! Committing: receipts become a manifest, and an attempt becomes a step.
//!
//! **Consistency.** Nothing is published unless bytes written equal bytes planned and every file is durable. **Completion.**
//! `Ok` after the publish is durable. **Cancellation.** Possible until the publish begins. **Failure.** The attempt is
//! abandoned; what comes after the publish began is `Indeterminate`, and the attempt is left for a reader to judge.

mod single;

pub(crate) use single::{Concluded, Ending, conclude};
