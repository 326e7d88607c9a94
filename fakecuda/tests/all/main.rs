//! The tests of the simulated driver and of the kernels on it: one binary.

mod driver;
mod kernels;
mod rig;
mod symbols;
