//! Reports of an executor about its saves: a line in the run log, metrics, and a trace.
//!
//! **Who writes.** The thread that ends a save puts a [`SaveLine`] into a bounded queue. The telemetry thread
//! writes it. So neither a caller nor the stager touches storage or a recorder of the program.
//! **Failure.** No error here can fail a save. A line that finds the queue full, because the disk hangs, is
//! dropped and counted.
//! **End.** [`Telemetry::close`] is called after the other threads of the executor have ended.

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

/// The name of the telemetry thread.
pub(crate) const NAME: &str = "ashore-tell";

/// The number of saves that may end while the thread writes the line of one save.
const QUEUE: usize = 256;
/// The maximum number of spans of traces in the queue: about 25 MB.
const SPANS_WAITING_MAX: usize = 1 << 18;
/// How often the metrics of the present state are set.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(1);

/// The present state of an executor, for metrics.
#[derive(Clone, Copy, Debug, Default)]
#[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "only metrics read it"))]
pub(crate) struct Sample {
    /// The bytes of the arena, and how many of them hold chunks.
    pub arena: u64,
    pub arena_used: u64,
    /// The number of saves that have not ended.
    pub unfinished: usize,
    /// When the oldest of these saves was called.
    pub oldest: Option<Instant>,
}

/// The queue to the telemetry thread, and its counters. See the module.
pub(crate) struct Telemetry {
    queue: Sender<Told>,
    told: Receiver<Told>,
    /// The number of lines that found the queue full.
    lost: AtomicU64,
    /// The number of spans in the queue.
    spans_waiting: AtomicUsize,
    /// The number of spans that found the queue full and that no message has counted yet.
    spans_lost: AtomicU64,
    closed: AtomicBool,
    /// Returns how many bytes of the arena hold chunks. Set if saves are traced.
    arena: OnceLock<Arena>,
    /// Whether the trace is full or cannot be written.
    trace_is_over: AtomicBool,
}

/// Returns how many bytes of the arena hold chunks.
pub(crate) type Arena = Box<dyn Fn() -> u64 + Send + Sync>;

/// A message to the telemetry thread.
enum Told {
    /// A save has begun, and is traced.
    Begun(BegunSave),
    /// A save has ended.
    Ended(Box<SaveLine>, Option<Box<EndedSave>>),
    /// A thread worked for a save of this step that has ended already.
    Late(Box<(Span, Thread)>, u64),
    Closed,
}

impl std::fmt::Debug for Telemetry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Telemetry({} told)", self.told.len())
    }
}

/// The destinations of the telemetry thread.
pub(crate) struct Sinks {
    /// The root of the run log and its first line. None: no run log.
    pub log: Option<(Root, Head)>,
    /// The label `store` of metrics.
    pub store: &'static str,
    pub engine: &'static str,
    /// The file of the trace. None: no trace.
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

    /// Starts the tracing of later saves. Called once, at start.
    pub fn trace(&self, arena: Arena) {
        _ = self.arena.set(arena);
    }

    /// Begins the trace of a save of `step` that was called at `at`, if saves are traced.
    pub fn begin(&self, step: u64, at: Instant) -> Option<SaveTrace> {
        static ID: AtomicU64 = AtomicU64::new(1);
        let arena = self.arena.get().filter(|_| !self.trace_is_over.load(Ordering::Relaxed))?;
        let id = ID.fetch_add(1, Ordering::Relaxed);
        // If this message is lost, the end of the save also writes its begin.
        self.leave(Told::Begun(BegunSave { id, step, at, arena: arena() }));
        Some(SaveTrace::new(id))
    }

    /// Returns how many bytes of the arena hold chunks.
    pub fn arena_used(&self) -> u64 {
        self.arena.get().map_or(0, |arena| arena())
    }

    /// Queues a span that arrived after the end of its save.
    pub fn late(&self, (span, thread): (Span, Thread), step: u64) {
        if !self.leave(Told::Late(Box::new((span, thread)), step)) {
            self.spans_lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Queues the line of a save that has ended. Never waits. Spans that find the queue full are counted as
    /// lost: the storage of the trace may hang for the whole training.
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

    /// Queues a message. False if the queue is full.
    fn leave(&self, told: Told) -> bool {
        self.closed.load(Ordering::Acquire) || !matches!(self.queue.try_send(told), Err(TrySendError::Full(_)))
    }

    /// Lets the thread end once the queue is empty.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // This wakes the thread. A full queue wakes it anyway.
        _ = self.queue.try_send(Told::Closed);
    }

    /// The body of the telemetry thread. `sample` reads the present state.
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

/// Returns microseconds since 1970.
pub(crate) fn unix_micros(time: SystemTime) -> u64 {
    micros(time.duration_since(UNIX_EPOCH).unwrap_or_default())
}

/// Returns nanoseconds since 1970.
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
