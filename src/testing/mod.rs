//! Test tools for programs and back ends. Production code never runs them.
//!
//! [`conformance`] tests the behaviour that every [`Storage`](crate::storage::Storage) must have, [`ranks`]
//! that of every [`Coordinator`](crate::ranks::Coordinator), and [`graph`] that of every graph checkpointer.
//! [`LateDevice`] makes its copies after the queuing call has returned; [`LateDevice::under`] gives it to an
//! executor. This crate's own tests also use three tools below the local storage: `Faulty` makes system calls
//! fail, `simfs` is a simulated file system that can crash, and `Recorded` records the calls that reach the
//! real file system.

mod block_on;
pub mod conformance;
mod faulty;
pub mod graph;
mod late;
pub mod ranks;
mod recorded;
#[doc(hidden)]
pub mod simfs;

pub use crate::memory::AlignedBuffer;
pub use block_on::block_on;
#[doc(hidden)]
pub use faulty::{Call, Effect, Fault, Faulty, HeldCalls, Logged};
pub use late::{LateDevice, POISON};
#[doc(hidden)]
pub use recorded::{Record, Recorded};
