//! Tensors in the memory of GPUs. Every test here runs on the simulated driver, and proves order, lifetime and errors, never
//! speed; with `ASHORE_REQUIRE_GPU=1` those that need no steering run on a real one, unchanged.

mod aside;
mod batch;
mod cudarc;
mod failing;
mod finding;
mod gather;
mod handed_in;
mod lent;
mod loader;
mod program;
mod restoring;
mod restoring_fails;
mod settings;
mod staging;
mod torn;
mod waits;
