//! Calling a function of the library by its name.

use std::ffi::{CString, c_void};
use std::sync::OnceLock;

/// The address of a symbol; null when there is none.
pub fn find(name: &str) -> *mut c_void {
    static LIBRARY: OnceLock<usize> = OnceLock::new();
    let opened = *LIBRARY.get_or_init(|| {
        let path = CString::new(fakecuda::library().into_os_string().into_encoded_bytes()).unwrap();
        // SAFETY: opening it runs nothing but the loader.
        unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) as usize }
    });
    assert_ne!(opened, 0);
    let name = CString::new(name).unwrap();
    // SAFETY: the library stays open.
    unsafe { libc::dlsym(opened as *mut c_void, name.as_ptr()) }
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
