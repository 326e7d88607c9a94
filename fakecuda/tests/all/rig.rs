//! A device for a test, and short names for what tests do with it.

use crate::symbols::cuda;
use fakecuda::Device;
use std::ffi::{CString, c_char};

/// A claimed device with its context current.
pub struct Rig {
    pub device: Device,
}

impl Rig {
    pub fn new() -> Self {
        let device = Device::claim();
        let mut context = 0_u64;
        assert_eq!(cuda!(cuInit(0 => u32)), 0);
        assert_eq!(cuda!(cuDevicePrimaryCtxRetain(&mut context => &mut u64, device.ordinal() as i32 => i32)), 0);
        assert_eq!(cuda!(cuCtxSetCurrent(context => u64)), 0);
        Self { device }
    }

    pub fn memory(&self, bytes: usize) -> u64 {
        let mut address = 0;
        assert_eq!(cuda!(cuMemAlloc_v2(&mut address => &mut u64, bytes => usize)), 0);
        address
    }

    pub fn pinned(&self, bytes: usize) -> &'static mut [u8] {
        let mut address = 0_u64;
        assert_eq!(cuda!(cuMemHostAlloc(&mut address => &mut u64, bytes => usize, 0 => u32)), 0);
        // SAFETY: `bytes` were just allocated, and the tests free them only when they no longer look.
        unsafe { std::slice::from_raw_parts_mut(address as *mut u8, bytes) }
    }

    pub fn stream(&self, flags: u32) -> u64 {
        let mut stream = 0;
        assert_eq!(cuda!(cuStreamCreate(&mut stream => &mut u64, flags => u32)), 0);
        stream
    }

    pub fn event(&self) -> u64 {
        let mut event = 0;
        assert_eq!(cuda!(cuEventCreate(&mut event => &mut u64, 2 => u32)), 0);
        event
    }
}

/// A function of a loaded module, which stays loaded as long as the device's context.
#[derive(Clone, Copy)]
pub struct Kernel(u64);

impl Rig {
    /// One of the project's kernels, from its committed PTX.
    pub fn kernel(&self, module: &str, name: &str) -> Kernel {
        let path = format!("{}/../kernels/{module}.ptx", env!("CARGO_MANIFEST_DIR"));
        let text = CString::new(std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))).unwrap();
        let (mut module, mut function) = (0_u64, 0_u64);
        assert_eq!(cuda!(cuModuleLoadData(&mut module => &mut u64, text.as_ptr() => *const c_char)), 0, "{path}");
        let name_text = CString::new(name).unwrap();
        let code =
            cuda!(cuModuleGetFunction(&mut function => &mut u64, module => u64, name_text.as_ptr() => *const c_char));
        assert_eq!(code, 0, "{name}");
        Kernel(function)
    }

    /// Launches on a stream; the argument is the kernel's structure.
    pub fn launch<T: Copy>(&self, kernel: Kernel, grid: u32, block: u32, stream: u64, argument: T) -> i32 {
        let parameters = [&raw const argument];
        cuda!(cuLaunchKernel(
            kernel.0 => u64, grid => u32, 1 => u32, 1 => u32, block => u32, 1 => u32, 1 => u32, 0 => u32, stream => u64,
            parameters.as_ptr() => *const *const T, std::ptr::null() => *const u8
        ))
    }

    /// Device memory with these values in it.
    pub fn upload<T: Copy>(&self, values: &[T]) -> u64 {
        let bytes = std::mem::size_of_val(values);
        // SAFETY: plain values without padding, read as bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), bytes) };
        let address = self.memory(bytes.len().max(1));
        self.device.poke(address, bytes);
        address
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = cuda!(cuCtxSetCurrent(0 => u64));
        let _ = cuda!(cuDevicePrimaryCtxRelease_v2(self.device.ordinal() as i32 => i32));
    }
}

pub fn to_host(to: &mut [u8], from: u64, stream: u64) -> i32 {
    cuda!(cuMemcpyDtoHAsync_v2(to.as_mut_ptr() => *mut u8, from => u64, to.len() => usize, stream => u64))
}

pub fn record(event: u64, stream: u64) -> i32 {
    cuda!(cuEventRecord(event => u64, stream => u64))
}

pub fn query(event: u64) -> i32 {
    cuda!(cuEventQuery(event => u64))
}

pub fn wait(stream: u64, event: u64) -> i32 {
    cuda!(cuStreamWaitEvent(stream => u64, event => u64, 0 => u32))
}

pub fn synchronize(stream: u64) -> i32 {
    cuda!(cuStreamSynchronize(stream => u64))
}
