//! Signals that are not for the threads of this library.
//!
//! # Safety argument
//! The set is a local value that is written by the call which makes it empty before anything reads it, and the mask that is
//! changed is that of the calling thread alone.
#![expect(unsafe_code, reason = "system calls without safe bindings; argument above")]

/// A write beyond `RLIMIT_FSIZE` made by the calling thread is an error from now on, and does not end the process.
pub(crate) fn outlive_file_limits() {
    let mut set = std::mem::MaybeUninit::uninit();
    // SAFETY: see the module.
    let refused = unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGXFSZ);
        libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut())
    };
    if refused != 0 {
        tracing::warn!(errno = refused, "a write beyond the limit for files would end this process");
    }
}
