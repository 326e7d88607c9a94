//! Benchmarks of state that lives on a GPU.

mod bus;
mod checking;
mod readback;
mod staging;
mod state;
mod training;
mod ways;

pub use bus::run as limits;
pub use staging::run as staging;
pub use ways::run as ways;
