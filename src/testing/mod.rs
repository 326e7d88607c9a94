//! For tests of programs and back ends: what a careful test needs and production never runs.
//!
//! [`conformance`] is what every [`Storage`](crate::storage::Storage) must do. [`Faulty`] makes system calls fail, one at a
//! time, below the local storage; [`simfs`] is a whole file system there, which crashes. [`LateDevice`] copies later than it
//! says. [`graph`] is what every graph checkpointer must do.

mod block_on;
pub mod conformance;
mod faulty;
pub mod graph;
mod late;
pub mod simfs;

pub use crate::memory::AlignedBuffer;
pub use block_on::block_on;
pub use faulty::{Call, Effect, Fault, Faulty, HeldCalls, Logged};
pub use late::{LateDevice, POISON};
