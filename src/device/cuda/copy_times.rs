//! When a copy stream made its copies, for a trace. The timed events are made only while it is asked for.
//!
//! **Clocks.** A device's clock is compared with the host's once for each save, by an *anchor*: an event in a
//! stream that has nothing else to do. It was reached between two readings of the host's clock; half of the
//! time between them is its error.
//! **Bounds.** Copies are made after the host has queued them and before it sees that they have ended. Times
//! beyond these bounds, as of clocks that run apart, are moved to them, and the error then says how far.

use super::driver::Stream;
use super::gpu::Gpu;
use super::pooled_event::PooledEvent;
use crate::device::CopyTime;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a device may take to reach an anchor. Copies are then timed by their bounds alone.
const ANCHOR_TIMEOUT: Duration = Duration::from_millis(5);
/// The least difference of times that the driver tells apart, in milliseconds.
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

/// The beginning of copies that no completion event is behind yet.
pub(super) struct Begun {
    queued: Instant,
    /// In the copy stream before the first copy, and what it is compared with.
    event: Option<(PooledEvent, Arc<Anchor>)>,
}

/// An event, and when it was reached.
struct Anchor {
    event: PooledEvent,
    at: Instant,
    error: Duration,
}

impl CopyTimer {
    /// Begins another save, whose copies are timed or not.
    pub fn measure(&mut self, on: bool) {
        (self.on, self.anchor, self.begun) = (on, None, None);
    }

    pub fn is_on(&self) -> bool {
        self.on
    }

    /// Called before each copy is queued. What the driver refuses here is no error of the save.
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

    /// What was begun since the last completion event.
    pub fn take(&mut self) -> Option<Begun> {
        self.begun.take()
    }
}

impl Begun {
    /// The time of the copies before `end`, which the host saw to be reached at `seen`.
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

/// The host's times of two moments `millis` after an anchor, within the bounds, and how far they may be off.
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
        // A float has a step of 4 ms after thirteen hours; here it is half of an hour.
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
