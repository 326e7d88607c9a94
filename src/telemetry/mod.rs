//! What an executor tells of its saves: a line in the run log, metrics, and a trace.
//!
//! **Who writes.** The thread that ends a save leaves a [`SaveLine`] in a bounded queue; a thread of its own
//! writes it. So neither a caller nor the stager touches storage or a recorder of the program.
//! **Failure.** Nothing here can fail a save. A line that finds the queue full, because the disk hangs, is
//! dropped and counted.
//! **End.** [`Telemetry::close`] comes after the other threads of the executor have ended.

mod line;
mod log;
pub(crate) mod meters;
mod times;
mod trace;

pub use line::{Closed, Ended, Entry, Head, Run, SaveLine, runs};
pub(crate) use times::Times;
pub(crate) use trace::{EndedSave, SaveTrace, Span, Thread, TracePath, Work, fence_begin};

use crate::completion::Signal;
use crate::guard::logged;
use crate::own_threads;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TrySendError, bounded};
pub(crate) use log::Root;
use log::RunLog;
use meters::Meters;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use trace::{BegunSave, TraceFile};

/// The name of the thread.
pub(crate) const NAME: &str = "ashore-tell";

/// Number of saves that may end while the thread writes the line of one.
const QUEUE: usize = 256;
/// The most spans of traces that wait in the queue: about 25 MB.
const SPANS_WAITING_MAX: usize = 1 << 18;
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
pub(crate) struct Telemetry {
    queue: Sender<Told>,
    told: Receiver<Told>,
    /// Lines that found the queue full.
    lost: AtomicU64,
    /// Spans in the queue.
    spans_waiting: AtomicUsize,
    /// Spans that found no place in the queue, and are in no message's count.
    spans_lost: AtomicU64,
    closed: AtomicBool,
    /// How many bytes of the arena chunks hold; set if saves are traced.
    arena: OnceLock<Arena>,
    /// The trace is full, or cannot be written.
    trace_is_over: AtomicBool,
}

/// Tells how many bytes of the arena chunks hold.
pub(crate) type Arena = Box<dyn Fn() -> u64 + Send + Sync>;

/// What the thread is told.
enum Told {
    /// A save has begun, and is traced.
    Begun(BegunSave),
    /// A save has ended.
    Ended(Box<SaveLine>, Option<Box<EndedSave>>),
    /// Something was done for a save of this step that has ended.
    Late(Box<(Span, Thread)>, u64),
    Closed,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Telemetry({} told)", self.told.len())
    }
}

/// What the thread writes to.
pub(crate) struct Sinks {
    /// The root of the run log and its first line; None: no run log.
    pub log: Option<(Root, Head)>,
    /// The label `store` of metrics.
    pub store: &'static str,
    pub engine: &'static str,
    /// The file of the trace; None: no trace.
    pub trace: Option<TracePath>,
}

impl Telemetry {
    pub fn new() -> Self {
        let (queue, told) = bounded(QUEUE);
        Self {
            queue,
            told,
            lost: AtomicU64::new(0),
            spans_waiting: AtomicUsize::new(0),
            spans_lost: AtomicU64::new(0),
            closed: AtomicBool::new(false),
            arena: OnceLock::new(),
            trace_is_over: AtomicBool::new(false),
        }
    }

    /// Traces later saves. Called once, at start.
    pub fn trace(&self, arena: Arena) {
        _ = self.arena.set(arena);
    }

    /// Begins the trace of a save of `step` that was called at `at`, if saves are traced.
    pub fn begin(&self, step: u64, at: Instant) -> Option<SaveTrace> {
        static ID: AtomicU64 = AtomicU64::new(1);
        let arena = self.arena.get().filter(|_| !self.trace_is_over.load(Ordering::Relaxed))?;
        let id = ID.fetch_add(1, Ordering::Relaxed);
        // Without this message the end of the save writes its begin, too.
        self.leave(Told::Begun(BegunSave { id, step, at, arena: arena() }));
        Some(SaveTrace::new(id))
    }

    /// The bytes of the arena that chunks hold.
    pub fn arena_used(&self) -> u64 {
        self.arena.get().map_or(0, |arena| arena())
    }

    /// Leaves a span that came after the end of its save.
    pub fn late(&self, (span, thread): (Span, Thread), step: u64) {
        if !self.leave(Told::Late(Box::new((span, thread)), step)) {
            self.spans_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Leaves the line of a save that has ended. Never waits. Spans that find no place are counted as lost:
    /// the storage of the trace may hang for as long as the training goes on.
    pub fn tell(&self, line: SaveLine, mut trace: Option<EndedSave>) {
        let mut spans = 0;
        if let Some(trace) = &mut trace {
            spans = trace.spans.len();
            if self.spans_waiting.fetch_add(spans, Ordering::Relaxed) + spans > SPANS_WAITING_MAX {
                self.spans_waiting.fetch_sub(spans, Ordering::Relaxed);
                trace.lost += spans as u64;
                (trace.spans, spans) = (Vec::new(), 0);
            }
            trace.lost += self.spans_lost.swap(0, Ordering::Relaxed);
        }
        if !self.leave(Told::Ended(Box::new(line), trace.map(Box::new))) {
            self.lost.fetch_add(1, Ordering::Relaxed);
            self.spans_waiting.fetch_sub(spans, Ordering::Relaxed);
        }
    }

    /// False if the queue is full.
    fn leave(&self, told: Told) -> bool {
        self.closed.load(Ordering::Acquire) || !matches!(self.queue.try_send(told), Err(TrySendError::Full(_)))
    }

    /// Lets the thread end once the queue is empty.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // Wakes the thread. In a full queue there is something that does.
        _ = self.queue.try_send(Told::Closed);
    }

    /// The body of the thread. `sample` reads the present state.
    pub fn run(&self, sinks: Sinks, signal: &Arc<Signal>, sample: impl Fn() -> Sample) {
        own_threads::mark(signal);
        let Sinks { log, store, engine, trace } = sinks;
        let mut log = log.map(|(root, head)| RunLog::new(root, head));
        let mut trace = trace.map(TraceFile::new);
        let mut meters = None;
        let panicked = "the program's recorder of metrics panicked";
        logged(panicked, || meters = Some(Meters::new(store, engine)));
        loop {
            if let Some(meters) = &meters {
                logged(panicked, || meters.sample(&sample()));
            }
            match self.told.recv_timeout(if Meters::WANTED { SAMPLE_INTERVAL } else { Duration::MAX }) {
                Ok(Told::Begun(save)) => trace.iter_mut().for_each(|trace| trace.begun(&save)),
                Ok(Told::Late(late, step)) => trace.iter_mut().for_each(|trace| trace.late(&late.0, &late.1, step)),
                Ok(Told::Ended(mut line, traced)) => {
                    line.lost = self.lost.swap(0, Ordering::Relaxed);
                    let spans = traced.as_ref().map_or(0, |traced| traced.spans.len());
                    self.spans_waiting.fetch_sub(spans, Ordering::Relaxed);
                    if let Some(log) = &mut log {
                        log.save(&line);
                    }
                    if let Some(meters) = &meters {
                        logged(panicked, || meters.save(&line));
                    }
                    if let (Some(trace), Some(traced)) = (&mut trace, traced) {
                        trace.ended(*traced, &line);
                    }
                }
                Ok(Told::Closed) => {}
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if let Some(trace) = trace.as_mut().filter(|_| self.told.is_empty()) {
                trace.flush();
                self.trace_is_over.store(trace.is_over(), Ordering::Relaxed);
            }
            if self.closed.load(Ordering::Acquire) && self.told.is_empty() {
                break;
            }
        }
        log.into_iter().for_each(RunLog::close);
        trace.into_iter().for_each(TraceFile::close);
    }
}

/// Microseconds since 1970.
pub(crate) fn unix_micros(time: SystemTime) -> u64 {
    micros(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Nanoseconds since 1970.
fn unix_nanos(time: SystemTime) -> u64 {
    u64::try_from(time.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()).unwrap_or(u64::MAX)
}

pub(crate) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 256 saves of 65,536 spans each waited for the storage of a trace that hung: more than a gigabyte.
    #[test]
    fn spans_that_wait_for_the_storage_of_a_trace_are_limited_and_counted() {
        let telemetry = Telemetry::new();
        let now = Instant::now();
        let span = Span { work: Work::Digest, begin: now, end: now, number: Some(0), bytes: 1, thread: 1, arena: 0 };
        let count = SPANS_WAITING_MAX / 3;
        for step in 0..5 {
            let begun = BegunSave { id: step, step, at: now, arena: 0 };
            let spans = vec![span; count];
            let ended = EndedSave { begun, at: now, spans, threads: Vec::new(), lost: 0 };
            telemetry.tell(SaveLine::default(), Some(ended));
        }
        let mut waiting = Vec::new();
        while let Ok(Told::Ended(_, Some(ended))) = telemetry.told.try_recv() {
            waiting.push((ended.spans.len(), ended.lost as usize));
        }
        assert_eq!(waiting, [(count, 0), (count, 0), (count, 0), (0, count), (0, count)]);
    }
}
