//! The GPUs of this machine. The CUDA driver, through which they are used, is found at run time.
//!
//! **Order.** Copies are queued in a stream of our own. They wait for events that `save`, in its own thread,
//! recorded in the producers' streams. A fence records an event behind all copies queued so far, and the
//! program's streams wait for that event: on the GPU, not on the host.
//! **Completion.** One event behind each chunk, which only the stager queries.
//! **Memory.** Events come from a pool. Lists for kernels come from another pool, which allocates only when a
//! list is longer than all earlier lists. Otherwise nothing is allocated, registered or freed while a program
//! trains.
//! **Failure.** See `driver`: after an error from which a context does not recover, the driver is called only
//! to restore a thread's previous context.
//!
//! # Safety argument
//! The only unsafe operation runs the code of a library. The caller that names the library vouches that it is
//! a driver.

mod auto;
mod copy_streams;
mod copy_times;
mod driver;
mod embedded;
mod fences;
mod gpu;
mod kernels;
mod late_copy;
mod loaded;
mod pooled_event;
mod queue;
mod self_test;
mod table;
mod upload;
mod waits;

use super::auto::Hint;
use super::{CopyQueue, Dependency, Device, KernelMemory, Kernels, LoadQueue, Waits};
use crate::error::{ErrorKind, Result};
use crate::memory::{Node, Pages, Register};
use crate::state::DeviceStream;
use crate::sync::{Mutex, lock};
use driver::Driver;
use gpu::Gpu;
use pooled_event::PooledEvent;
use std::any::Any;
use std::fmt;
use std::path::Path;
use std::sync::Arc;

/// The GPUs of this machine as one device. One of the GPUs pins the arena. Tensors may be on any of them.
pub struct Cuda(Arc<CudaState>);

struct CudaState {
    driver: Arc<Driver>,
    home: u32,
    describe: String,
    /// By ordinal; created on first use.
    gpus: Mutex<Vec<Option<Arc<Gpu>>>>,
}

impl Cuda {
    /// Finds the driver and retains the primary context of device `ordinal`.
    ///
    /// # Errors
    /// `Unavailable`, naming the library, symbol or device that is missing; `Device` when the driver refuses.
    pub fn new(ordinal: u32) -> Result<Self> {
        Self::over(Driver::find()?, ordinal)
    }

    /// Like [`Cuda::new`], with the driver in the library at `path`.
    ///
    /// # Safety
    /// The library, if it exists, is a CUDA driver.
    ///
    /// # Errors
    /// As [`Cuda::new`].
    #[expect(unsafe_code, reason = "runs code of a library that the caller names")]
    pub unsafe fn with_driver(path: &Path, ordinal: u32) -> Result<Self> {
        Self::over(Driver::open(path).map_err(unavailable)?, ordinal)
    }

    /// Returns the device for [`DeviceChoice::Auto`](super::DeviceChoice), and the reason: the device of
    /// memory that was `given`, the device of the current context, or an open choice. With `now`, it takes
    /// the device of the launcher's rank, or the first device, instead of an open choice.
    pub(super) fn auto(now: bool, given: Option<u32>) -> Result<(Arc<dyn Device>, String)> {
        let driver = Driver::find()?;
        let given = given.map(|ordinal| Hint { ordinal, why: "the device of the scratch memory".into() });
        let current = || Some(Hint { ordinal: driver.current()?, why: "the device of the current context".into() });
        let launcher = || Hint::of_launcher(driver.devices().ok()?, |name| std::env::var(name).ok());
        let first = || now.then(|| Hint { ordinal: 0, why: "the first".into() });
        let decided = given.or_else(current).or_else(|| now.then(launcher).flatten()).or_else(first);
        if let Some(Hint { ordinal, why }) = decided {
            let device = Self::over(driver, ordinal)?;
            let why = format!("{}, {why}", device.describe());
            return Ok((Arc::new(device), why));
        }
        let hint = launcher();
        let likely =
            hint.as_ref().map_or(String::new(), |Hint { ordinal, why }| format!(", likely cuda:{ordinal}, {why}"));
        let device = auto::Auto::new(driver, hint);
        let why = format!("chosen at the first tensor of a GPU{likely}, {}", device.describe());
        Ok((Arc::new(device), why))
    }

    fn over(driver: Arc<Driver>, ordinal: u32) -> Result<Self> {
        let home = Gpu::new(driver.clone(), ordinal)?;
        let version = driver.version();
        let describe = format!("{}, CUDA {}.{}", home.context.device_name()?, version / 1000, version % 1000 / 10);
        let mut gpus = Vec::new();
        gpus.resize(ordinal as usize + 1, None);
        gpus[ordinal as usize] = Some(home);
        Ok(Self(Arc::new(CudaState { driver, home: ordinal, describe, gpus: Mutex::new(gpus) })))
    }

    /// The names of the device and the driver's version.
    pub fn describe(&self) -> &str {
        &self.0.describe
    }
}

fn unavailable(error: crate::Error) -> crate::Error {
    if error.kind() == ErrorKind::NotFound { error.with_kind(ErrorKind::Unavailable) } else { error }
}

impl CudaState {
    /// Returns the GPU `ordinal`, created on first use.
    fn gpu(&self, ordinal: u32) -> Result<Arc<Gpu>> {
        let mut gpus = lock(&self.gpus);
        if let Some(Some(gpu)) = gpus.get(ordinal as usize) {
            return Ok(gpu.clone());
        }
        let gpu = Gpu::new(self.driver.clone(), ordinal)?;
        if gpus.len() <= ordinal as usize {
            gpus.resize(ordinal as usize + 1, None);
        }
        gpus[ordinal as usize] = Some(gpu.clone());
        Ok(gpu)
    }

    /// The GPUs used so far.
    fn in_use(&self) -> Vec<Arc<Gpu>> {
        lock(&self.gpus).iter().flatten().cloned().collect()
    }
}

impl fmt::Debug for Cuda {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cuda({}, {})", self.0.home, self.0.describe)
    }
}

impl Register for Cuda {
    fn register(&self, pages: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(self.0.gpu(self.0.home)?.pin(pages)?))
    }

    fn node(&self) -> Result<Node, String> {
        let id = self.0.gpu(self.0.home).and_then(|gpu| gpu.context.pci_id());
        Node::of(Path::new("/sys"), &id.map_err(|error| format!("{error:#}"))?)
    }
}

#[expect(private_interfaces, reason = "kernels, waits and loads are for this crate alone")]
impl Device for Cuda {
    fn name(&self) -> String {
        format!("cuda:{}", self.0.home)
    }

    fn queue(&self) -> Result<Box<dyn CopyQueue>> {
        Ok(Box::new(queue::Queue::new(self.0.clone())?))
    }

    fn behind(&self, streams: &[DeviceStream]) -> Result<Dependency> {
        self.0.refuse_captures(streams)?;
        let behind = streams.iter().map(|stream| {
            let gpu = self.0.gpu(stream.ordinal)?;
            let _entered = gpu.context.enter()?;
            let event = gpu.event()?;
            event.record(stream.into())?;
            Ok(event)
        });
        Ok(Arc::new(behind.collect::<Result<Vec<PooledEvent>>>()?))
    }

    fn order(&self, streams: &[DeviceStream]) -> Result<()> {
        self.0.refuse_captures(streams)?;
        for gpu in self.0.in_use() {
            let event = {
                let _entered = gpu.context.enter()?;
                let event = gpu.event()?;
                event.record(gpu.copies.handle())?;
                event
            };
            self.0.make_wait(streams, &event)?;
        }
        Ok(())
    }

    fn loads(&self) -> Result<Box<dyn LoadQueue>> {
        Ok(Box::new(upload::Uploads::new(self.0.clone())?))
    }

    fn batches(&self) -> Result<()> {
        self.0.driver.batches()?;
        self_test::batch(&self.0.gpu(self.0.home)?)
    }

    fn kernels(&self, memory: KernelMemory) -> Result<Arc<dyn Kernels>> {
        Ok(Arc::new(kernels::Kernels::new(&self.0, memory)?))
    }

    fn waits(&self) -> Result<Arc<dyn Waits>> {
        Ok(Arc::new(waits::Waits::new(&self.0)?))
    }
}

impl CudaState {
    /// Makes every stream wait for the work that `event` was recorded behind.
    fn make_wait(&self, streams: &[DeviceStream], event: &PooledEvent) -> Result<()> {
        for stream in streams {
            let waiting = self.gpu(stream.ordinal)?;
            let _entered = waiting.context.enter()?;
            event.make_wait(stream.into())?;
        }
        Ok(())
    }

    /// Refuses streams that are being captured into a graph. Called before anything is queued.
    fn refuse_captures(&self, streams: &[DeviceStream]) -> Result<()> {
        for stream in streams {
            let gpu = self.gpu(stream.ordinal)?;
            let _entered = gpu.context.enter()?;
            gpu.context.refuse_capture(stream.into())?;
        }
        Ok(())
    }
}
