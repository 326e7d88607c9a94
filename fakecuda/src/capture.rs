//! Stream capture: what would be enqueued is written down instead, and calls that could synchronise break the capture.
//!
//! Modes count within a device here, not within the process, so that tests on other devices go on beside a capture.

use crate::abi::{CAPTURE_INVALIDATED, CAPTURE_UNMATCHED, CAPTURE_WRONG_THREAD, INVALID_VALUE, Kind, Status};
use crate::call::CAPTURE_MODE;
use crate::device::State;
use crate::stream::{Role, Work};
use std::thread::ThreadId;

const GLOBAL: i32 = 0;
const RELAXED: i32 = 2;

/// A capture under way.
pub struct Capture {
    mode: i32,
    thread: ThreadId,
    origin: u64,
    pub work: Vec<Work>,
    pub invalid: bool,
}

/// What was captured: a sequence, which is one of the orders that the graph allows.
pub type Graph = Vec<Work>;

impl State {
    pub fn begin_capture(&mut self, ordinal: usize, stream: u64, mode: i32) -> Status {
        let idle = self.streams[&stream].capture.is_none() && self.streams[&stream].role != Role::Legacy;
        if !idle || !(GLOBAL..=RELAXED).contains(&mode) {
            return Err(INVALID_VALUE);
        }
        let id = self.serial(Kind::Graph, ordinal);
        let thread = std::thread::current().id();
        self.captures.insert(id, Capture { mode, thread, origin: stream, work: Vec::new(), invalid: false });
        self.join_capture(stream, id);
        Ok(())
    }

    pub fn join_capture(&mut self, stream: u64, capture: u64) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            stream.capture = Some(capture);
        }
    }

    /// The captured work, and the end of the capture in every stream that joined it.
    pub fn end_capture(&mut self, stream: u64) -> Status<Graph> {
        let id = self.streams[&stream].capture.ok_or(INVALID_VALUE)?;
        let capture = self.captures.get(&id).ok_or(INVALID_VALUE)?;
        if capture.origin != stream {
            return Err(CAPTURE_UNMATCHED);
        }
        if capture.mode != RELAXED && capture.thread != std::thread::current().id() {
            return Err(CAPTURE_WRONG_THREAD);
        }
        for stream in self.streams.values_mut().filter(|s| s.capture == Some(id)) {
            stream.capture = None;
        }
        let capture = self.captures.remove(&id).ok_or(INVALID_VALUE)?;
        if capture.invalid { Err(CAPTURE_INVALIDATED) } else { Ok(capture.work) }
    }

    /// 0 not capturing, 1 capturing, 2 the capture has been broken.
    pub fn capture_status(&self, stream: u64) -> u32 {
        let capture = self.streams.get(&stream).and_then(|s| s.capture).and_then(|id| self.captures.get(&id));
        capture.map_or(0, |c| 1 + u32::from(c.invalid))
    }

    /// Whether this thread may call what could synchronise. Captures that forbid it are broken.
    pub fn may_synchronise(&mut self) -> bool {
        let (mode, me) = (CAPTURE_MODE.get(), std::thread::current().id());
        let mut may = true;
        for capture in self.captures.values_mut() {
            let mine = capture.thread == me && capture.mode != RELAXED;
            let any = capture.mode == GLOBAL && mode == GLOBAL;
            if mode != RELAXED && (mine || any) {
                capture.invalid = true;
                may = false;
            }
        }
        may
    }

    pub fn captures_of_blocking_streams(&self) -> Vec<u64> {
        let blocking = self.streams.values().filter(|s| matches!(s.role, Role::Blocking | Role::OfThread));
        blocking.filter_map(|s| s.capture).collect()
    }

    /// Work on the legacy stream would come after that of every blocking stream, so it breaks what those capture.
    pub fn break_captures_of_blocking_streams(&mut self) -> bool {
        let broken = self.captures_of_blocking_streams();
        for id in &broken {
            if let Some(capture) = self.captures.get_mut(id) {
                capture.invalid = true;
            }
        }
        !broken.is_empty()
    }
}

/// Exchanges the mode of this thread.
pub fn exchange_mode(new: i32) -> Status<i32> {
    if !(GLOBAL..=RELAXED).contains(&new) {
        return Err(INVALID_VALUE);
    }
    Ok(CAPTURE_MODE.replace(new))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_of_a_thread_is_exchanged() {
        assert_eq!(exchange_mode(RELAXED), Ok(GLOBAL));
        assert_eq!(exchange_mode(1), Ok(RELAXED));
        assert_eq!(exchange_mode(3), Err(INVALID_VALUE));
        assert_eq!(exchange_mode(GLOBAL), Ok(1));
    }
}
