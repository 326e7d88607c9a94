//! A device that chooses its GPU at the first GPU tensor that is saved, or at the first GPU target of a
//! restore. Until then it touches no GPU, and the host copies.
//!
//! # Safety argument
//! Pages registered before the choice are pinned when the GPU is chosen, under the lock of their guard. The
//! arena drops the guard before it unmaps the pages, and that drop sets `Pin::Over` under the same lock.
//! Queued copies are passed on under the contract of [`CopyQueue`]. A mark of the host is reached when it is
//! made, so the marks of the GPU continue the host's count.
#![expect(unsafe_code, reason = "pins pages later, passes copies on; argument above")]

use super::Cuda;
use super::driver::{Driver, Registered};
use crate::device::auto::Hint;
use crate::device::host::HostQueue;
use crate::device::{CopyQueue, CopyTime, Dependency, Device, KernelMemory, Kernels, LoadQueue, Waits};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::memory::{Node, Pages, Register};
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use smallvec::SmallVec;
use std::any::Any;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

/// A device whose GPU is chosen later; see the module.
pub(super) struct Auto(Arc<Choice>);

struct Choice {
    driver: Arc<Driver>,
    /// The likely device, before a tensor decides the choice.
    hint: Option<Hint>,
    chosen: OnceLock<Cuda>,
    /// Memory to pin once the GPU is chosen. Locked while a device is chosen.
    waiting: Mutex<Vec<Weak<Mutex<Pin>>>>,
    batches: OnceLock<Result<()>>,
}

/// The state of the arena's memory.
enum Pin {
    Waiting {
        base: usize,
        len: usize,
    },
    Pinned {
        _registered: Registered,
    },
    /// The driver refused to pin the memory.
    Not,
    /// The memory is about to be unmapped.
    Over,
}

/// A guard. The arena drops it before it unmaps its memory.
struct Guard(Arc<Mutex<Pin>>);

impl Drop for Guard {
    fn drop(&mut self) {
        *lock(&self.0) = Pin::Over;
    }
}

impl Auto {
    pub fn new(driver: Arc<Driver>, hint: Option<Hint>) -> Self {
        let (chosen, waiting, batches) = (OnceLock::new(), Mutex::default(), OnceLock::new());
        Self(Arc::new(Choice { driver, hint, chosen, waiting, batches }))
    }

    /// The driver's version and number of devices.
    pub fn describe(&self) -> String {
        let (version, devices) = (self.0.driver.version(), self.0.driver.devices().unwrap_or(0));
        format!("CUDA {}.{}, devices={devices}", version / 1000, version % 1000 / 10)
    }
}

impl Choice {
    /// Returns the device if it is chosen.
    fn cuda(&self) -> Result<&Cuda> {
        self.chosen.get().ok_or_else(|| Error::internal("no device is chosen yet"))
    }

    /// Chooses one of the devices of `streams`, and pins the memory that waits for the choice.
    fn choose(&self, streams: &[DeviceStream]) -> Result<&Cuda> {
        let mut waiting = lock(&self.waiting);
        if let Some(chosen) = self.chosen.get() {
            return Ok(chosen);
        }
        let hinted = self.hint.as_ref().map(|hint| hint.ordinal);
        let hinted = hinted.filter(|hint| streams.iter().any(|stream| stream.ordinal == *hint));
        let first = streams.first().map(|stream| stream.ordinal);
        let ordinal = hinted.or(first).ok_or_else(|| Error::internal("no tensor to choose a device for"))?;
        let cuda = Cuda::over(self.driver.clone(), ordinal)?;
        let gpu = cuda.0.gpu(ordinal)?;
        for pin in waiting.drain(..).filter_map(|pin| pin.upgrade()) {
            let mut pin = lock(&pin);
            let Pin::Waiting { base, len } = *pin else { continue };
            // SAFETY: mapped until the guard is dropped, which needs the lock held here.
            let pages = unsafe { Pages::new(std::ptr::with_exposed_provenance_mut(base), len) };
            *pin = match gpu.pin(pages) {
                Ok(_registered) => Pin::Pinned { _registered },
                Err(reason) => {
                    tracing::warn!(%reason, bytes = len, "the arena is not pinned: copies from devices are slow and hold up the stager");
                    _ = self.batches.set(Err(Error::invalid("the arena is not pinned")));
                    Pin::Not
                }
            };
        }
        tracing::info!(device = %cuda.describe(), ordinal, "a GPU is chosen");
        Ok(self.chosen.get_or_init(|| cuda))
    }

    /// Checks, once, that the device can batch the copies of a chunk.
    fn batches(&self) -> Result<()> {
        let cuda = self.cuda()?;
        self.batches.get_or_init(|| cuda.batches()).clone()
    }
}

impl fmt::Debug for Auto {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Auto({:?})", self.0.chosen.get())
    }
}

impl Register for Auto {
    fn register(&self, pages: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        let mut waiting = lock(&self.0.waiting);
        if let Some(chosen) = self.0.chosen.get() {
            return chosen.register(pages);
        }
        let pin = Pin::Waiting { base: pages.base().expose_provenance(), len: pages.size() };
        let pin = Arc::new(Mutex::new(pin));
        waiting.push(Arc::downgrade(&pin));
        Ok(Box::new(Guard(pin)))
    }

    fn node(&self) -> Result<Node, String> {
        let (choice, only) = (&self.0, self.0.driver.devices().is_ok_and(|devices| devices == 1).then_some(0));
        if let Some(chosen) = choice.chosen.get() {
            return chosen.node();
        }
        let likely = choice.hint.as_ref().map(|hint| hint.ordinal).or(only).ok_or("no device is chosen yet")?;
        let id = choice.driver.pci_id(likely);
        Node::of(Path::new("/sys"), &id.map_err(|error| format!("{error:#}"))?)
    }
}

impl Device for Auto {
    fn name(&self) -> String {
        self.0.chosen.get().map_or_else(|| "auto".into(), Cuda::name)
    }

    fn is_settled(&self) -> bool {
        self.0.chosen.get().is_some()
    }

    fn settle(&self, streams: &[DeviceStream]) -> Result<String> {
        self.0.choose(streams).map(|cuda| cuda.describe().to_owned())
    }

    fn queue(&self) -> Result<Box<dyn CopyQueue>> {
        Ok(Box::new(Queue { choice: self.0.clone(), host: HostQueue(0), gpu: None, batch: false, measured: false }))
    }

    fn behind(&self, streams: &[DeviceStream]) -> Result<Dependency> {
        self.0.choose(streams)?.behind(streams)
    }

    /// Before the choice no GPU copy exists, so nothing waits.
    fn order(&self, streams: &[DeviceStream]) -> Result<()> {
        self.0.chosen.get().map_or(Ok(()), |cuda| cuda.order(streams))
    }

    fn loads(&self) -> Result<Box<dyn LoadQueue>> {
        self.0.cuda()?.loads()
    }

    fn batches(&self) -> Result<()> {
        self.0.batches()
    }

    fn kernels(&self, memory: KernelMemory) -> Result<Arc<dyn Kernels>> {
        self.0.cuda()?.kernels(memory)
    }

    fn waits(&self) -> Result<Arc<dyn Waits>> {
        self.0.cuda()?.waits()
    }
}

/// The host's queue, until a GPU is chosen and has something to copy.
struct Queue {
    choice: Arc<Choice>,
    host: HostQueue,
    gpu: Option<Box<dyn CopyQueue>>,
    batch: bool,
    /// Copies are timed.
    measured: bool,
}

impl Queue {
    fn gpu(&mut self) -> Result<&mut dyn CopyQueue> {
        if self.gpu.is_none() {
            let mut queue = self.choice.cuda()?.queue()?;
            if self.batch && self.choice.batches().is_ok() {
                queue.batch();
            }
            queue.measure(self.measured);
            self.gpu = Some(queue);
        }
        self.gpu.as_deref_mut().map(|queue| queue as _).ok_or_else(|| Error::internal("made above"))
    }
}

impl CopyQueue for Queue {
    unsafe fn copy(&mut self, from: *const u8, to: *mut u8, len: usize) -> Result<Option<Digest>> {
        // SAFETY: the caller's contract, passed on.
        unsafe { self.host.copy(from, to, len) }
    }

    fn wait(&mut self, dependency: &Dependency) -> Result<()> {
        self.gpu()?.wait(dependency)
    }

    unsafe fn fetch(&mut self, ordinal: u32, from: *const u8, to: *mut u8, len: usize) -> Result<()> {
        // SAFETY: the caller's contract, passed on.
        unsafe { self.gpu()?.fetch(ordinal, from, to, len) }
    }

    fn batch(&mut self) {
        self.batch = true;
    }

    fn measure(&mut self, on: bool) {
        self.measured = on;
        self.gpu.iter_mut().for_each(|gpu| gpu.measure(on));
    }

    fn times(&mut self, event: u64) -> SmallVec<[CopyTime; 1]> {
        let before = self.host.0;
        self.gpu.as_mut().map_or_else(SmallVec::new, |gpu| gpu.times(event.saturating_sub(before)))
    }

    fn flush(&mut self) -> Result<()> {
        self.gpu.as_mut().map_or(Ok(()), |gpu| gpu.flush())
    }

    fn event(&mut self) -> Result<u64> {
        match &mut self.gpu {
            None => self.host.event(),
            Some(gpu) => Ok(self.host.0 + gpu.event()?),
        }
    }

    fn reached(&mut self) -> Result<u64> {
        match &mut self.gpu {
            None => self.host.reached(),
            Some(gpu) => Ok(self.host.0 + gpu.reached()?),
        }
    }

    fn quiesce(&mut self, deadline: Instant) -> bool {
        // Kernels may have been queued with the copies even if no copy was queued. They need a queue in which
        // to wait.
        if self.choice.chosen.get().is_some() && self.gpu().is_err() {
            return false;
        }
        self.gpu.as_mut().is_none_or(|gpu| gpu.quiesce(deadline))
    }
}
