//! Memory-waits: at a fence, streams of the program wait for a number in pinned memory instead of an event.
//! The copy stream writes the number behind its copies. The host also writes it, without the driver, once
//! these copies are no longer needed.
//!
//! A fence takes a row of numbers, one per device, and a value that is new to this row. A row is reused when
//! its guard is dropped and everything queued with it has been reached, so a number never falls.
//! **Order.** The write is queued before the waits, and behind all work that it depends on. So in any
//! hardware queue that streams share, no wait precedes the write that ends it.
//!
//! # Safety argument
//! The numbers are aligned, inside their allocation, in pinned memory that only devices and atomics touch.
//! The memory is freed when everything that was queued with its address has been reached; if that cannot be
//! known, it is leaked.
#![expect(unsafe_code, reason = "numbers that a device and the host share; argument above")]

use super::CudaState;
use super::driver::{Address, Context, Memory, Stream, StreamHandle};
use super::gpu::{Gpu, POLL_INTERVAL, SETTLE_TIMEOUT};
use super::pooled_event::PooledEvent;
use crate::device::{self, WaitGuard};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use std::fmt;
use std::mem::forget;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Maximum number of pending fences.
const FENCES: usize = 32;
/// Minimum number of hardware queues. With fewer, unrelated streams share one queue.
const CONNECTIONS: u32 = 8;
/// How long the self-test lets a wait last before it ends the wait.
const TRIAL: Duration = Duration::from_millis(1);

/// The memory-waits of an executor.
pub(super) struct Waits(Arc<Rows>);

struct Rows {
    shared: Arc<CudaState>,
    home: Arc<Gpu>,
    devices: usize,
    /// One row per fence, with one number per device.
    numbers: Option<Memory>,
    /// True while the guard of a row lives.
    held: [AtomicBool; FENCES],
    rows: Mutex<[Row; FENCES]>,
}

#[derive(Default)]
struct Row {
    value: u32,
    /// Events behind the writes, then behind the waits.
    behind: Vec<PooledEvent>,
    /// True if work was queued without an event behind it.
    lost: bool,
}

impl Waits {
    /// Allocates the numbers and tests that the host and the device can end a wait.
    pub fn new(shared: &Arc<CudaState>) -> Result<Self> {
        enough_connections(std::env::var_os("CUDA_DEVICE_MAX_CONNECTIONS").map(|n| n.to_string_lossy().into_owned()))?;
        let (home, devices) = (shared.gpu(shared.home)?, shared.driver.devices()? as usize);
        let numbers = Some(home.context.pinned(FENCES * devices * size_of::<u32>())?);
        let (shared, held) = (shared.clone(), [const { AtomicBool::new(false) }; FENCES]);
        let rows = Rows { shared, home, devices, numbers, held, rows: Mutex::default() };
        rows.try_out()?;
        Ok(Self(Arc::new(rows)))
    }
}

/// Refuses an environment in which waits of one stream block the work of others.
fn enough_connections(set: Option<String>) -> Result<()> {
    match set {
        Some(n) if n.trim().parse().map_or(true, |n: u32| n < CONNECTIONS) => {
            let why = "too few hardware queues: a wait would block other streams";
            Err(Error::invalid(format!("{why} CUDA_DEVICE_MAX_CONNECTIONS={n:?}")))
        }
        _ => Ok(()),
    }
}

impl Rows {
    fn offset(&self, row: usize, device: u32) -> usize {
        (row * self.devices + device as usize) * size_of::<u32>()
    }

    fn address(&self, row: usize, device: u32) -> Address {
        self.numbers.as_ref().map_or(0, |numbers| numbers.address() + self.offset(row, device) as u64)
    }

    fn number(&self, row: usize, device: u32) -> Option<&AtomicU32> {
        let at = self.numbers.as_ref()?.pointer().wrapping_add(self.offset(row, device));
        // SAFETY: the address is aligned, inside the numbers, which live as long as `self`, and used only as
        // an atomic.
        Some(unsafe { AtomicU32::from_ptr(at.cast()) })
    }

    /// Ends all waits for `value` in this row, with plain stores.
    fn end(&self, row: usize, value: u32) {
        (0..self.devices as u32)
            .filter_map(|device| self.number(row, device))
            .for_each(|number| number.store(value, Ordering::Release));
    }

    /// Queues in `stream` a write of `value` to the number of `context`'s device in `row`.
    fn write(&self, context: &Context, row: usize, value: u32, stream: StreamHandle) -> Result<()> {
        // SAFETY: aligned; the numbers live until this has been reached, or are leaked.
        unsafe { context.write_number(self.address(row, context.ordinal), value, stream) }
    }

    /// Makes later work in `stream`, a stream of `context`, wait until the number of `device` is `value`.
    fn wait(&self, context: &Context, row: usize, device: u32, value: u32, stream: StreamHandle) -> Result<()> {
        // SAFETY: as above.
        unsafe { context.wait_number(self.address(row, device), value, stream) }
    }

    /// Tests waits in a stream of our own, so that a driver that refuses or ignores a wait blocks no stream
    /// of the program.
    fn try_out(&self) -> Result<()> {
        let (gpu, here) = (&self.home, self.home.context.ordinal);
        let stream = gpu.context.stream()?;
        let _entered = gpu.context.enter()?;
        let refused = |why| Err(Error::new(ErrorKind::Device, why));
        let by_host = || {
            self.wait(&gpu.context, 0, here, 1, stream.handle())?;
            std::thread::sleep(TRIAL);
            if stream.is_idle()? {
                return refused("a stream does not wait for a number");
            }
            self.end(0, 1);
            if gpu.settle(&stream) { Ok(()) } else { refused("a store by the host does not end a wait") }
        };
        let by_device = || {
            self.write(&gpu.context, 0, 2, gpu.copies.handle())?;
            self.wait(&gpu.context, 0, here, 2, stream.handle())?;
            let settled = gpu.settle(&gpu.copies);
            let written = self.number(0, here).is_some_and(|number| number.load(Ordering::Acquire) == 2);
            if settled && written { Ok(()) } else { refused("a write by the device does not reach its number") }
        };
        let tried = by_host().and_then(|()| by_device());
        // This store ends all queued waits, unless the driver is broken.
        self.end(0, 2);
        lock(&self.rows)[0].value = 2;
        if gpu.settle(&stream) && gpu.settle(&gpu.copies) {
            return tried;
        }
        self.give_up(stream);
        tried.and(refused("a wait of the self-test did not end"))
    }

    /// Marks row 0 as lost and leaks the stream, because the end of the queued work cannot be known.
    fn give_up(&self, stream: Stream) {
        lock(&self.rows)[0].lost = true;
        forget(stream);
    }

    /// Queues the writes in the copy streams, and the waits for them in `streams`. Returns None when too many
    /// fences are pending.
    fn order(self: &Arc<Self>, streams: &[DeviceStream]) -> Result<Option<WaitGuard>> {
        self.shared.refuse_captures(streams)?;
        let mut rows = lock(&self.rows);
        let Some(index) = self.free(&rows)? else { return Ok(None) };
        let row = &mut rows[index];
        let value = row.value.wrapping_add(1);
        row.value = value;
        row.behind.clear();
        self.held[index].store(true, Ordering::Release);
        // From here on the guard ends the waits, however this call ends.
        let guard = Guard { rows: self.clone(), index, value, origin: ForkGuard::new() };
        let gpus = self.shared.in_use();
        // Take the events before anything is queued, because only they tell when the row is free again.
        for ordinal in gpus.iter().map(|gpu| gpu.context.ordinal).chain(streams.iter().map(|stream| stream.ordinal)) {
            row.behind.push(self.shared.gpu(ordinal)?.event()?);
        }
        let (writes, waits) = row.behind.split_at(gpus.len());
        let lost = &mut row.lost;
        for (gpu, event) in gpus.iter().zip(writes) {
            let copies = gpu.copies.handle();
            queue(event, copies, lost, |context| self.write(context, index, value, copies))?;
        }
        for (stream, event) in streams.iter().zip(waits) {
            let all = |context: &Context| {
                let each = |gpu: &Arc<Gpu>| self.wait(context, index, gpu.context.ordinal, value, stream.into());
                gpus.iter().try_for_each(each)
            };
            queue(event, stream.into(), lost, all)?;
        }
        Ok(Some(Arc::new(guard)))
    }

    /// Finds an unused row.
    fn free(&self, rows: &[Row; FENCES]) -> Result<Option<usize>> {
        let _entered = self.home.context.enter()?;
        let over = |row: &Row| row.behind.iter().all(|event| event.is_reached().unwrap_or(false));
        let free = |i: &usize| !self.held[*i].load(Ordering::Acquire) && !rows[*i].lost && over(&rows[*i]);
        Ok((0..FENCES).find(free))
    }
}

/// Queues `work` in `stream`, a stream of the event's device, and records the event behind it.
fn queue(
    event: &PooledEvent,
    stream: StreamHandle,
    lost: &mut bool,
    work: impl FnOnce(&Context) -> Result<()>,
) -> Result<()> {
    let _entered = event.context().enter()?;
    let queued = work(event.context());
    // Record even if the work failed, because it may still be queued. Try twice, because only the event tells
    // when the work ends.
    let recorded = event.record(stream).or_else(|_| event.record(stream));
    *lost |= recorded.is_err();
    queued.and(recorded)
}

/// A wait guard: while it lives, the waits of a fence last until the copies have ended.
struct Guard {
    rows: Arc<Rows>,
    index: usize,
    value: u32,
    origin: ForkGuard,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // A forked child must not write pinned memory.
        if self.origin.is_ours() {
            self.rows.end(self.index, self.value);
            self.rows.held[self.index].store(false, Ordering::Release);
        }
    }
}

impl Drop for Rows {
    fn drop(&mut self) {
        let context = &self.home.context;
        if context.alive().is_err() {
            return;
        }
        let _entered = context.enter();
        let mut rows = std::mem::take(&mut *lock(&self.rows));
        let over = |event: &PooledEvent| event.context().lost() || event.is_reached().unwrap_or(false);
        let deadline = Instant::now() + SETTLE_TIMEOUT;
        let mut pending = true;
        while pending && Instant::now() < deadline {
            rows.iter_mut().for_each(|row| row.behind.retain(|event| !over(event)));
            pending = rows.iter().any(|row| !row.behind.is_empty());
            if pending {
                std::thread::sleep(POLL_INTERVAL);
            }
        }
        if pending || rows.iter().any(|row| row.lost) {
            tracing::error!("memory-waits did not end; their memory is leaked");
            forget(self.numbers.take());
        }
    }
}

impl fmt::Debug for Waits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Waits({})", self.0.home.context.ordinal)
    }
}

impl device::Waits for Waits {
    fn at_once(&self) -> usize {
        FENCES
    }

    fn order(&self, streams: &[DeviceStream]) -> Result<Option<WaitGuard>> {
        self.0.order(streams)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_queues_that_streams_share_are_refused() {
        for (set, fine) in [(None, true), (Some("8"), true), (Some(" 32 "), true)] {
            assert_eq!(enough_connections(set.map(str::to_owned)).is_ok(), fine);
        }
        for set in ["1", "7", "", "many"] {
            let error = enough_connections(Some(set.into())).unwrap_err();
            assert!(error.to_string().contains("CUDA_DEVICE_MAX_CONNECTIONS="), "{error}");
        }
    }
}
