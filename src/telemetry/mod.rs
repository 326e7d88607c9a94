//! What an executor tells of its saves: a line in the run log, and metrics.
//!
//! **Who writes.** The thread that ends a save leaves a [`SaveLine`] in a bounded queue; a thread of its own
//! writes it. So neither a caller nor the stager touches storage or a recorder of the program. **Failure.**
//! Nothing here can fail a save. A line that finds the queue full, because the disk hangs, is dropped and
//! counted. **End.** [`Telemetry::close`] comes after the other threads of the executor have ended.

mod line;
mod log;
pub(crate) mod meters;
mod times;

pub use line::{Closed, Ended, Entry, Head, Run, SaveLine, runs};
pub(crate) use times::Times;

use crate::completion::Signal;
use crate::guard::logged;
use crate::own_threads;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
pub(crate) use log::Root;
use log::RunLog;
use meters::Meters;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The name of the thread.
pub(crate) const NAME: &str = "ashore-tell";

/// Number of saves that may end while the thread writes the line of one.
const QUEUE: usize = 256;
/// How often the metrics of the present state are set.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// The present state of an executor, for metrics.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "only metrics read it"))]
pub(crate) struct Sample {
    /// Bytes of the arena, and how many of them chunks hold.
    pub arena: u64,
    pub arena_used: u64,
    /// The saves that have not ended.
    pub unfinished: usize,
    /// When the oldest of them was called.
    pub oldest: Option<Instant>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Telemetry {
    queue: Sender<Box<SaveLine>>,
    lines: Receiver<Box<SaveLine>>,
    /// Lines that found the queue full.
    lost: AtomicU64,
    closed: AtomicBool,
}

/// What the thread writes to.
pub(crate) struct Sinks {
    /// The root of the run log and its first line; None: no run log.
    pub log: Option<(Root, Head)>,
    /// The label `store` of metrics.
    pub store: &'static str,
    pub engine: &'static str,
}

impl Telemetry {
    pub fn new() -> Self {
        let (queue, lines) = bounded(QUEUE);
        Self { queue, lines, lost: AtomicU64::new(0), closed: AtomicBool::new(false) }
    }

    /// Leaves the line of a save that has ended. Never waits.
    pub fn tell(&self, line: SaveLine) {
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        if let Err(TrySendError::Full(_)) = self.queue.try_send(Box::new(line)) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Lets the thread end once the queue is empty.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // Wakes the thread. In a full queue there is a line that does.
        _ = self.queue.try_send(Box::default());
    }

    /// The body of the thread. `sample` reads the present state.
    pub fn run(&self, sinks: Sinks, signal: &Arc<Signal>, sample: impl Fn() -> Sample) {
        own_threads::mark(signal);
        let Sinks { log, store, engine } = sinks;
        let mut log = log.map(|(root, head)| RunLog::new(root, head));
        let mut meters = None;
        let panicked = "the program's recorder of metrics panicked";
        logged(panicked, || meters = Some(Meters::new(store, engine)));
        loop {
            if let Some(meters) = &meters {
                logged(panicked, || meters.sample(&sample()));
            }
            match self.lines.recv_timeout(if Meters::WANTED { SAMPLE_INTERVAL } else { Duration::MAX }) {
                Ok(mut line) => {
                    line.lost = self.lost.swap(0, Ordering::Relaxed);
                    // `close` wakes the thread with a line of no save.
                    let of_save = line.end != Ended::Unknown;
                    if let Some(log) = log.as_mut().filter(|_| of_save) {
                        log.save(&line);
                    }
                    if let Some(meters) = meters.as_ref().filter(|_| of_save) {
                        logged(panicked, || meters.save(&line));
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.closed.load(Ordering::Acquire) && self.lines.is_empty() {
                break;
            }
        }
        log.into_iter().for_each(RunLog::close);
    }
}

/// Microseconds since 1970.
pub(crate) fn unix_micros(time: SystemTime) -> u64 {
    micros(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
