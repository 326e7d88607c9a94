//! Keeps a child of fork(2) from holding the locks of its parent, and from acting in its parent's place.
//!
//! A forked child has copies of all descriptors. A copy keeps a flock(2) after the parent died, so no sweep
//! would ever remove the parent's attempts. A handler in the child therefore closes the descriptors that hold
//! locks, and counts the fork. An object with a [`ForkGuard`] compares this count with the count at its
//! creation, and refuses to act in a child.
//!
//! # Safety argument
//! The handler runs in the child of a process that may have many threads, where only async-signal-safe calls
//! are allowed. It does nothing but atomic operations on statics and close(2). It closes only descriptors
//! that their owner registered here and did not unregister; an owner from before the fork never touches its
//! descriptor in the child.
#![expect(unsafe_code, reason = "pthread_atfork, and close in its handler")]

use crate::error::{Error, Result};
use std::sync::Once;
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};

const FREE: i32 = -1;

static GENERATION: AtomicU64 = AtomicU64::new(0);
static LOCKS: [AtomicI32; 1024] = [const { AtomicI32::new(FREE) }; 1024];

/// Identifies the process that made an object: in a forked child the object's threads, descriptors and saves
/// are the parent's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ForkGuard {
    generation: u64,
}

impl ForkGuard {
    /// A guard of the calling process.
    pub fn new() -> Self {
        Self { generation: generation() }
    }

    /// Returns false in a forked child.
    pub fn is_ours(self) -> bool {
        self.generation == generation()
    }

    /// Refuses to act in a forked child.
    ///
    /// # Errors
    /// `Invalid` in a forked child, with `why`.
    pub fn check(self, why: &str) -> Result<()> {
        if self.is_ours() { Ok(()) } else { Err(Error::invalid(why)) }
    }
}

/// Returns the number of forks between the process that loaded this crate and this process, counted from the
/// crate's first use on.
fn generation() -> u64 {
    static WATCH: Once = Once::new();
    WATCH.call_once(|| {
        // SAFETY: `in_child` is a function for the life of the program, and async-signal-safe (see the safety
        // argument).
        let code = unsafe { libc::pthread_atfork(None, None, Some(in_child)) };
        if code != 0 {
            tracing::warn!(code, "forks cannot be watched");
        }
    });
    GENERATION.load(Ordering::Relaxed)
}

/// Registers a descriptor before it gets a lock. Returns false when the table is full.
pub(crate) fn register(fd: i32) -> bool {
    generation();
    LOCKS.iter().any(|slot| slot.compare_exchange(FREE, fd, Ordering::AcqRel, Ordering::Relaxed).is_ok())
}

/// True when `fd` is registered.
pub(crate) fn is_registered(fd: i32) -> bool {
    LOCKS.iter().any(|slot| slot.load(Ordering::Acquire) == fd)
}

/// Removes a registration.
pub(crate) fn unregister(fd: i32) {
    LOCKS.iter().any(|slot| slot.compare_exchange(fd, FREE, Ordering::AcqRel, Ordering::Relaxed).is_ok());
}

extern "C" fn in_child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    for slot in &LOCKS {
        let fd = slot.swap(FREE, Ordering::AcqRel);
        if fd != FREE {
            // SAFETY: the owner registered the descriptor, and does not touch it in the child.
            unsafe { libc::close(fd) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, IntoRawFd};

    #[test]
    fn a_registered_descriptor_is_closed_in_a_child_and_the_child_knows_that_it_is_one() {
        let kept = tempfile::tempfile().unwrap();
        let locked = tempfile::tempfile().unwrap().into_raw_fd();
        let before = generation();
        assert!(register(locked) && is_registered(locked));
        // SAFETY: the child calls nothing but async-signal-safe functions and leaves by _exit.
        let status = unsafe {
            let child = libc::fork();
            if child == 0 {
                let gone = libc::fcntl(locked, libc::F_GETFD) == -1;
                let there = libc::fcntl(kept.as_raw_fd(), libc::F_GETFD) != -1;
                let counted = GENERATION.load(Ordering::Relaxed) == before + 1;
                libc::_exit(if gone && there && counted { 0 } else { 1 });
            }
            let mut status = 0;
            assert_eq!(libc::waitpid(child, &mut status, 0), child);
            status
        };
        assert_eq!(status, 0);
        assert_eq!(generation(), before);
        unregister(locked);
        assert!(!is_registered(locked));
        // SAFETY: opened above, closed here and nowhere else.
        assert_eq!(unsafe { libc::close(locked) }, 0);
    }
}
