//! Kernels: the project's own, compiled for the processor from the same source, and found by name.

use crate::abi::{ILLEGAL_ADDRESS, Status};
use crate::device::Device;

/// One compiled kernel. It takes one structure, by value.
#[expect(dead_code, reason = "no kernel is compiled yet")]
pub struct Kernel {
    pub name: &'static str,
    /// The size of the structure.
    pub bytes: usize,
}

/// A launch as it was enqueued.
#[expect(dead_code, reason = "no kernel is compiled yet")]
pub struct Launch {
    pub kernel: &'static Kernel,
    pub grid: [u32; 3],
    pub block: [u32; 3],
    pub argument: Vec<u8>,
}

/// All kernels there are.
pub fn find(_name: &str) -> Option<&'static Kernel> {
    None
}

impl Launch {
    pub fn run(&self, _device: &Device) -> Status {
        Err(ILLEGAL_ADDRESS)
    }
}
