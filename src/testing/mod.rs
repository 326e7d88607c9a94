//! Test tools for programs and back ends. Production code never runs them.
//!
//! [`conformance`] tests what every [`Storage`](crate::storage::Storage) must do, [`ranks`] what every
//! [`Coordinator`](crate::ranks::Coordinator) and [`graph`] what every graph checkpointer must do.
//! [`LateDevice`] copies later than it reports: [`LateDevice::under`] gives it to an executor. For this
//! crate's own tests `Faulty` makes system calls fail below the local storage, `simfs` is a simulated file
//! system below it that can crash, and `Recorded` writes down the calls that reach the real one.

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
