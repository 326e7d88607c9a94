//! Benchmarks of state that lives on a GPU.

mod bus;
mod checking;
mod readback;
mod staging;
mod state;
mod training;
mod ways;

pub use bus::{Way, pass, run as limits};
pub use staging::run as staging;
pub use state::State;
pub use ways::run as ways;
