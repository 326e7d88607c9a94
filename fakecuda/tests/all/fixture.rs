//! A device for a test, and short names for common calls.

use crate::symbols::cuda;
use fakecuda::Device;
use std::ffi::{CString, c_char};
use std::sync::Once;
use std::time::{Duration, Instant};

/// True if the tests run on a real device: then only those of the kernels run.
pub fn is_real() -> bool {
    std::env::var("ASHORE_REQUIRE_GPU").is_ok_and(|v| v == "1")
}

/// A device with its context current: a simulated one for this test alone, or the first real one.
pub struct Fixture {
    simulated: Option<Device>,
}

impl Fixture {
    pub fn new() -> Self {
        let fixture = Self { simulated: (!is_real()).then(Device::claim) };
        let mut context = 0_u64;
        assert_eq!(cuda!(cuInit(0 => u32)), 0);
        if is_real() {
            // Retained until the process ends: the last release destroys a context, and the next retain takes
            // half a second.
            static HELD: Once = Once::new();
            HELD.call_once(|| {
                let mut held = 0_u64;
                assert_eq!(cuda!(cuDevicePrimaryCtxRetain(&mut held => &mut u64, fixture.ordinal() => i32)), 0);
            });
        }
        assert_eq!(cuda!(cuDevicePrimaryCtxRetain(&mut context => &mut u64, fixture.ordinal() => i32)), 0);
        assert_eq!(cuda!(cuCtxSetCurrent(context => u64)), 0);
        fixture
    }

    /// The simulated device.
    pub fn device(&self) -> &Device {
        self.simulated.as_ref().expect("this test is of the simulated driver")
    }

    pub fn ordinal(&self) -> i32 {
        self.simulated.as_ref().map_or(0, |d| d.ordinal() as i32)
    }

    /// Reads bytes of device or pinned memory.
    pub fn peek(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        assert_eq!(cuda!(cuMemcpy(out.as_mut_ptr() => *mut u8, address => u64, bytes => usize)), 0);
        out
    }

    pub fn poke(&self, address: u64, bytes: &[u8]) {
        assert_eq!(cuda!(cuMemcpy(address => u64, bytes.as_ptr() => *const u8, bytes.len() => usize)), 0);
        settle();
    }

    pub fn memory(&self, bytes: usize) -> u64 {
        let mut address = 0;
        assert_eq!(cuda!(cuMemAlloc_v2(&mut address => &mut u64, bytes => usize)), 0);
        if is_real() {
            assert_eq!(cuda!(cuMemsetD8_v2(address => u64, 0xCD => u8, bytes => usize)), 0);
            settle();
        }
        address
    }

    pub fn pinned(&self, bytes: usize) -> &'static mut [u8] {
        let mut address = 0_u64;
        assert_eq!(cuda!(cuMemHostAlloc(&mut address => &mut u64, bytes => usize, 0 => u32)), 0);
        // SAFETY: `bytes` were just allocated, and the tests free them only after their last access.
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

/// The committed modules, embedded so that the tests also run without the source.
const PTX: [(&str, &str); 4] = [
    ("digest", include_str!("../../../kernels/digest.ptx")),
    ("gather", include_str!("../../../kernels/gather.ptx")),
    ("late_copy", include_str!("../../../kernels/late_copy.ptx")),
    ("training", include_str!("../../../kernels/training.ptx")),
];

/// A function of a loaded module, which stays loaded as long as the device's context.
#[derive(Clone, Copy)]
pub struct Kernel(u64);

impl Fixture {
    /// Loads one of the project's kernels from its committed PTX.
    pub fn kernel(&self, module: &str, name: &str) -> Kernel {
        let ptx = PTX.iter().find(|(name, _)| *name == module).expect("one of the modules").1;
        let text = CString::new(ptx).unwrap();
        let (mut module, mut function) = (0_u64, 0_u64);
        assert_eq!(cuda!(cuModuleLoadData(&mut module => &mut u64, text.as_ptr() => *const c_char)), 0, "{name}");
        let name_text = CString::new(name).unwrap();
        let code =
            cuda!(cuModuleGetFunction(&mut function => &mut u64, module => u64, name_text.as_ptr() => *const c_char));
        assert_eq!(code, 0, "{name}");
        Kernel(function)
    }

    /// Launches a kernel on a stream; the argument is the kernel's structure.
    pub fn launch<T: Copy>(&self, kernel: Kernel, grid: u32, block: u32, stream: u64, argument: T) -> i32 {
        let parameters = [&raw const argument];
        cuda!(cuLaunchKernel(
            kernel.0 => u64, grid => u32, 1 => u32, 1 => u32, block => u32, 1 => u32, 1 => u32, 0 => u32, stream => u64,
            parameters.as_ptr() => *const *const T, std::ptr::null() => *const u8
        ))
    }

    /// Allocates device memory with these values.
    pub fn upload<T: Copy>(&self, values: &[T]) -> u64 {
        let bytes = std::mem::size_of_val(values);
        // SAFETY: plain values without padding, read as bytes.
        let bytes = unsafe { std::slice::from_raw_parts(values.as_ptr().cast::<u8>(), bytes) };
        let address = self.memory(bytes.len().max(1));
        self.poke(address, bytes);
        address
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        if std::thread::panicking() {
            return;
        }
        let _ = cuda!(cuCtxSetCurrent(0 => u64));
        let _ = cuda!(cuDevicePrimaryCtxRelease_v2(self.ordinal() => i32));
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

/// Waits for the legacy stream: fills, and copies from pageable memory, may still run there when the call
/// returns, and other streams do not wait for them.
fn settle() {
    assert_eq!(cuda!(cuCtxSynchronize()), 0);
}

/// Waits until a stream is done. Returns its error, or 600 after a timeout.
pub fn synchronize(stream: u64) -> i32 {
    let begin = Instant::now();
    loop {
        match cuda!(cuStreamQuery(stream => u64)) {
            600 if begin.elapsed() < Duration::from_secs(20) => std::thread::yield_now(),
            code => return code,
        }
    }
}
