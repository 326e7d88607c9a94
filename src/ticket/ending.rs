//! Reports the end of a save, and how long the save blocked its callers.

use super::Ticket;
use crate::error::{Error, ErrorKind, Result};
use crate::outcome::Outcome;
use crate::telemetry::{Ended, SaveLine, Telemetry, Work, micros, unix_micros};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

/// The maximum number of characters of an error in a line.
const WHY_MAX: usize = 200;

impl Ticket {
    /// Sets the telemetry that receives the end of the save. The first call decides.
    pub fn tell_to(&self, telemetry: Arc<Telemetry>) {
        if let Some(trace) = telemetry.begin(self.step, self.began) {
            _ = self.trace.set(trace);
        }
        _ = self.telemetry.set(telemetry);
    }

    /// The line that reports an end with `result`. None if no telemetry is set, or the save has ended before.
    pub(super) fn line(&self, result: &Result<Outcome>) -> Option<SaveLine> {
        self.telemetry.get()?;
        if self.done.is_complete() {
            return None;
        }
        let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
        let (times, extent, took) = (&self.times, self.extent(), self.began.elapsed());
        let failed = result.as_ref().err();
        Some(SaveLine {
            step: self.step,
            at: unix_micros(SystemTime::now()).saturating_sub(micros(took)),
            end: match result {
                Ok(Outcome::Durable(_)) => Ended::Durable,
                Ok(Outcome::Skipped { .. }) => Ended::Skipped,
                Ok(Outcome::Superseded { .. }) => Ended::Superseded,
                Err(error) if error.kind() == ErrorKind::Indeterminate => Ended::Indeterminate,
                Err(_) => Ended::Failed,
            },
            kind: failed.map(|error| format!("{:?}", error.kind()).to_lowercase()).unwrap_or_default(),
            why: failed.map(shortened).unwrap_or_default(),
            elsewhere: extent.place.parent.is_some(),
            bytes: extent.bytes,
            staged_bytes: count(&self.bytes_staged),
            written_bytes: count(&self.bytes_written),
            chunks: extent.chunks as u64,
            call: times.call.micros(),
            queue: times.queue.micros(),
            fence: times.fence.micros(),
            fence_at: times.fence_at.micros(),
            arena: times.arena.micros(),
            stage_at: times.stage_at.micros(),
            staged: count(&self.staged_nanos) / 1000,
            write_at: times.write_at.micros(),
            written: times.written.micros(),
            ended: micros(took),
            digest: times.digest.micros(),
            write: times.write.micros(),
            tries: count(&times.tries),
            late: self.late_chunks.load(Ordering::Relaxed) as u64,
            lost: 0,
        })
    }

    /// Reports the end, if this call has ended the save.
    pub(super) fn tell(&self, line: Option<SaveLine>, ended: bool) {
        if let (Some(telemetry), Some(line), true) = (self.telemetry.get(), line, ended) {
            telemetry.tell(line, self.traced());
        }
    }

    /// Counts a call of `save` that has blocked its caller since `began`. Of that time, the call waited
    /// `queue` for earlier saves.
    pub fn add_call(&self, began: Instant, queue: Duration) {
        let call = began.elapsed();
        self.times.call.add(call);
        self.times.queue.add(queue);
        self.add_blocked(call);
        self.trace(Work::Call, self.is_traced().then_some(began));
    }

    /// Counts a fence that has waited since `began`.
    pub fn add_fence(&self, began: Instant) {
        self.times.fence_at.first(began.saturating_duration_since(self.began));
        self.times.fence.add(began.elapsed());
        self.add_blocked(began.elapsed());
        self.trace(Work::Fence, self.is_traced().then_some(began));
    }

    fn add_blocked(&self, time: Duration) {
        self.blocked_nanos.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// The message of an error, without its sources.
fn shortened(error: &Error) -> String {
    error.message().chars().take(WHY_MAX).collect()
}
