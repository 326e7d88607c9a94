//! Objects that the driver creates, each destroyed once, when its owner is dropped.
//!
//! # Safety argument
//! See the module above.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use super::super::embedded::Images;
use super::batch::Copies;
use super::codes::{self, flag};
use super::context::{Context, REFUSALS};
use super::functions::Table;
use super::handles::{Address, EventHandle, FunctionHandle, ModuleHandle, StreamHandle};
use super::rows::RowCopy;
use crate::device::RowLayout;
use crate::error::Result;
use crate::state::DeviceStream;
use crate::sync::Mutex;
use std::ffi::CStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The time since which the driver has been refusing to report progress.
type Refusing = Mutex<Option<Instant>>;

impl Context {
    /// Creates a stream that does not wait for the legacy default stream and has the lowest priority.
    pub fn stream(self: &Arc<Self>) -> Result<Stream> {
        let _entered = self.enter()?;
        let (mut least, mut greatest, mut handle) = (0, 0, StreamHandle::default());
        // SAFETY: writes two numbers.
        self.call("cuCtxGetStreamPriorityRange", |t| unsafe { (t.priorities)(&mut least, &mut greatest) })?;
        // SAFETY: writes one handle.
        let made = |t: &Table| unsafe { (t.stream_create)(&mut handle, flag::STREAM_NON_BLOCKING, least) };
        self.call("cuStreamCreateWithPriority", made)?;
        Ok(Stream { context: self.clone(), handle, refusing: Mutex::default() })
    }

    /// Creates an event, which counts as reached until it is recorded. A `timed` event remembers when it was
    /// reached.
    pub fn event(self: &Arc<Self>, timed: bool) -> Result<Event> {
        let _entered = self.enter()?;
        let mut handle = EventHandle::default();
        let flags = if timed { flag::EVENT_DEFAULT } else { flag::EVENT_DISABLE_TIMING };
        // SAFETY: writes one handle.
        self.call("cuEventCreate", |t| unsafe { (t.event_create)(&mut handle, flags) })?;
        Ok(Event { context: self.clone(), handle, refusing: Mutex::default() })
    }

    /// Allocates `len` bytes of device memory, with undefined contents.
    pub fn memory(self: &Arc<Self>, len: usize) -> Result<Memory> {
        let _entered = self.enter()?;
        let mut at = 0;
        // SAFETY: writes one address.
        self.call("cuMemAlloc_v2", |t| unsafe { (t.allocate)(&mut at, len) })?;
        Ok(Memory { context: self.clone(), at, len, host: false })
    }

    /// Allocates `len` zeroed, pinned bytes of host memory, which the device sees at the same address.
    pub fn pinned(self: &Arc<Self>, len: usize) -> Result<Memory> {
        let _entered = self.enter()?;
        let mut base = std::ptr::null_mut();
        // SAFETY: writes one pointer.
        self.call("cuMemHostAlloc", |t| unsafe { (t.allocate_host)(&mut base, len, flag::HOST_PORTABLE_MAPPED) })?;
        let memory = Memory { context: self.clone(), at: base.expose_provenance() as Address, len, host: true };
        // SAFETY: just allocated, and not shared yet.
        unsafe { std::ptr::write_bytes(memory.pointer(), 0, len) };
        Ok(memory)
    }

    /// Loads kernels from the first image that the device accepts.
    pub fn module(self: &Arc<Self>, images: &Images) -> Result<Module> {
        let _entered = self.enter()?;
        let load = |image: &'static [u8]| {
            let mut handle = ModuleHandle::default();
            // SAFETY: PTX ends in a zero, and machine code contains its length; the call writes one handle.
            self.call("cuModuleLoadData", |t| unsafe { (t.module_load)(&mut handle, image.as_ptr().cast()) })?;
            Ok(Module { context: self.clone(), handle })
        };
        images.cubins.iter().find_map(|cubin| load(cubin).ok()).map_or_else(|| load(images.ptx.as_bytes()), Ok)
    }

    /// Queues a fill of all of `memory` with zeros, in any stream of this device.
    pub fn zero(&self, memory: &Memory, stream: StreamHandle) -> Result<()> {
        // SAFETY: within the allocation, whose owner waits for the stream before it drops it.
        self.call("cuMemsetD8Async", |t| unsafe { (t.fill)(memory.address(), 0, memory.len(), stream) })
    }

    /// Pins `len` bytes at `base` for all contexts, until the guard is dropped.
    ///
    /// # Safety
    /// The memory stays mapped until then.
    pub unsafe fn register(self: &Arc<Self>, base: *mut u8, len: usize) -> Result<Registered> {
        let _entered = self.enter()?;
        // SAFETY: mapped memory, by the caller's contract.
        self.call("cuMemHostRegister_v2", |t| unsafe { (t.register)(base.cast(), len, flag::REGISTER_PORTABLE) })?;
        Ok(Registered { context: self.clone(), base: base.addr() })
    }
}

/// A stream that this crate created.
pub struct Stream {
    pub(super) context: Arc<Context>,
    pub(super) handle: StreamHandle,
    pub(super) refusing: Refusing,
}

impl Stream {
    pub fn handle(&self) -> StreamHandle {
        self.handle
    }

    /// Returns the stream in the form in which a program names one.
    pub fn as_device(&self) -> DeviceStream<'_> {
        // SAFETY: a stream of the device's primary context, destroyed only on drop, and borrowed until then.
        unsafe { DeviceStream::new(self.context.ordinal, self.handle.number()) }
    }

    /// Makes everything queued later wait for the work that `event` was last recorded behind.
    pub fn wait(&self, event: &Event) -> Result<()> {
        event.make_wait(self.handle)
    }

    /// True when everything queued so far has ended.
    pub fn is_idle(&self) -> Result<bool> {
        // SAFETY: a live stream.
        self.context.query("cuStreamQuery", &self.refusing, |t| unsafe { (t.stream_query)(self.handle) })
    }

    /// Queues a copy to the host.
    ///
    /// # Safety
    /// `from` stays readable for the device, and `to` writable and otherwise untouched, until the copy has
    /// ended.
    pub unsafe fn copy_to_host(&self, from: Address, to: *mut u8, len: usize) -> Result<()> {
        // SAFETY: the caller's contract.
        unsafe { self.context.copy_to_host(from, to, len, self.handle) }
    }

    /// Queues copies to the host, in one call if the driver supports that.
    ///
    /// # Safety
    /// Each copy meets the contract of [`Stream::copy_to_host`].
    pub unsafe fn copy_all_to_host(&self, copies: &Copies) -> Result<()> {
        if let (Some(batch), true) = (self.context.driver.batch, copies.len() > 1) {
            // SAFETY: the caller's contract; the stream is one that we made.
            return self.context.call(batch.name(), |_| unsafe { batch.call(copies, self.handle) });
        }
        for (from, to, len) in copies.each() {
            // SAFETY: the caller's contract.
            unsafe { self.copy_to_host(from, to, len) }?;
        }
        Ok(())
    }

    /// Queues a copy to the device. If the host memory is not pinned, the call may wait for all earlier work.
    ///
    /// # Safety
    /// `from` stays readable and unchanged, and `to` writable for the device, until the copy has ended.
    pub unsafe fn copy_to_device(&self, from: *const u8, to: Address, len: usize) -> Result<()> {
        // SAFETY: the caller's contract.
        self.context.call("cuMemcpyHtoDAsync_v2", |t| unsafe { (t.to_device)(to, from.cast(), len, self.handle) })
    }

    /// Queues a copy of rows to the device. If the host memory is not pinned, the call may wait for all
    /// earlier work.
    ///
    /// # Safety
    /// As for [`Stream::copy_to_device`], for every row.
    pub unsafe fn copy_rows_to_device(&self, from: *const u8, to: Address, rows: RowLayout) -> Result<()> {
        let copy = RowCopy::to_device(from, to, rows);
        // SAFETY: the caller's contract; the driver reads the arguments during the call only.
        self.context.call("cuMemcpy2DAsync_v2", |t| unsafe { (t.rows_to_device)(&copy, self.handle) })
    }

    /// Queues a store of `value`, visible after everything that was queued before it.
    ///
    /// # Safety
    /// `at` is a multiple of 8 in memory of the device that lives until then.
    pub unsafe fn write(&self, at: Address, value: u64) -> Result<()> {
        const CALL: &str = "cuStreamWriteValue64_v2";
        let write = self.context.driver.table.write_value.ok_or_else(|| codes::absent(CALL))?;
        // SAFETY: the caller's contract.
        self.context.call(CALL, |_| unsafe { write(self.handle, at, value, flag::WRITE_DEFAULT) })
    }

    /// Queues a fill of all of `memory` with zeros.
    pub fn zero(&self, memory: &Memory) -> Result<()> {
        self.context.zero(memory, self.handle)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: created here and not used again; the driver finishes queued work.
        self.context.give_back("cuStreamDestroy_v2", |t| unsafe { (t.stream_destroy)(self.handle) });
    }
}

/// An event that this crate created.
pub struct Event {
    pub(super) context: Arc<Context>,
    pub(super) handle: EventHandle,
    pub(super) refusing: Refusing,
}

impl Event {
    /// Records the event behind everything queued in `stream` so far.
    pub fn record(&self, stream: StreamHandle) -> Result<()> {
        // SAFETY: a live event; the stream is ours, or the program vouched for it.
        self.context.call("cuEventRecord", |t| unsafe { (t.event_record)(self.handle, stream) })
    }

    /// Records the event in a stream of the program behind the work that was just queued there, and retries
    /// for `REFUSALS`. An event that was not recorded counts as reached, and sources would then be freed
    /// under kernels that read them. After an error either none of that work runs any more, or the context is
    /// lost.
    pub fn insist(&self, stream: StreamHandle) -> Result<()> {
        const POLL_INTERVAL: Duration = Duration::from_micros(50);
        let (table, began) = (&self.context.driver.table, Instant::now());
        loop {
            let mut code = codes::SUCCESS;
            for _ in 0..2 {
                self.context.alive()?;
                // SAFETY: as in `record`.
                code = unsafe { (table.event_record)(self.handle, stream) };
                if code == codes::SUCCESS {
                    return Ok(());
                }
            }
            let refused = self.context.judge("cuEventRecord", code).map(drop);
            // SAFETY: as in `record`.
            let idle = self.context.code("cuStreamQuery", |t| unsafe { (t.stream_query)(stream) });
            if code == codes::INVALID_HANDLE || idle.is_ok_and(|code| code == codes::SUCCESS) {
                return refused;
            }
            if let (Err(error), true) = (&refused, began.elapsed() >= REFUSALS) {
                self.context.lose(error);
            }
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Makes `stream` wait for the work that the event was last recorded behind.
    pub fn make_wait(&self, stream: StreamHandle) -> Result<()> {
        // SAFETY: as in `record`.
        self.context.call("cuStreamWaitEvent", |t| unsafe { (t.stream_wait)(stream, self.handle, 0) })
    }

    /// True when all work that the event was last recorded behind has ended.
    pub fn is_reached(&self) -> Result<bool> {
        // SAFETY: a live event.
        self.context.query("cuEventQuery", &self.refusing, |t| unsafe { (t.event_query)(self.handle) })
    }

    /// The milliseconds from when `earlier` was reached until this event was reached; negative if this event
    /// was reached first. Both events must be timed, reached, and of this context.
    pub fn millis_since(&self, earlier: &Self) -> Result<f32> {
        let mut millis = 0.0;
        // SAFETY: live events; writes one number.
        let elapsed = |t: &Table| unsafe { (t.event_elapsed)(&mut millis, earlier.handle, self.handle) };
        self.context.call("cuEventElapsedTime", elapsed)?;
        Ok(millis)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: created here and not used again; the driver keeps it until it is reached.
        self.context.give_back("cuEventDestroy_v2", |t| unsafe { (t.event_destroy)(self.handle) });
    }
}

/// The guard of registered host memory, which is therefore pinned.
pub struct Registered {
    pub(super) context: Arc<Context>,
    pub(super) base: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        let base = std::ptr::without_provenance_mut(self.base);
        // SAFETY: registered here, and unregistered once, before the memory is unmapped.
        self.context.give_back("cuMemHostUnregister", |t| unsafe { (t.unregister)(base) });
    }
}

/// Memory that the driver allocated: on the device, or pinned on the host.
pub struct Memory {
    pub(super) context: Arc<Context>,
    pub(super) at: Address,
    pub(super) len: usize,
    pub(super) host: bool,
}

impl Memory {
    /// The address on the device.
    pub fn address(&self) -> Address {
        self.at
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of pinned memory on the host.
    pub fn pointer(&self) -> *mut u8 {
        debug_assert!(self.host);
        std::ptr::with_exposed_provenance_mut(self.at as usize)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: allocated here; the owner drops it only when nothing uses it any more.
        let free_host = |t: &Table| unsafe { (t.free_host)(self.pointer().cast()) };
        if self.host {
            return self.context.give_back("cuMemFreeHost", free_host);
        }
        // SAFETY: as above.
        self.context.give_back("cuMemFree_v2", |t| unsafe { (t.free)(self.at) });
    }
}

/// A loaded module of kernels.
pub struct Module {
    pub(super) context: Arc<Context>,
    pub(super) handle: ModuleHandle,
}

impl Module {
    pub fn function(&self, name: &CStr) -> Result<FunctionHandle> {
        let _entered = self.context.enter()?;
        let mut function = FunctionHandle::default();
        // SAFETY: a live module, a name that ends in a zero; writes one handle.
        let find = |t: &Table| unsafe { (t.module_function)(&mut function, self.handle, name.as_ptr()) };
        self.context.call("cuModuleGetFunction", find)?;
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: loaded here; the owner drops it only when none of its kernels runs.
        self.context.give_back("cuModuleUnload", |t| unsafe { (t.module_unload)(self.handle) });
    }
}
