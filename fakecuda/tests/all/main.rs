//! The tests of the simulated driver and of the kernels on it: one binary.

mod driver;
mod fixture;
mod kernels;
mod symbols;
