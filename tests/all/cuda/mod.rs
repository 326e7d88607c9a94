//! Tensors in GPU memory. Every test here runs on the simulated driver, and proves order, lifetime and
//! errors, never speed. With `ASHORE_REQUIRE_GPU=1` the tests run on a real driver, where copies of another
//! stream stand in for lags and holds; tests that need faults or held kernels leave that part out.

mod batch;
mod borrowed;
mod choosing;
mod cudarc;
mod failing;
mod finding;
mod gather;
mod handed_in;
mod late_copies;
mod loader;
mod program;
mod restoring;
mod restoring_boxes;
mod restoring_fails;
mod restoring_strided;
mod settings;
mod several_devices;
mod staging;
mod torn;
mod traced;
mod waits;
