//! A simulated CUDA driver: it provides the C symbols of `libcuda.so` on the host, for tests of order,
//! lifetime and errors.
//!
//! `README.md` of this crate lists what is simulated, what is not, and the settings. A test does not call the
//! simulated driver through this crate. It opens `libfakecuda.so` ([`library`]) as a program opens the real
//! driver, and controls that library through [`Device`].
//!
//! # Safety argument
//! Memory of the simulated devices is never unmapped. So copies and kernels that were bounds-checked before
//! they ran touch mapped memory even if they race with a free. Host memory is touched in two cases only:
//! within ranges that the program pinned, which stay until no running copy uses them; or, for pageable
//! copies, while the program's own call waits. The program vouches for the pointers that it passes for
//! results, as with the real driver.

mod abi;
mod api;
mod call;
mod capture;
mod control;
mod device;
mod event;
mod exported;
mod host;
mod kernel;
mod memory;
mod module;
mod settings;
mod spot;
mod stream;
mod work;
mod worker;

pub use control::{Device, Live, library};
