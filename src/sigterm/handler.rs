//! The signal handler: wakes the threads of the hooks, then calls the earlier handler. The default effect
//! applies only if there is no hook.
//!
//! The handler is installed with the first hook and stays installed. Without a hook the signal has its
//! earlier effect: it ends the program again, unless another handler is installed. The handler of signal-hook
//! would also stay installed, but would leave the signal without effect.
//!
//! # Safety argument
//! The handler may interrupt any code, so it does only async-signal-safe things: atomic operations on
//! statics, getpid(2), sigaction(2), a non-blocking send(2), a call of the earlier handler, and the default
//! effect by a function made for handlers. It allocates nothing, takes no lock, cannot panic, and restores
//! errno. A descriptor that it sends to is open: a dropped hook frees its slot and waits for running handlers
//! before it closes its socket. The hook waits at most one second, so a thread that a debugger stops inside
//! the handler for longer may send its byte to another socket.
#![expect(unsafe_code, reason = "sigaction, and a handler; argument above")]

use signal_hook::consts::SIGTERM;
use signal_hook::low_level::emulate_default_handler;
use std::ffi::{c_int, c_void};
use std::io::{Error, Result};
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::ptr::null;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The byte that the handler sends.
pub(super) const SIGNAL: u8 = 1;

const FREE: u64 = 0;
/// Upper half: a process; lower half: a descriptor to send to. A forked child inherits the table, but none of
/// the hooks.
static HOOKS: [AtomicU64; 64] = [const { AtomicU64::new(FREE) }; 64];
/// How many threads are in the part of the handler that reads the table.
static RUNNING: AtomicUsize = AtomicUsize::new(0);

/// Whether our handler is installed. `PLAIN` and `DETAILED` hold the earlier one.
static INSTALLED: Mutex<bool> = Mutex::new(false);
static PLAIN: AtomicUsize = AtomicUsize::new(libc::SIG_DFL);
/// The earlier handler if it takes three arguments, else 0. Separate from `PLAIN`, so that no thread ever
/// calls a handler of one kind as one of the other.
static DETAILED: AtomicUsize = AtomicUsize::new(0);

/// While a hook lives, the handler sends bytes to its socket. In a forked child a hook does nothing, even
/// when it is dropped.
#[derive(Debug)]
pub(super) struct Hook {
    slot: &'static AtomicU64,
    value: u64,
}

impl Hook {
    /// Makes the handler send [`SIGNAL`] to `wake` whenever this process gets the signal.
    pub fn new(wake: &UnixStream) -> Result<Self> {
        let mut installed = INSTALLED.lock().unwrap_or_else(PoisonError::into_inner);
        let value = u64::from(std::process::id()) << 32 | u64::from(wake.as_raw_fd().cast_unsigned());
        let free = |slot: &&AtomicU64| !ours(slot.load(SeqCst));
        let slot = HOOKS.iter().find(free).ok_or_else(|| Error::other("there are too many hooks"))?;
        let there = current()?;
        let default = there.sa_sigaction == libc::SIG_DFL || there.sa_sigaction == libc::SIG_IGN;
        // A handler installed over ours calls ours. Installing ours over it again would make the two call
        // each other forever.
        if there.sa_sigaction != address() && (!*installed || default) {
            remember(&there);
            let (mut handler, mut replaced) = (there, there);
            handler.sa_sigaction = address();
            handler.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART | libc::SA_ONSTACK;
            // SAFETY: `handle` may be called for a signal at any time; its mask is that of the earlier
            // handler.
            check(unsafe { libc::sigaction(SIGTERM, &handler, &mut replaced) })?;
            // Another thread may have installed a handler after the call of `current`.
            remember(&replaced);
            *installed = true;
        }
        slot.store(value, SeqCst);
        Ok(Self { slot, value })
    }

    /// True if this process made the hook. False if its parent made it before a fork.
    pub fn is_ours(&self) -> bool {
        ours(self.value)
    }
}

impl Drop for Hook {
    fn drop(&mut self) {
        if !self.is_ours() {
            return;
        }
        self.slot.store(FREE, SeqCst);
        // A handler takes microseconds. If another thread was in it at a fork, the count stays above zero in
        // the child.
        let end = Instant::now() + Duration::from_secs(1);
        while RUNNING.load(SeqCst) > 0 && Instant::now() < end {
            std::thread::yield_now();
        }
    }
}

/// Records the earlier handler for ours to call.
fn remember(before: &libc::sigaction) {
    let detailed = before.sa_flags & libc::SA_SIGINFO != 0;
    DETAILED.store(if detailed { before.sa_sigaction } else { 0 }, SeqCst);
    PLAIN.store(if detailed { libc::SIG_DFL } else { before.sa_sigaction }, SeqCst);
}

fn ours(value: u64) -> bool {
    value >> 32 == u64::from(std::process::id())
}

fn check(code: c_int) -> Result<()> {
    if code == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

/// Returns the installed handler.
fn current() -> Result<libc::sigaction> {
    let mut there = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: the pointer is to memory for one `sigaction`; all zeroes are a valid value.
    unsafe {
        check(libc::sigaction(SIGTERM, null(), there.as_mut_ptr()))?;
        Ok(there.assume_init())
    }
}

fn topmost() -> bool {
    current().is_ok_and(|there| there.sa_sigaction == address())
}

fn address() -> usize {
    handle as extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) as usize
}

extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: errno of this thread; descriptors in the table are open while `RUNNING` counts this thread.
    unsafe {
        let errno = *libc::__errno_location();
        RUNNING.fetch_add(1, SeqCst);
        let mut heard = false;
        for hook in HOOKS.iter().map(|slot| slot.load(SeqCst)).filter(|value| ours(*value)) {
            let (byte, flags) = ([SIGNAL], libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
            libc::send(hook as u32 as c_int, byte.as_ptr().cast(), 1, flags);
            heard = true;
        }
        RUNNING.fetch_sub(1, SeqCst);
        let detailed = DETAILED.load(SeqCst);
        match PLAIN.load(SeqCst) {
            _ if detailed != 0 => {
                // SAFETY: sigaction(2) returned it as a handler of this kind.
                let before: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = std::mem::transmute(detailed);
                before(signal, info, context);
            }
            // Without a hook, as in a forked child, the signal has its default effect, unless a handler above
            // ours handles it.
            libc::SIG_DFL => _ = (!heard && topmost()).then(|| emulate_default_handler(signal)),
            libc::SIG_IGN => {}
            before => {
                // SAFETY: sigaction(2) returned it as a handler of this kind.
                let before: extern "C" fn(c_int) = std::mem::transmute(before);
                before(signal);
            }
        }
        *libc::__errno_location() = errno;
    }
}
