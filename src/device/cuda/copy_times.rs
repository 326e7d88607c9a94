//! Measures, for a trace, when a copy stream made its copies. Timed events are created only while a trace
//! asks for them.
//!
//! **Clocks.** Once for each save, an *anchor* compares the device's clock with the host's. An anchor is an
//! event in a stream that has no other work. The device reached it between two readings of the host's clock,
//! and half of the time between these readings is the error.
//! **Bounds.** The device makes copies after the host has queued them and before the host sees that they have
//! ended. A time outside these bounds, for example because the two clocks drift apart, is moved to the nearer
//! bound, and its error then says how far it was moved.

use super::driver::Stream;
use super::gpu::Gpu;
use super::pooled_event::PooledEvent;
use crate::device::CopyTime;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Maximum time for a device to reach an anchor. After it, copies are timed by their bounds alone.
const ANCHOR_TIMEOUT: Duration = Duration::from_millis(5);
/// The smallest difference of times that the driver can report, in milliseconds.
const RESOLUTION: f64 = 0.0005;

/// The timer of one copy stream.
#[derive(Default)]
pub(super) struct CopyTimer {
    on: bool,
    /// The stream of anchors, made at the first one.
    stream: Option<Stream>,
    /// The anchor of this save; None before its first copy.
    anchor: Option<Option<Arc<Anchor>>>,
    begun: Option<Begun>,
}

/// The beginning of copies that are not yet covered by a completion event.
pub(super) struct Begun {
    queued: Instant,
    /// An event in the copy stream before the first copy, and the anchor of its clock.
    event: Option<(PooledEvent, Arc<Anchor>)>,
}

/// An event, and the host's time at which it was reached.
struct Anchor {
    event: PooledEvent,
    at: Instant,
    error: Duration,
}

impl CopyTimer {
    /// Begins another save. `on` says whether to time its copies.
    pub fn measure(&mut self, on: bool) {
        (self.on, self.anchor, self.begun) = (on, None, None);
    }

    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Called before each copy is queued. A refusal of the driver here does not fail the save.
    pub fn begin(&mut self, gpu: &Gpu, copies: &Stream) {
        if !self.on || self.begun.is_some() {
            return;
        }
        let anchor = match &self.anchor {
            Some(anchor) => anchor.clone(),
            None => {
                let anchor = self.anchor(gpu).map(Arc::new);
                if let Err(error) = &anchor {
                    tracing::debug!(%error, "copies are traced without the device's clock");
                }
                self.anchor.insert(anchor.ok()).clone()
            }
        };
        let recorded = |event: PooledEvent| event.record(copies.handle()).map(|()| event);
        let queued = Instant::now();
        let event = anchor.and_then(|anchor| Some((gpu.timed_event().and_then(recorded).ok()?, anchor)));
        self.begun = Some(Begun { queued, event });
    }

    fn anchor(&mut self, gpu: &Gpu) -> Result<Anchor> {
        let stream = match &self.stream {
            Some(stream) => stream,
            None => self.stream.insert(gpu.context.stream()?),
        };
        let event = gpu.timed_event()?;
        let before = Instant::now();
        event.record(stream.handle())?;
        while !event.is_reached()? {
            if before.elapsed() >= ANCHOR_TIMEOUT {
                return Err(Error::new(ErrorKind::Device, "a device took too long to reach an event"));
            }
            std::thread::yield_now();
        }
        let error = before.elapsed() / 2;
        let wrong = if mutant::on(Mutant::Anchor) { Duration::from_secs(3600) } else { Duration::ZERO };
        Ok(Anchor { event, at: before + error + wrong, error })
    }

    /// Takes the beginning of the copies since the last completion event.
    pub fn take(&mut self) -> Option<Begun> {
        self.begun.take()
    }
}

impl Begun {
    /// The time of the copies before `end`, which the host saw as reached at `seen`.
    pub fn until(self, end: &PooledEvent, seen: Instant) -> CopyTime {
        let (ordinal, queued) = (end.context().ordinal, self.queued);
        let measured = self.event.and_then(|(begin, anchor)| {
            let millis = [begin.millis_since(&anchor.event).ok()?, end.millis_since(&anchor.event).ok()?];
            placed((anchor.at, anchor.error), millis, (queued, seen))
        });
        let ([begin, end], error) = measured.unwrap_or(([queued, seen], seen.saturating_duration_since(queued)));
        CopyTime { ordinal, begin, end, error }
    }
}

/// The host's times of two moments `millis` after an anchor, moved into the bounds, and their maximum error.
fn placed(
    anchor: (Instant, Duration),
    millis: [f32; 2],
    bounds: (Instant, Instant),
) -> Option<([Instant; 2], Duration)> {
    let mut error = anchor.1;
    let mut place = |millis: f32| {
        let distance = f64::from(millis.abs());
        let time = Duration::try_from_secs_f64(distance / 1e3).ok()?;
        let told = if millis < 0.0 { anchor.0.checked_sub(time)? } else { anchor.0.checked_add(time)? };
        let moved = told.clamp(bounds.0, bounds.1);
        let step = Duration::from_secs_f64(RESOLUTION.max(distance * f64::from(f32::EPSILON)) / 1e3);
        let shift = told.max(moved) - told.min(moved);
        error = error.max(anchor.1 + step).max(shift);
        Some(moved)
    };
    let (begin, end) = (place(millis[0])?, place(millis[1])?);
    Some(([begin, end.max(begin)], error))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn times_are_told_from_an_anchor_with_the_error_of_both_clocks() {
        let anchor = Instant::now() + 60 * 60 * 1000 * MS;
        let bounds = (anchor - 100 * MS, anchor + 60 * 60 * 1000 * MS);
        let ([begin, end], error) = placed((anchor, MS / 100), [-1.5, 2.0], bounds).unwrap();
        assert_eq!((anchor - begin, end - anchor), (MS * 3 / 2, MS * 2));
        assert_eq!(error, MS / 100 + MS / 2000);
        // A float has a step of 4 ms after thirteen hours; this time is half an hour.
        let ([_, end], error) = placed((anchor, MS / 100), [0.0, 1_800_000.0], bounds).unwrap();
        assert_eq!(end - anchor, 1_800_000 * MS);
        assert!(error > MS / 5 && error < MS / 4, "{error:?}");
    }

    #[test]
    fn times_beyond_what_the_host_saw_are_moved_and_the_error_says_how_far() {
        let anchor = Instant::now() + 1000 * MS;
        let bounds = (anchor + MS, anchor + 4 * MS);
        let ([begin, end], error) = placed((anchor, MS / 100), [0.5, 7.0], bounds).unwrap();
        assert_eq!((begin, end, error), (bounds.0, bounds.1, 3 * MS));
        for nonsense in [f32::NAN, f32::INFINITY] {
            assert_eq!(placed((anchor, MS), [0.0, nonsense], bounds), None);
        }
    }
}
