//! The thread of a stream: it takes work in order, waits for its dependencies, and runs it.

use crate::abi::{Status, is_sticky};
use crate::device::{Device, State};
use crate::work::{PATIENCE, Spot, Work};
use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::Duration;

/// Kinds of work that can be held back: the bits of the setting `hold`.
const TO_HOST: u64 = 1;
const TO_DEVICE: u64 = 2;
const ON_DEVICE: u64 = 4;
const KERNELS: u64 = 8;
const WRITES: u64 = 16;

/// Polling interval for events of other devices, because these do not wake this thread.
const LOOK: Duration = Duration::from_micros(50);
/// Polling interval for memory. It is longer, because only writes of the host come without a wake-up, and
/// streams may wait long.
const LOOK_AT_MEMORY: Duration = Duration::from_micros(300);

/// Runs until the stream is destroyed and its queue is empty.
pub fn work(device: &'static Device, id: u64) {
    let mut state = device.state();
    loop {
        let Some(stream) = state.streams.get_mut(&id) else { return };
        let Some(item) = stream.queue.front() else {
            if stream.destroyed {
                state.streams.remove(&id);
                drop(state);
                device.changed();
                return;
            }
            state = device.wait(state, PATIENCE);
            continue;
        };
        let (work, seq, after, fault) = (item.work.clone(), item.seq, item.after.clone(), item.fault);
        let dead = state.sticky.is_some();
        if !dead && !after.iter().all(|&(other, seq)| state.is_past(other, seq)) {
            state = device.wait(state, PATIENCE);
            continue;
        }
        if !dead && is_watched(device, &work) {
            drop(state);
            let due = is_due(&work) || is_lost(&work);
            state = device.state();
            if !due {
                let look = if matches!(work, Work::Await { .. }) { LOOK_AT_MEMORY } else { LOOK };
                state = device.wait(state, look);
                continue;
            }
        } else if !dead && !is_due(&work) {
            state = device.wait(state, PATIENCE);
            continue;
        }
        if !dead && is_held(&mut state, &work) {
            state = device.wait(state, PATIENCE);
            continue;
        }
        let delay = delay(&mut state, &work);
        // A host function may itself make calls, and receive their errors.
        let touches = !dead && !matches!(work, Work::Call(..));
        state.running += u32::from(touches);
        drop(state);
        let result = match fault {
            _ if dead => Ok(()),
            Some(code) => Err(code),
            None => {
                if !delay.is_zero() {
                    std::thread::sleep(delay);
                }
                run(device, &work)
            }
        };
        state = device.state();
        state.running -= u32::from(touches);
        // Work that was running at a reset does not fail later work.
        let counts = state.streams.get(&id).is_some_and(|s| s.queue.front().is_some_and(|i| i.seq == seq));
        if let (Err(code), true) = (result, counts) {
            state.sticky.get_or_insert(if is_sticky(code) { code } else { crate::abi::ILLEGAL_ADDRESS });
        }
        end(&mut state, id, seq);
        device.changed();
    }
}

/// Marks a piece of work as done. The stream may have been closed meanwhile.
fn end(state: &mut MutexGuard<'_, State>, id: u64, seq: u64) {
    if let Some(stream) = state.streams.get_mut(&id) {
        if stream.queue.front().is_some_and(|i| i.seq == seq) {
            stream.queue.pop_front();
        }
        stream.done = stream.done.max(seq);
    }
}

/// True if the work waits for something that does not wake this thread. Checking may take the lock of any
/// device.
fn is_watched(device: &Device, work: &Work) -> bool {
    match work {
        Work::Await { .. } => true,
        Work::Wait(event, _) => event.ordinal != device.ordinal,
        _ => false,
    }
}

/// True if the event has been reached, or the value in memory has arrived, for which the work waits.
fn is_due(work: &Work) -> bool {
    match work {
        Work::Wait(event, generation) => event.has_reached(*generation),
        Work::Await { at, value, test } => {
            // A freed address is an error. It is reported when the work runs.
            let Ok((pointer, _in_use)) = at.pointer() else { return true };
            // SAFETY: `pointer` guarantees four bytes; the alignment was checked when the wait was enqueued.
            let now = unsafe { AtomicU32::from_ptr(pointer.cast()) }.load(Ordering::Acquire);
            match test {
                0 => now.wrapping_sub(*value) as i32 >= 0,
                1 => now == *value,
                2 => now & value != 0,
                _ => !(now | value) != 0,
            }
        }
        _ => true,
    }
}

/// True if the work waits for an event that will never be reached, because that event's device has failed.
fn is_lost(work: &Work) -> bool {
    let Work::Wait(event, _) = work else { return false };
    crate::device::get(event.ordinal).is_ok_and(|d| d.state().sticky.is_some())
}

fn is_held(state: &mut State, work: &Work) -> bool {
    let kind = match work {
        Work::Copy { to, from, .. } => match (to.on_device(), from.on_device()) {
            (false, _) => TO_HOST,
            (true, false) => TO_DEVICE,
            (true, true) => ON_DEVICE,
        },
        Work::Fill { .. } => ON_DEVICE,
        Work::Launch(_) => KERNELS,
        Work::Write { .. } => WRITES,
        _ => 0,
    };
    if state.settings.hold & kind == 0 {
        return false;
    }
    if state.settings.allow > 0 {
        state.settings.allow -= 1;
        return false;
    }
    true
}

fn delay(state: &mut State, work: &Work) -> Duration {
    let settings = &mut state.settings;
    let (lag, bytes) = match work {
        Work::Copy { bytes, .. } => (settings.lag_us, *bytes),
        Work::Fill { .. } | Work::Launch(_) => (settings.lag_us, 0),
        _ => (0, 0),
    };
    let jitter = if settings.jitter_us > 0 { settings.random(settings.jitter_us + 1) } else { 0 };
    let transfer = bytes.checked_div(settings.mbps).unwrap_or(0);
    Duration::from_micros(lag + jitter + transfer)
}

fn run(device: &Device, work: &Work) -> Status {
    match work {
        Work::Copy { to, from, bytes } => {
            let ((to, _to_in_use), (from, _from_in_use)) = (to.pointer()?, from.pointer()?);
            // SAFETY: both ends were checked to have `bytes` when the copy was enqueued, and still exist:
            // pinned ranges stay while they are in use, shadows always stay, and for pageable memory the
            // caller waits.
            unsafe { std::ptr::copy(from, to, *bytes as usize) };
        }
        Work::Fill { to, value, bytes } => {
            let (to, _in_use) = to.pointer()?;
            // SAFETY: as for copies.
            unsafe { std::ptr::write_bytes(to, *value, *bytes as usize) };
        }
        Work::Write { to, value, bytes } => write(*to, *value, *bytes)?,
        Work::Launch(launch) => {
            let mut state = device.state();
            let (blocks, backwards): (Vec<_>, _) = (state.heap.blocks().collect(), state.settings.random(2) == 1);
            drop(state);
            launch.run(device.window()?, &blocks, backwards)?;
        }
        Work::Await { at, .. } => drop(at.pointer()?),
        Work::Record(event, generation) => event.reach(*generation),
        Work::Call(function, data) => function(*data),
        Work::Free(block) => {
            let mut state = device.state();
            state.heap.check(*block)?;
            state.heap.free(device.window()?, block.start)?;
        }
        Work::Wait(..) | Work::Nothing => {}
    }
    Ok(())
}

/// Stores a value. A reader that sees the value also sees all earlier work of the stream.
fn write(to: Spot, value: u64, bytes: u64) -> Status {
    let (to, _in_use) = to.pointer()?;
    fence(Ordering::SeqCst);
    if bytes == 4 {
        // SAFETY: the address was checked to have four bytes, and to be aligned, when the write was enqueued.
        unsafe { AtomicU32::from_ptr(to.cast()) }.store(value as u32, Ordering::Release);
    } else {
        // SAFETY: as above, with eight bytes.
        unsafe { AtomicU64::from_ptr(to.cast()) }.store(value, Ordering::Release);
    }
    Ok(())
}
