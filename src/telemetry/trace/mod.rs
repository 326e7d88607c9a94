//! The trace of an executor: what its saves did, and when, for viewers of Chrome's format.
//!
//! **Who writes.** Threads that work for a save add [`Span`]s to its [`SaveTrace`]. The telemetry thread
//! writes them to a [`TraceFile`] when the save has ended.
//! **Off.** Without a trace, a save costs its threads one branch each.
//! **Size.** `Budget` chooses which saves are written chunk by chunk.

mod budget;
mod event;
mod file;

pub(crate) use file::{TraceFile, TracePath};

use crate::sync::{Mutex, lock};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The maximum number of spans that one save keeps. Later spans are counted.
const SPANS_MAX: usize = 1 << 16;

/// The kind of work in a span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// The program is in the call of `save`.
    Call,
    /// The program waits at a fence.
    Fence,
    /// The stager stages the save.
    Stage,
    /// The stager copies a chunk from host memory.
    Copy,
    /// The stager queues the copies of a chunk.
    Queue,
    /// A device copies its part of a chunk. Times are those of its clock, and may be off by `error`.
    DeviceCopy { ordinal: u32, error: Duration },
    /// A writer digests a chunk.
    Digest,
    /// A writer waits until the storage has a chunk.
    Write,
    /// A writer seals a file.
    Seal,
    /// The committer publishes the step, or abandons it.
    Commit,
}

/// One piece of work of one thread, with its begin and end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub work: Work,
    pub begin: Instant,
    pub end: Instant,
    /// The number of the chunk, or of the file for `Seal`.
    pub number: Option<usize>,
    pub bytes: u64,
    /// The identity of the thread.
    pub thread: u32,
    /// How many bytes of the arena held chunks at the end.
    pub arena: u64,
}

/// The spans of one save, which its threads add.
#[derive(Debug)]
pub(crate) struct SaveTrace {
    /// The number of the save in this process.
    pub id: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    ended: bool,
    spans: Vec<Span>,
    threads: Vec<Thread>,
    lost: u64,
}

/// A thread, as named in the trace.
#[derive(Clone, Debug)]
pub(crate) struct Thread {
    pub id: u32,
    pub name: String,
}

/// A save that has begun.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BegunSave {
    pub id: u64,
    pub step: u64,
    pub at: Instant,
    pub arena: u64,
}

/// A save that has ended.
#[derive(Debug)]
pub(crate) struct EndedSave {
    pub begun: BegunSave,
    pub at: Instant,
    pub spans: Vec<Span>,
    pub threads: Vec<Thread>,
    /// The number of spans that were dropped.
    pub lost: u64,
}

impl SaveTrace {
    pub fn new(id: u64) -> Self {
        Self { id, state: Mutex::default() }
    }

    /// Adds a span of the calling thread. If the save has ended, returns the span with the thread instead.
    #[must_use]
    pub fn add(&self, span: Span) -> Option<(Span, Thread)> {
        let mut state = lock(&self.state);
        if state.ended {
            return Some((span, Thread::current()));
        }
        if state.spans.len() >= SPANS_MAX {
            state.lost += 1;
            return None;
        }
        state.spans.push(span);
        if !state.threads.iter().any(|thread| thread.id == span.thread) {
            state.threads.push(Thread::current());
        }
        None
    }

    /// Takes all spans. Only the first call returns them.
    pub fn end(&self, step: u64, began: Instant, arena: u64) -> Option<EndedSave> {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.ended, true) {
            return None;
        }
        let State { spans, threads, lost, .. } = std::mem::take(&mut *state);
        state.ended = true;
        drop(state);
        let begun = BegunSave { id: self.id, step, at: began, arena };
        Some(EndedSave { begun, at: Instant::now(), spans, threads, lost })
    }
}

impl Thread {
    /// Returns the identity of the calling thread.
    pub fn id() -> u32 {
        rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
    }

    fn current() -> Self {
        let id = Self::id();
        let name = std::thread::current().name().map_or_else(|| format!("thread {id}"), str::to_owned);
        Self { id, name }
    }
}

/// Returns the begin of a wait at a fence. Time that the calling thread waited before belongs to an earlier
/// wait.
pub(crate) fn fence_begin(began: Instant, end: Instant) -> Instant {
    thread_local!(static LAST: Cell<Option<Instant>> = const { Cell::new(None) });
    LAST.replace(Some(end)).map_or(began, |last| began.max(last))
}
