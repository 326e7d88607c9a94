//! The control interface for tests: symbols beside those of the driver, and functions that call these symbols
//! in the library that a test opened.

use crate::abi::{Status, text};
use crate::settings::Fault;
use crate::work::Spot;
use std::collections::BTreeSet;
use std::ffi::{CString, c_char, c_void};
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, OnceLock, PoisonError};

macro_rules! steer {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $result:ty $body:block)*) => { $(
        // SAFETY: the symbol is this library's own.
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> $result $body
    )* };
}

fn code(result: Status) -> i32 {
    result.err().unwrap_or(0)
}

steer! {
    fn fakecuda_live() -> i32 { 1 }

    fn fakecuda_set(ordinal: u64, name: *const c_char, value: u64) -> i32 {
        code((|| {
            let device = crate::device::get(ordinal as usize)?;
            device.state().settings.set(&text(name)?, value)?;
            device.changed();
            Ok(())
        })())
    }

    fn fakecuda_fault(ordinal: u64, fault: *const c_char) -> i32 {
        code((|| {
            let fault = Fault::parse(&text(fault)?)?;
            crate::device::get(ordinal as usize)?.state().faults.push(fault);
            Ok(())
        })())
    }

    fn fakecuda_left(ordinal: u64, name: *const c_char) -> u64 {
        let (Ok(device), Ok(name)) = (crate::device::get(ordinal as usize), text(name)) else { return 0 };
        let state = device.state();
        let (live, lost) = (state.live(device.ordinal), &state.lost);
        live.get(name.as_str()).unwrap_or(&0) + lost.get(name.as_str()).unwrap_or(&0)
    }

    fn fakecuda_calls(ordinal: u64, name: *const c_char) -> u64 {
        let (Ok(device), Ok(name)) = (crate::device::get(ordinal as usize), text(name)) else { return 0 };
        let state = device.state();
        let counted = state.calls.iter().filter(|(n, _)| name == "*" || **n == name);
        counted.map(|(_, n)| n).sum()
    }

    fn fakecuda_sticky(ordinal: u64) -> i32 {
        crate::device::get(ordinal as usize).ok().and_then(|d| d.state().sticky).unwrap_or(0)
    }

    fn fakecuda_reset(ordinal: u64) -> i32 {
        code(crate::device::get(ordinal as usize).and_then(|d| d.reset()))
    }

    fn fakecuda_peek(address: u64, to: *mut u8, bytes: u64) -> i32 {
        code((|| {
            let spot = Spot::of(address, bytes)?;
            let (from, _in_use) = spot.pointer()?;
            // SAFETY: the source was checked to have `bytes`; the caller vouches for `to`.
            unsafe { std::ptr::copy(from, to, bytes as usize) };
            Ok(())
        })())
    }

    fn fakecuda_poke(address: u64, from: *const u8, bytes: u64) -> i32 {
        code((|| {
            let spot = Spot::of(address, bytes)?;
            let (to, _in_use) = spot.pointer()?;
            // SAFETY: the destination was checked to have `bytes`; the caller vouches for `from`.
            unsafe { std::ptr::copy(from, to, bytes as usize) };
            Ok(())
        })())
    }
}

/// Returns the file to open as a driver. Cargo puts it beside the test programs of every crate that has this
/// crate among its dev-dependencies.
///
/// # Panics
/// When the file is missing, because it was not built.
pub fn library() -> PathBuf {
    let program = std::env::current_exe().expect("a program has a path");
    let folders = program.ancestors().skip(1).take(3);
    let mut files = folders.flat_map(|f| [f.join("libfakecuda.so"), f.join("deps/libfakecuda.so")]);
    files.find(|f| f.exists()).expect("libfakecuda.so lies beside the test program")
}

/// A simulated device, borrowed by one test. Settings, faults and counts are per device, so tests with
/// different devices run in parallel. When dropped, the device is reset and returned.
#[derive(Debug)]
pub struct Device {
    ordinal: u64,
}

/// Objects of a device that were not released. All counts should be zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Live {
    /// Bytes of device memory.
    pub bytes: u64,
    /// Allocations of device memory.
    pub blocks: u64,
    /// Allocations of pinned memory.
    pub host: u64,
    /// Registered ranges.
    pub registered: u64,
    /// Streams.
    pub streams: u64,
    /// Events.
    pub events: u64,
    /// Modules.
    pub modules: u64,
    /// Graphs and executable graphs.
    pub graphs: u64,
}

static BORROWED: Mutex<BTreeSet<u64>> = Mutex::new(BTreeSet::new());
static RETURNED: Condvar = Condvar::new();

/// Finds a symbol in the library that programs open as a driver.
fn symbol(name: &str) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let opened = *LIBRARY.get_or_init(|| {
        let path = CString::new(library().into_os_string().into_encoded_bytes()).expect("a path has no zero byte");
        // SAFETY: opening the library runs only the loader.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) as usize }
    });
    assert!(opened != 0, "libfakecuda.so cannot be opened");
    let name = CString::new(name).expect("a name has no zero byte");
    // SAFETY: the handle is open and stays so.
    let found = unsafe { libc::dlsym(opened as *mut c_void, name.as_ptr()) };
    assert!(!found.is_null(), "libfakecuda.so has no such symbol");
    found
}

macro_rules! steered {
    ($name:ident($($argument:expr => $type:ty),*) -> $result:ty) => {{
        let found = symbol(stringify!($name));
        // SAFETY: the symbol is the function above with this signature; pointers among the arguments outlive
        // the call.
        unsafe { std::mem::transmute::<*mut c_void, extern "C" fn($($type),*) -> $result>(found)($($argument),*) }
    }};
}

impl Device {
    /// Borrows a device that no other test uses, and waits until there is one.
    pub fn claim() -> Self {
        let mut borrowed = BORROWED.lock().unwrap_or_else(PoisonError::into_inner);
        let count = crate::settings::number("devices").unwrap_or(16);
        loop {
            if let Some(ordinal) = (0..count).find(|o| !borrowed.contains(o)) {
                borrowed.insert(ordinal);
                let device = Self { ordinal };
                device.reset();
                return device;
            }
            borrowed = RETURNED.wait(borrowed).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// The ordinal for `cuDeviceGet`.
    pub fn ordinal(&self) -> usize {
        self.ordinal as usize
    }

    /// Changes a setting. The names of the settings are in `README.md`.
    ///
    /// # Panics
    /// When the setting does not exist.
    pub fn set(&self, name: &str, value: u64) {
        let text = CString::new(name).expect("a name has no zero byte");
        let code = steered!(fakecuda_set(self.ordinal => u64, text.as_ptr() => *const c_char, value => u64) -> i32);
        assert_eq!(code, 0, "no setting {name}");
    }

    /// Makes a call fail: `name:nth:code[:async]`.
    ///
    /// # Panics
    /// When the text is not of that form.
    pub fn fault(&self, fault: &str) {
        let text = CString::new(fault).expect("a fault has no zero byte");
        let code = steered!(fakecuda_fault(self.ordinal => u64, text.as_ptr() => *const c_char) -> i32);
        assert_eq!(code, 0, "no fault {fault}");
    }

    /// Counts the objects that were not released, including those left when the context ended.
    pub fn live(&self) -> Live {
        let count = |name: &str| {
            let text = CString::new(name).expect("a name has no zero byte");
            steered!(fakecuda_left(self.ordinal => u64, text.as_ptr() => *const c_char) -> u64)
        };
        Live {
            bytes: count("bytes"),
            blocks: count("blocks"),
            host: count("host"),
            registered: count("registered"),
            streams: count("streams"),
            events: count("events"),
            modules: count("modules"),
            graphs: count("graphs"),
        }
    }

    /// Number of calls of a function while this device was current; `*` counts all calls.
    pub fn calls(&self, name: &str) -> u64 {
        let text = CString::new(name).expect("a name has no zero byte");
        steered!(fakecuda_calls(self.ordinal => u64, text.as_ptr() => *const c_char) -> u64)
    }

    /// The sticky error, or 0.
    pub fn sticky(&self) -> i32 {
        steered!(fakecuda_sticky(self.ordinal => u64) -> i32)
    }

    /// Resets the device, except the number of times its context is retained.
    pub fn reset(&self) {
        steered!(fakecuda_reset(self.ordinal => u64) -> i32);
    }

    /// Reads device or pinned memory now, regardless of streams.
    ///
    /// # Panics
    /// When the range is not allocated.
    pub fn peek(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        let code = steered!(fakecuda_peek(address => u64, out.as_mut_ptr() => *mut u8, bytes as u64 => u64) -> i32);
        assert_eq!(code, 0, "{address:#x} is not allocated");
        out
    }

    /// Writes device or pinned memory now, regardless of streams.
    ///
    /// # Panics
    /// When the range is not allocated.
    pub fn poke(&self, address: u64, bytes: &[u8]) {
        let code =
            steered!(fakecuda_poke(address => u64, bytes.as_ptr() => *const u8, bytes.len() as u64 => u64) -> i32);
        assert_eq!(code, 0, "{address:#x} is not allocated");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.reset();
        BORROWED.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.ordinal);
        RETURNED.notify_one();
    }
}
