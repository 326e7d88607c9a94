//! The trace of an executor: what its saves did, and when, for the viewers of Chrome's format.
//!
//! **Who writes.** Threads that work for a save leave [`Span`]s in its [`SaveTrace`]; the thread that tells
//! of saves writes them into a [`TraceFile`] when the save has ended.
//! **Off.** A save without a trace costs its threads one branch each.
//! **Size.** `Budget` says which saves are written chunk by chunk.

mod budget;
mod event;
mod file;

pub(crate) use file::{TraceFile, TracePath};

use crate::sync::{Mutex, lock};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// The most spans that one save keeps; later ones are counted.
const SPANS_MAX: usize = 1 << 16;

/// What a span is of.
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
    /// A device copies its part of a chunk; times are of its clock, and may be off by `error`.
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

/// What was done in one stretch of time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub work: Work,
    pub begin: Instant,
    pub end: Instant,
    /// The chunk, or the file of `Seal`.
    pub number: Option<usize>,
    pub bytes: u64,
    /// The identity of the thread.
    pub thread: u32,
    /// Bytes of the arena that chunks held at the end.
    pub arena: u64,
}

/// The spans of one save, which its threads add.
#[derive(Debug)]
pub(crate) struct SaveTrace {
    /// Its number in this process.
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

/// A thread, as the trace calls it.
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
    /// Spans that found no place.
    pub lost: u64,
}

impl SaveTrace {
    pub fn new(id: u64) -> Self {
        Self { id, state: Mutex::default() }
    }

    /// Adds a span of the calling thread. Returns it, with the thread, once the save has ended.
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

    /// Takes all spans. The first call decides.
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
    /// The identity of the calling thread.
    pub fn id() -> u32 {
        rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned()
    }

    fn current() -> Self {
        let id = Self::id();
        let name = std::thread::current().name().map_or_else(|| format!("thread {id}"), str::to_owned);
        Self { id, name }
    }
}

/// The begin of a wait at a fence: what the calling thread has waited before is another wait's.
pub(crate) fn fence_begin(began: Instant, end: Instant) -> Instant {
    thread_local!(static LAST: Cell<Option<Instant>> = const { Cell::new(None) });
    LAST.replace(Some(end)).map_or(began, |last| began.max(last))
}
