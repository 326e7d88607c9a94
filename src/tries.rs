//! Ways of staging that the benchmarks compare on a GPU. Each is off, and no setting; the faster one becomes what the library does,
//! and its switch goes.

use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, Ordering};

/// Batches of copies ask the driver to overlap them with kernels.
pub static PREFER_OVERLAP: AtomicBool = AtomicBool::new(false);
/// The stager's sleeps end when they are due, and not up to 50 us later.
pub static SHARP_TIMERS: AtomicBool = AtomicBool::new(false);

/// Gives the calling thread the timer slack that `SHARP_TIMERS` asks for. `now` is whether it has it.
pub(crate) fn sharpen(now: &mut bool) {
    let sharp = SHARP_TIMERS.load(Ordering::Relaxed);
    if *now != sharp {
        // None is the default of the thread. A kernel that refuses leaves it as it is.
        _ = rustix::thread::set_current_timer_slack(NonZeroU64::new(1).filter(|_| sharp));
        *now = sharp;
    }
}
