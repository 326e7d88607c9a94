//! For tests of programs and back ends: what a careful test needs and production never runs.

mod block_on;
mod late;

pub use block_on::block_on;
pub use late::{LateDevice, POISON};
