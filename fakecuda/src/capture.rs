//! Stream capture: work is recorded instead of enqueued, and calls that could synchronise break the capture.
//!
//! Here modes apply per device, not per process, so that tests on other devices can run during a capture.

use crate::abi::{CAPTURE_INVALIDATED, CAPTURE_UNMATCHED, CAPTURE_WRONG_THREAD, INVALID_VALUE, Kind, Status};
use crate::call::CAPTURE_MODE;
use crate::device::State;
use crate::work::{Capture, Graph, Role};

const GLOBAL: i32 = 0;
const RELAXED: i32 = 2;

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

    /// Ends the capture in every stream that joined it, and returns its work.
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

    /// 0: not capturing; 1: capturing; 2: the capture is broken.
    pub fn capture_status(&self, stream: u64) -> u32 {
        let capture = self.streams.get(&stream).and_then(|s| s.capture).and_then(|id| self.captures.get(&id));
        capture.map_or(0, |c| 1 + u32::from(c.invalid))
    }

    /// Checks that this thread may make calls that could synchronise. Breaks captures that forbid such calls.
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

    /// Breaks captures of blocking streams: work of the legacy stream would have to come after their work.
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

/// Exchanges the capture mode of this thread.
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
