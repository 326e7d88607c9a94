//! The times of one save. The threads that work for the save set them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// One time in nanoseconds: a moment since the call of `save`, or a sum. Zero means that it is not set.
#[derive(Debug, Default)]
pub(crate) struct Time(AtomicU64);

impl Time {
    pub fn add(&self, time: Duration) {
        self.0.fetch_add(nanos(time), Ordering::Relaxed);
    }

    /// Sets the moment, unless it is set.
    pub fn first(&self, moment: Duration) {
        if self.0.load(Ordering::Relaxed) == 0 {
            _ = self.0.compare_exchange(0, nanos(moment).max(1), Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// Sets the moment, unless a later one is set.
    pub fn last(&self, moment: Duration) {
        self.0.fetch_max(nanos(moment), Ordering::Relaxed);
    }

    pub fn micros(&self) -> u64 {
        self.0.load(Ordering::Relaxed) / 1000
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// The times of one save. See the module. Moments count from the call of `save`.
#[derive(Debug, Default)]
pub(crate) struct Times {
    /// How long the call of `save` lasted.
    pub call: Time,
    /// The part of the call in which it waited for earlier saves.
    pub queue: Time,
    /// How long fences waited for this save.
    pub fence: Time,
    /// When the first of those waits began.
    pub fence_at: Time,
    /// How long the stager waited because no slab was free.
    pub arena: Time,
    /// When the stager began.
    pub stage_at: Time,
    /// When the first write began, and when the last one of a shard ended.
    pub write_at: Time,
    pub written: Time,
    /// How long writers digested, summed over all writers. Bytes that the copying thread digested do not
    /// count.
    pub digest: Time,
    /// How long writers waited for the storage, summed over all writers.
    pub write: Time,
    /// How often the save was tried again.
    pub tries: AtomicU64,
}
