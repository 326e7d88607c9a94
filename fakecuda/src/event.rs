//! Events are counters of generations. Recording an event starts a new generation. A wait is for the
//! generation at the time it was enqueued, even if the event is recorded again later in another stream that
//! reaches it sooner.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub struct Event {
    pub ordinal: usize,
    /// True if the event has no timing.
    pub timeless: bool,
    recorded: AtomicU64,
    reached: Mutex<Reached>,
    /// The capture in which the event was last recorded.
    captured: Mutex<Option<u64>>,
    at: Mutex<Option<Instant>>,
}

/// Reached generations: all up to the first number, and all in the set.
#[derive(Default)]
struct Reached(u64, BTreeSet<u64>);

impl Event {
    pub fn new(ordinal: usize, timeless: bool) -> Self {
        let (recorded, reached) = (AtomicU64::new(0), Mutex::default());
        Self { ordinal, timeless, recorded, reached, captured: Mutex::new(None), at: Mutex::new(None) }
    }

    /// Starts a generation for a record that is being enqueued, and returns the generation.
    pub fn record(&self) -> u64 {
        *self.captured.lock().unwrap_or_else(|e| e.into_inner()) = None;
        self.recorded.fetch_add(1, Ordering::AcqRel) + 1
    }

    pub fn record_in_capture(&self, capture: u64) {
        *self.captured.lock().unwrap_or_else(|e| e.into_inner()) = Some(capture);
    }

    pub fn captured(&self) -> Option<u64> {
        *self.captured.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// The generation that was last enqueued; 0 if the event was never recorded.
    pub fn generation(&self) -> u64 {
        self.recorded.load(Ordering::Acquire)
    }

    /// Marks a generation as reached by its stream.
    pub fn reach(&self, generation: u64) {
        *self.at.lock().unwrap_or_else(|e| e.into_inner()) = Some(Instant::now());
        let mut reached = self.reached.lock().unwrap_or_else(|e| e.into_inner());
        reached.1.insert(generation);
        while reached.1.first().is_some_and(|&next| next <= reached.0 + 1) {
            reached.0 = reached.1.pop_first().unwrap_or(0).max(reached.0);
        }
    }

    pub fn has_reached(&self, generation: u64) -> bool {
        let reached = self.reached.lock().unwrap_or_else(|e| e.into_inner());
        generation <= reached.0 || reached.1.contains(&generation)
    }

    /// When the event was last reached.
    pub fn at(&self) -> Option<Instant> {
        *self.at.lock().unwrap_or_else(|e| e.into_inner())
    }
}
