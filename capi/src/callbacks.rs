//! Calls the program's functions.
//!
//! # Safety argument
//! The program promises that any thread may call its functions with the context that it gave. A C++ function
//! may throw. Its type says so (`C-unwind`), and an `extern "C"` function in this file makes each call and
//! aborts the process when something unwinds through it. So an exception never reaches a Rust frame, whose
//! locks and state it would leave behind.
#![expect(unsafe_code, reason = "calls of the program's functions; argument above")]

use std::ffi::{c_char, c_void};

pub type Release = unsafe extern "C-unwind" fn(*mut c_void);
pub type Done = unsafe extern "C-unwind" fn(*mut c_void, i32, *const c_char);
pub type Gather = unsafe extern "C-unwind" fn(*mut c_void, *const c_void, usize, *mut c_void, f64) -> i32;
pub type Log = unsafe extern "C-unwind" fn(*mut c_void, i32, *const c_char);

/// The program's context for a callback, which any thread may pass on.
#[derive(Clone, Copy)]
pub struct Context(pub *mut c_void);

// SAFETY: the pointer is only passed on, and the program promises that any thread may do so.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Releases an object of the program once, when it is dropped.
pub struct Released(pub Release, pub Context);

impl Drop for Released {
    fn drop(&mut self) {
        // SAFETY: the program's function, called once.
        unsafe { release(self.0, self.1.0) }
    }
}

/// # Safety
/// The program's function, with its context.
unsafe extern "C" fn release(function: Release, context: *mut c_void) {
    // SAFETY: the caller guarantees this.
    unsafe { function(context) }
}

/// # Safety
/// The program's function, with its context.
pub unsafe extern "C" fn done(function: Done, context: *mut c_void, kind: i32, error: *const c_char) {
    // SAFETY: the caller guarantees this.
    unsafe { function(context, kind, error) }
}

/// # Safety
/// The program's function, with its context. `all` has space for `bytes` bytes from each rank.
pub unsafe extern "C" fn gather(
    function: Gather,
    context: *mut c_void,
    mine: *const c_void,
    bytes: usize,
    all: *mut c_void,
    seconds: f64,
) -> i32 {
    // SAFETY: the caller guarantees this.
    unsafe { function(context, mine, bytes, all, seconds) }
}

/// # Safety
/// The program's function, with its context.
pub unsafe extern "C" fn log(function: Log, context: *mut c_void, level: i32, text: *const c_char) {
    // SAFETY: the caller guarantees this.
    unsafe { function(context, level, text) }
}
