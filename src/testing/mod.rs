//! For tests of programs and back ends: what a careful test needs and production never runs.

mod late;

pub use late::{LateDevice, POISON};
