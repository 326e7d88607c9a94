//! Switches for experimental ways of staging, which the benchmarks compare on a GPU. Each switch is off and
//! is not a setting. The faster way becomes the library's behaviour, and its switch is removed.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};

/// Batches of copies ask the driver to overlap them with kernels.
pub static PREFER_OVERLAP: AtomicBool = AtomicBool::new(false);
/// The stager's sleeps end on time, not up to 50 us later.
pub static SHARP_TIMERS: AtomicBool = AtomicBool::new(false);

/// Sets the calling thread's timer slack as `SHARP_TIMERS` says. `now` is the thread's present state.
pub(crate) fn sharpen(now: &mut bool) {
    let sharp = SHARP_TIMERS.load(Ordering::Relaxed);
    if *now != sharp {
        // None means the thread's default slack. If the kernel refuses the call, nothing changes.
        _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1).filter(|_| sharp));
        *now = sharp;
    }
}
