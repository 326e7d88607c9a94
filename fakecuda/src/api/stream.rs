//! Streams.

use crate::abi::{INVALID_HANDLE, INVALID_VALUE, Kind, NOT_READY, handle, put};
use crate::call::current;
use crate::exported::export;
use crate::stream::{create, enqueue, find, wait_for};
use crate::work::{Role, Work};

export! {
    context fn cuStreamCreate(stream: *mut u64, flags: u32) {
        put(stream, create(current()?, role(flags)?, 0)?)
    }

    context fn cuStreamCreateWithPriority(stream: *mut u64, flags: u32, priority: i32) {
        put(stream, create(current()?, role(flags)?, priority.clamp(-5, 0))?)
    }

    context fn cuStreamDestroy_v2(stream: u64) {
        if stream <= 2 {
            return Err(INVALID_HANDLE);
        }
        let (device, id) = find(stream)?;
        // Enqueued work still runs.
        device.state().streams.get_mut(&id).ok_or(INVALID_HANDLE)?.destroyed = true;
        device.changed();
        Ok(())
    }

    quiet fn cuStreamSynchronize(stream: u64) {
        let (device, id) = find(stream)?;
        let end = device.state().streams[&id].enqueued;
        wait_for(device, device.state(), id, end)
    }

    quiet fn cuStreamQuery(stream: u64) {
        let (device, id) = find(stream)?;
        let state = device.state();
        // Checked under the lock that is held when work ends, so that failed work does not count as done.
        state.healthy()?;
        if state.is_past(id, state.streams[&id].enqueued) { Ok(()) } else { Err(NOT_READY) }
    }

    context fn cuStreamWaitEvent(stream: u64, event: u64, _flags: u32) {
        let (device, id) = find(stream)?;
        let event = super::event::find(event)?;
        if let Some(capture) = event.captured() {
            // A stream that waits for captured work becomes part of the capture.
            if event.ordinal != device.ordinal {
                return Err(INVALID_VALUE);
            }
            device.state().join_capture(id, capture);
            return Ok(());
        }
        match event.generation() {
            // The event was never recorded, so there is nothing to wait for.
            0 => Ok(()),
            generation => enqueue(stream, Work::Wait(event, generation), false),
        }
    }

    context fn cuStreamGetCtx(stream: u64, context: *mut u64) {
        put(context, handle(Kind::Context, find(stream)?.0.ordinal, 1))
    }

    context fn cuStreamGetDevice(stream: u64, device: *mut i32) {
        put(device, find(stream)?.0.ordinal as i32)
    }

    context fn cuStreamGetPriority(stream: u64, priority: *mut i32) {
        let (device, id) = find(stream)?;
        let found = device.state().streams[&id].priority;
        put(priority, found)
    }

    context fn cuStreamGetFlags(stream: u64, flags: *mut u32) {
        let (device, id) = find(stream)?;
        let role = device.state().streams[&id].role;
        put(flags, u32::from(role == Role::NonBlocking))
    }

    context fn cuLaunchHostFunc(stream: u64, function: Option<extern "C" fn(u64)>, data: u64) {
        enqueue(stream, Work::Call(function.ok_or(INVALID_VALUE)?, data), false)
    }
}

fn role(flags: u32) -> crate::abi::Status<Role> {
    match flags {
        0 => Ok(Role::Blocking),
        1 => Ok(Role::NonBlocking),
        _ => Err(INVALID_VALUE),
    }
}
