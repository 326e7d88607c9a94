//! The arena: aligned, prefaulted memory, allocated once at start and leased in slabs.
//!
//! **Consistency.** Only a [`Lease`] gives access to a slab, and each slab has at most one lease.
//! **Completion.** Dropping the lease, or the [`Slab`] that a storage received, returns the slab. This is the
//! only back-pressure.
//! **Fork.** A child does not inherit the mapping.

mod aligned;
mod arena;
mod limit;
mod mapping;
mod node;
mod slab;

pub use arena::{Arena, ArenaReport, Pages};
pub use slab::Slab;
#[doc(hidden)]
pub use {crate::ALIGNMENT, aligned::AlignedBuffer, arena::Register, node::Node, slab::Lease};
