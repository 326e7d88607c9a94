//! Calls functions of the library by name.

use crate::fixture::is_real;
use std::ffi::{CString, c_void};
use std::sync::OnceLock;

/// Returns the address of a symbol; null if it does not exist.
pub fn find(name: &str) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let opened = *LIBRARY.get_or_init(|| {
        let path = if is_real() { "libcuda.so.1".into() } else { fakecuda::library() };
        let path = CString::new(path.into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: opening it runs nothing but the loader.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) as usize }
    });
    assert_ne!(opened, 0, "there is no driver to open");
    let symbol = |name: &str| {
        let name = CString::new(name).unwrap();
        // SAFETY: the library stays open.
        unsafe { libc::dlsym(opened as *mut c_void, name.as_ptr()) }
    };
    assert!(!is_real() || symbol("fakecuda_live").is_null(), "a real device was asked for");
    symbol(name)
}

/// `cuda!(cuFunction(value => type, ...))`: its result code.
macro_rules! cuda {
    ($name:ident($($argument:expr => $type:ty),* $(,)?)) => {{
        let found = $crate::symbols::find(stringify!($name));
        assert!(!found.is_null(), "{} is not there", stringify!($name));
        // SAFETY: the types are those of the function, and what they point to outlives the call.
        let function = unsafe { std::mem::transmute::<*mut std::ffi::c_void, extern "C" fn($($type),*) -> i32>(found) };
        function($($argument),*)
    }};
}
pub(crate) use cuda;
