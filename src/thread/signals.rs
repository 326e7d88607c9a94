//! Blocks signals in the threads of this library.
//!
//! # Safety argument
//! The set is a local value, and the call that empties it writes it before anything reads it. Only the signal
//! mask of the calling thread changes.
#![expect(unsafe_code, reason = "system calls without safe bindings; argument above")]

/// Makes a write of the calling thread beyond `RLIMIT_FSIZE` return an error instead of ending the process.
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
