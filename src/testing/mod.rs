//! For tests of programs and back ends: what a careful test needs and production never runs.
//!
//! [`conformance`] is what every [`Storage`](crate::storage::Storage) must do, and [`graph`] every graph checkpointer. [`LateDevice`]
//! copies later than it says: an executor has it by [`LateDevice::under`]. For this crate's own tests `Faulty` makes system calls
//! fail below the local storage, and `simfs` is a whole file system there, which crashes.

mod block_on;
pub mod conformance;
mod faulty;
pub mod graph;
mod late;
#[doc(hidden)]
pub mod simfs;

pub use crate::memory::AlignedBuffer;
pub use block_on::block_on;
#[doc(hidden)]
pub use faulty::{Call, Effect, Fault, Faulty, HeldCalls, Logged};
pub use late::{LateDevice, POISON};
