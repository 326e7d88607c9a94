//! The stager's state of a device: its copy queue, and the deferred releases.

use super::deferred::DeferredRelease;
use super::in_flight::InFlightSaves;
use crate::device::CopyQueue;
use crate::guard::{dropped, guarded};
use std::mem::forget;
use std::time::Instant;

/// The stager's state of a device.
#[derive(Default)]
pub(super) struct DeviceState {
    pub queue: Option<Box<dyn CopyQueue>>,
    pub deferred: Vec<DeferredRelease>,
    /// The queue panicked inside [`DeviceState::recover`], and is not called any more.
    pub broken: bool,
}

impl DeviceState {
    /// Releases the objects that are no longer in use.
    pub fn recover(&mut self, saves: &InFlightSaves) {
        let Self { queue, deferred, broken } = self;
        let mut ended = None;
        let mut quiet = || *ended.get_or_insert_with(|| ended_now(queue, broken));
        let over = |release: &mut DeferredRelease| {
            let copies = release.waits_for_copies();
            !release.kept().in_use() && (!copies || quiet())
        };
        deferred.extract_if(.., over).for_each(|release| release.release(saves));
        if self.broken {
            self.leak(saves, DeferredRelease::waits_for_copies);
        }
    }

    /// Releases the objects that are no longer in use, and leaks the other releases that `which` selects.
    pub fn give_up(&mut self, saves: &InFlightSaves, which: impl Fn(&DeferredRelease) -> bool) {
        self.recover(saves);
        self.leak(saves, which);
    }

    /// Drops the queue, and leaks the releases that wait for its copies. The next save gets another queue.
    pub fn lose(&mut self, saves: &InFlightSaves) {
        self.give_up(saves, DeferredRelease::waits_for_copies);
        dropped(self.queue.take());
        self.broken = false;
    }

    fn leak(&mut self, saves: &InFlightSaves, which: impl Fn(&DeferredRelease) -> bool) {
        self.deferred.extract_if(.., |release| which(release)).for_each(|release| release.leak(saves));
    }
}

impl Drop for DeviceState {
    fn drop(&mut self) {
        forget(std::mem::take(&mut self.deferred));
        dropped(self.queue.take());
    }
}

/// True if all copies of the queue have ended. False if the queue panics, which sets `broken`.
fn ended_now(queue: &mut Option<Box<dyn CopyQueue>>, broken: &mut bool) -> bool {
    let Some(queue) = queue.as_mut().filter(|_| !*broken) else { return false };
    guarded("a device panicked", || Ok(queue.quiesce(Instant::now()))).unwrap_or_else(|error| {
        tracing::error!(error = format_args!("{error:#}"), "the queue of copies is given up");
        *broken = true;
        false
    })
}
