//! The commit of a save made by several ranks: all ranks agree, write, and report; rank 0 publishes.
//!
//! **Protocol.** Every save has the rounds of [`Phase`](crate::ranks::Phase), in the same order on all ranks.
//! The files of a rank and their names are durable before it sends its receipt. Rank 0 has every receipt
//! before it seals the attempt. It then claims the attempt, checks that its session is still the newest,
//! publishes, and tells the outcome only when the step is durable. `checks/model/commit.py` checks these
//! rules over all interleavings of small sizes. Change the model before this module. **Failure.** An error
//! before a rank's receipt fails the save on every rank. After its receipt a rank may not report a failure by
//! itself. It vetoes on the storage, and reports a failure only if its veto is durable and came before the
//! claim. Otherwise the outcome on this rank is `Indeterminate`.

mod agree;
mod end;
mod exchange;
mod message;
mod part;
mod session;
#[cfg(all(test, not(any(loom, miri))))]
mod simulation;

pub(crate) use agree::{Agreed, Assigned, Describe, Structures, identity};
pub(crate) use exchange::Reply;
pub(crate) use message::{Vote, read_any};
pub(crate) use part::{Attempted, Structure, conclude};
pub(crate) use session::Group;
