//! The threads of a save add their work to its trace, if the save is traced.

use super::Ticket;
use crate::telemetry::{EndedSave, Span, Thread, Work, fence_begin};
use std::time::Instant;

impl Ticket {
    /// Whether the save is traced. If so, threads also record the times that only a trace needs.
    pub fn is_traced(&self) -> bool {
        self.trace.get().is_some()
    }

    /// The time, if the save is traced.
    pub fn traced_now(&self) -> Option<Instant> {
        self.is_traced().then(Instant::now)
    }

    /// Adds the calling thread's work since `begin` to the trace. The save is traced if there is a `begin`.
    pub fn trace(&self, work: Work, begin: Option<Instant>) {
        if let Some(begin) = begin {
            self.trace_part(work, (begin, Instant::now()), None, 0);
        }
    }

    /// Adds work between the first time and the second to the trace, with `bytes` of the chunk or file of
    /// this number.
    pub fn trace_part(&self, work: Work, (begin, end): (Instant, Instant), number: Option<usize>, bytes: u64) {
        let (Some(trace), Some(telemetry)) = (self.trace.get(), self.telemetry.get()) else { return };
        let begin = if work == Work::Fence { fence_begin(begin, end) } else { begin };
        let (thread, arena) = (Thread::id(), telemetry.arena_used());
        if let Some(late) = trace.add(Span { work, begin, end, number, bytes, thread, arena }) {
            telemetry.late(late, self.step);
        }
    }

    /// Ends the trace of a save that has ended.
    pub(super) fn traced(&self) -> Option<EndedSave> {
        let (trace, telemetry) = (self.trace.get()?, self.telemetry.get()?);
        trace.end(self.step, self.began, telemetry.arena_used())
    }
}
