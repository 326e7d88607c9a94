//! Streams: queues of work, each with its own thread, and the order between streams that the legacy default
//! stream requires.

use crate::abi::{
    CAPTURE_IMPLICIT, CAPTURE_INVALIDATED, CAPTURE_UNSUPPORTED, INVALID_HANDLE, Kind, OUT_OF_MEMORY, Status, ordinal_of,
};
use crate::call::{current, late_fault};
use crate::device::{self, Device, State};
use crate::work::{Item, PATIENCE, Role, Stream, Work};
use std::cell::RefCell;
use std::collections::BTreeMap;

thread_local! {
    /// This thread's default stream on each device.
    static MINE: RefCell<BTreeMap<usize, u64>> = const { RefCell::new(BTreeMap::new()) };
}

/// Makes a stream and starts its thread.
pub fn create(device: &'static Device, role: Role, priority: i32) -> Status<u64> {
    let mut state = device.state();
    if let (Role::Legacy, Some(id)) = (role, legacy(&state)) {
        return Ok(id);
    }
    let id = state.serial(Kind::Stream, device.ordinal);
    state.streams.insert(id, Stream { role, priority, ..Stream::default() });
    drop(state);
    let worker = std::thread::Builder::new().name(format!("fakecuda {id:x}"));
    worker.spawn(move || crate::worker::work(device, id)).map_err(|_| OUT_OF_MEMORY)?;
    Ok(id)
}

/// Returns the device and the stream of a handle. 0, 1 and 2 are the current device's default streams.
pub fn find(handle: u64) -> Status<(&'static Device, u64)> {
    if handle > 2 {
        let device = device::get(ordinal_of(Kind::Stream, handle)?)?;
        let user = |s: &Stream| !s.destroyed && matches!(s.role, Role::Blocking | Role::NonBlocking);
        let alive = device.state().streams.get(&handle).is_some_and(user);
        return if alive { Ok((device, handle)) } else { Err(INVALID_HANDLE) };
    }
    let device = current()?;
    if handle < 2 {
        return Ok((device, create(device, Role::Legacy, 0)?));
    }
    let known = MINE.with_borrow(|m| m.get(&device.ordinal).copied());
    if let Some(id) = known.filter(|id| device.state().streams.get(id).is_some_and(|s| !s.destroyed)) {
        return Ok((device, id));
    }
    let id = create(device, Role::OfThread, 0)?;
    MINE.with_borrow_mut(|m| m.insert(device.ordinal, id));
    Ok((device, id))
}

fn legacy(state: &State) -> Option<u64> {
    state.streams.iter().find(|(_, s)| s.role == Role::Legacy && !s.destroyed).map(|(&id, _)| id)
}

/// Enqueues work. With `block` the call waits until the work is done, as the driver does for memory that it
/// cannot copy from or to later.
pub fn enqueue(stream: u64, work: Work, block: bool) -> Status {
    let (device, id) = find(stream)?;
    let mut state = device.state();
    state.healthy()?;
    if let Some(capture) = state.streams[&id].capture {
        let capture = state.captures.get_mut(&capture).ok_or(INVALID_HANDLE)?;
        capture.invalid |= block;
        if capture.invalid {
            return Err(if block { CAPTURE_UNSUPPORTED } else { CAPTURE_INVALIDATED });
        }
        capture.work.push(work);
        return Ok(());
    }
    if state.streams[&id].role == Role::Legacy && state.break_captures_of_blocking_streams() {
        return Err(CAPTURE_IMPLICIT);
    }
    let fault = late_fault();
    let seq = state.push(id, work, fault);
    device.changed();
    if block { wait_for(device, state, id, seq) } else { Ok(()) }
}

impl State {
    /// Appends work to a stream, and returns the work's number in that stream.
    pub fn push(&mut self, id: u64, work: Work, fault: Option<i32>) -> u64 {
        let role = self.streams[&id].role;
        let concerns = |other: Role| match role {
            Role::Legacy => matches!(other, Role::Blocking | Role::OfThread),
            Role::Blocking | Role::OfThread => other == Role::Legacy,
            Role::NonBlocking => false,
        };
        let others = self.streams.iter().filter(|(_, s)| concerns(s.role) && s.done < s.enqueued);
        let after = others.map(|(&other, s)| (other, s.enqueued)).collect();
        let Some(stream) = self.streams.get_mut(&id) else { return 0 };
        stream.enqueued += 1;
        stream.queue.push_back(Item { work, seq: stream.enqueued, after, fault });
        stream.enqueued
    }

    /// True if a stream has reached this number, or is gone.
    pub fn is_past(&self, stream: u64, seq: u64) -> bool {
        self.streams.get(&stream).is_none_or(|s| s.done >= seq)
    }
}

/// Waits until a stream has reached this number. Fails with the device's error.
pub fn wait_for(
    device: &'static Device,
    mut state: std::sync::MutexGuard<'static, State>,
    id: u64,
    seq: u64,
) -> Status {
    loop {
        state.healthy()?;
        if state.is_past(id, seq) {
            return Ok(());
        }
        state = device.wait(state, PATIENCE);
    }
}
