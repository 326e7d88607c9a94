//! Tells which library was loaded.
#![expect(unsafe_code, reason = "exported names")]

use std::ffi::c_char;

/// The number of this ABI. It is raised when callers must be compiled again. Otherwise, only functions are
/// added, and members at the end of structs that begin with `size`.
pub const ASHORE_ABI: u32 = 1;

/// Returns the ASHORE_ABI of the library that was loaded.
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub extern "C" fn ashore_abi() -> u32 {
    ASHORE_ABI
}

/// Returns the version of the library that was loaded, such as "0.1.0".
// SAFETY: the name starts with the prefix of this library.
#[unsafe(no_mangle)]
pub extern "C" fn ashore_version() -> *const c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
