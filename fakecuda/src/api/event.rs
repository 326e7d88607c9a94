//! Events.

use crate::abi::{CAPTURED_EVENT, INVALID_HANDLE, INVALID_VALUE, Kind, NOT_READY, Status, ordinal_of, put};
use crate::call::current;
use crate::device::get;
use crate::event::Event;
use crate::exported::export;
use crate::stream::{enqueue, find as find_stream};
use crate::work::{PATIENCE, Work};
use std::sync::Arc;

const DISABLE_TIMING: u32 = 2;

export! {
    context fn cuEventCreate(event: *mut u64, flags: u32) {
        if flags & !7 != 0 {
            return Err(INVALID_VALUE);
        }
        let device = current()?;
        let mut state = device.state();
        let id = state.serial(Kind::Event, device.ordinal);
        state.events.insert(id, Arc::new(Event::new(device.ordinal, flags & DISABLE_TIMING != 0)));
        put(event, id)
    }

    context fn cuEventDestroy_v2(event: u64) {
        find(event)?;
        get(ordinal_of(Kind::Event, event)?)?.state().events.remove(&event).map(drop).ok_or(INVALID_HANDLE)
    }

    context fn cuEventRecord(event: u64, stream: u64) {
        let event = find(event)?;
        let (device, id) = find_stream(stream)?;
        if event.ordinal != device.ordinal {
            return Err(INVALID_HANDLE);
        }
        let capture = device.state().streams[&id].capture;
        if let Some(capture) = capture {
            event.record_in_capture(capture);
            return Ok(());
        }
        let generation = event.record();
        enqueue(stream, Work::Record(event, generation), false)
    }

    quiet fn cuEventQuery(event: u64) {
        let event = find(event)?;
        if event.captured().is_some() {
            return Err(CAPTURED_EVENT);
        }
        get(event.ordinal)?.state().healthy()?;
        if event.has_reached(event.generation()) { Ok(()) } else { Err(NOT_READY) }
    }

    quiet fn cuEventSynchronize(event: u64) {
        let event = find(event)?;
        if event.captured().is_some() {
            return Err(CAPTURED_EVENT);
        }
        let (device, generation) = (get(event.ordinal)?, event.generation());
        let mut state = device.state();
        while !event.has_reached(generation) {
            state.healthy()?;
            state = device.wait(state, PATIENCE);
        }
        state.healthy()
    }

    context fn cuEventElapsedTime(milliseconds: *mut f32, start: u64, end: u64) {
        elapsed(milliseconds, start, end)
    }

    context fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: u64, end: u64) {
        elapsed(milliseconds, start, end)
    }
}

fn elapsed(milliseconds: *mut f32, start: u64, end: u64) -> Status {
    let (start, end) = (find(start)?, find(end)?);
    if start.timeless || end.timeless || start.generation() == 0 || end.generation() == 0 {
        return Err(INVALID_HANDLE);
    }
    let reached = |e: &Event| e.at().filter(|_| e.has_reached(e.generation())).ok_or(NOT_READY);
    let (start, end) = (reached(&start)?, reached(&end)?);
    let seconds =
        end.saturating_duration_since(start).as_secs_f32() - start.saturating_duration_since(end).as_secs_f32();
    put(milliseconds, seconds * 1e3)
}

pub fn find(event: u64) -> Status<Arc<Event>> {
    get(ordinal_of(Kind::Event, event)?)?.state().events.get(&event).cloned().ok_or(INVALID_HANDLE)
}
