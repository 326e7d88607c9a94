//! The arena: aligned, prefaulted memory bought once at start and lent out in slabs.
//!
//! **Consistency.** A [`Lease`] is the only way to a slab, and there is one lease per slab. **Completion.** Dropping the
//! lease sends the slab home; that is the only back-pressure there is. **Fork.** The mapping is not inherited.

mod aligned;
mod arena;
mod limit;
mod node;
mod slab;

pub use arena::{Arena, ArenaReport, Pages};
#[doc(hidden)]
pub use {crate::ALIGNMENT, aligned::AlignedBuffer, arena::Register, node::Node, slab::Lease};
