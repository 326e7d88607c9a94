//! A device whose copies run later, on a separate thread, like the copies of a GPU.
//!
//! **Fault model.** A copy runs some time after it was queued, and reads its source only then: if the memory
//! was written or freed meanwhile, the copy gets changed bytes. Its destination contains poison from the
//! moment of queuing. A copy or a completion event can fail when it is queued, or later. The error is sticky.
//! A held device does nothing until it is released.
//!
//! # Safety argument
//! Copies run under the contract of [`CopyQueue::copy`]: source and slab stay valid until a later completion
//! event is reached, or until `quiesce` has returned true. The worker dereferences only pointers of work that
//! is still queued, and a failure empties the queue.
#![expect(unsafe_code, reason = "late copies between memory that the contract keeps alive; argument above")]

use crate::Builder;
use crate::device::{CopyQueue, Device};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::{Pages, Register};
use std::any::Any;
use std::collections::VecDeque;
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The byte written to a destination when a copy to it is queued.
pub const POISON: u8 = 0xCD;

/// The asynchronous host device. Clones are the same device.
///
/// ```
/// use ashore::testing::LateDevice;
/// use ashore::{CheckpointExecutor, StateDict, storage::Memory};
/// use std::{sync::Arc, time::Duration};
/// let device = LateDevice::default();
/// let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(Memory::new()));
/// let executor = device.under(builder).arena(16 << 20).chunk(1 << 20).build()?;
/// device.hold(); // no byte is copied
/// let mut state = StateDict::new();
/// state.tensor("weights", Arc::new(vec![0.5_f32; 4]))?;
/// let save = executor.save(1, state)?;
/// assert!(save.try_get().is_none());
/// device.release();
/// save.wait(Duration::from_secs(60))?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone)]
pub struct LateDevice(Arc<LateState>);

#[derive(Default)]
struct LateState {
    state: Mutex<State>,
    changed: Condvar,
    registered: AtomicUsize,
}

#[derive(Default)]
struct State {
    work: VecDeque<Work>,
    delay: Duration,
    held: bool,
    /// Copies that may still run while the device is held. Every copy uses one. For tests of interleavings.
    tickets: u64,
    queued: u64,
    copied: u64,
    running: bool,
    fail_when_queued: Option<u64>,
    fail_when_run: Option<u64>,
    failed: bool,
    /// True while a queue exists. There is at most one queue.
    queue: bool,
}

#[derive(Clone, Copy)]
enum Work {
    Copy { from: *const u8, to: *mut u8, len: usize },
    Mark(u64),
}

// SAFETY: only the worker uses the pointers, under the contract of `CopyQueue::copy`.
unsafe impl Send for Work {}

impl Default for LateDevice {
    fn default() -> Self {
        Self::new(Duration::ZERO)
    }
}

impl LateDevice {
    /// Makes a device that waits `delay` before each copy.
    pub fn new(delay: Duration) -> Self {
        let device = Self(Arc::default());
        device.state().delay = delay;
        device
    }

    /// Makes the executor of `builder` copy with this device.
    pub fn under(&self, builder: Builder) -> Builder {
        builder.made_device(Arc::new(self.clone()))
    }

    /// Stops all copies until [`LateDevice::release`].
    pub fn hold(&self) {
        self.state().held = true;
    }

    /// Resumes copies.
    pub fn release(&self) {
        self.state().held = false;
        self.0.changed.notify_all();
    }

    /// Lets a held device make `copies` more copies.
    pub fn allow(&self, copies: u64) {
        self.state().tickets += copies;
        self.0.changed.notify_all();
    }

    /// Makes the `n`-th copy from now (1 is the next) fail when it is queued.
    pub fn fail_when_queued(&self, n: u64) {
        let mut state = self.state();
        state.fail_when_queued = Some(state.queued + n);
    }

    /// Makes the `n`-th copy from now (1 is the next) fail when it runs.
    pub fn fail_when_run(&self, n: u64) {
        let mut state = self.state();
        state.fail_when_run = Some(state.copied + n);
    }

    /// Clears the error, like a new context.
    pub fn heal(&self) {
        self.state().failed = false;
    }

    /// The watermark: the number of copies made.
    pub fn copied(&self) -> u64 {
        self.state().copied
    }

    /// The number of copies queued.
    pub fn queued(&self) -> u64 {
        self.state().queued
    }

    /// The number of registrations of memory that are alive.
    pub fn registered(&self) -> usize {
        self.0.registered.load(Ordering::Acquire)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state()
    }
}

impl LateState {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for LateDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LateDevice({} of {} copied)", self.copied(), self.queued())
    }
}

impl Register for LateDevice {
    fn register(&self, _: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        struct Registered(Arc<LateState>);
        impl Drop for Registered {
            fn drop(&mut self) {
                self.0.registered.fetch_sub(1, Ordering::AcqRel);
            }
        }
        self.0.registered.fetch_add(1, Ordering::AcqRel);
        Ok(Box::new(Registered(self.0.clone())))
    }
}

impl Device for LateDevice {
    fn name(&self) -> String {
        "late".into()
    }

    fn queue(&self) -> Result<Box<dyn CopyQueue>> {
        let mut state = self.state();
        if state.failed || state.queue {
            return Err(broken("it makes a queue, or it already has one"));
        }
        state.queue = true;
        drop(state);
        let reached = Arc::new(Mutex::new(Progress::default()));
        let (shared, progress) = (self.0.clone(), reached.clone());
        let worker = std::thread::Builder::new().name("late-device".into()).spawn(move || work(&shared, &progress));
        let worker = worker.map_err(|e| Error::new(ErrorKind::Device, "no thread for a late device").with_source(e))?;
        Ok(Box::new(Queue { shared: self.0.clone(), progress: reached, recorded: 0, worker: Some(worker) }))
    }
}

#[derive(Default)]
struct Progress {
    reached: u64,
    closed: bool,
}

struct Queue {
    shared: Arc<LateState>,
    progress: Arc<Mutex<Progress>>,
    recorded: u64,
    worker: Option<std::thread::JoinHandle<()>>,
}

fn broken(what: &str) -> Error {
    Error::new(ErrorKind::Device, format!("the late device failed while {what}"))
}

/// The worker thread. It does one piece of work at a time, in order.
fn work(shared: &LateState, progress: &Mutex<Progress>) {
    let mut state = shared.state();
    loop {
        let closed = progress.lock().unwrap_or_else(PoisonError::into_inner).closed;
        let may = state.tickets > 0 || !state.held;
        match state.work.front().copied() {
            None if closed => return,
            Some(Work::Mark(event)) => {
                state.work.pop_front();
                progress.lock().unwrap_or_else(PoisonError::into_inner).reached = event;
                shared.changed.notify_all();
            }
            Some(Work::Copy { .. }) if !may && closed => state.work.clear(),
            Some(Work::Copy { from, to, len }) if may => {
                state.work.pop_front();
                state.tickets = state.tickets.saturating_sub(1);
                if state.fail_when_run == Some(state.copied + 1) {
                    state.fail_when_run = None;
                    state.failed = true;
                    state.work.clear();
                    shared.changed.notify_all();
                    continue;
                }
                state.running = true;
                let delay = state.delay;
                drop(state);
                if !delay.is_zero() {
                    std::thread::sleep(delay);
                }
                // SAFETY: under the contract of `CopyQueue::copy`, no later event was reached, and `quiesce`
                // waits for `running`.
                unsafe { std::ptr::copy_nonoverlapping(from, to, len) };
                state = shared.state();
                state.running = false;
                state.copied += 1;
                shared.changed.notify_all();
            }
            _ => {
                let waited = shared.changed.wait_timeout(state, Duration::from_millis(20));
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

impl CopyQueue for Queue {
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>> {
        let mut state = self.shared.state();
        state.queued += 1;
        if state.fail_when_queued == Some(state.queued) {
            state.failed = true;
            state.work.clear();
        }
        if state.failed {
            return Err(broken("it queued a copy"));
        }
        // SAFETY: the caller leaves `to` to this copy until a later completion event is reached.
        unsafe { std::ptr::write_bytes(to, POISON, len) };
        state.work.push_back(Work::Copy { from, to, len });
        self.shared.changed.notify_all();
        Ok(None)
    }

    fn event(&mut self) -> Result<u64> {
        let mut state = self.shared.state();
        if state.failed {
            return Err(broken("it queued a completion event"));
        }
        self.recorded += 1;
        state.work.push_back(Work::Mark(self.recorded));
        self.shared.changed.notify_all();
        Ok(self.recorded)
    }

    fn reached(&mut self) -> Result<u64> {
        if self.shared.state().failed {
            return Err(broken("copies were in progress"));
        }
        Ok(self.progress.lock().unwrap_or_else(PoisonError::into_inner).reached)
    }

    fn quiesce(&mut self, deadline: Instant) -> bool {
        let mut state = self.shared.state();
        while state.running || !state.work.is_empty() {
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return false };
            let waited = self.shared.changed.wait_timeout(state, left.min(Duration::from_millis(20)));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.shared.changed.notify_all();
        if let Some(worker) = self.worker.take() {
            let _ = worker.join();
        }
        self.shared.state().queue = false;
    }
}
