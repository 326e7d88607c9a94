//! For tests of programs and back ends: what a careful test needs and production never runs.
//!
//! [`conformance`] is what every [`Storage`](crate::storage::Storage) must do. [`Faulty`] makes system calls fail, one at a
//! time, below the local storage. [`LateDevice`] copies later than it says.

mod block_on;
mod late;

pub use block_on::block_on;
pub mod conformance;
mod faulty;
pub use crate::storage::local::AlignedBuffer;
pub use faulty::{Call, Effect, Fault, Faulty, Logged};
pub use late::{LateDevice, POISON};
