//! What the driver lends, each given back once, when it is dropped.
//!
//! # Safety argument
//! That of the module above.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use super::context::{Context, REFUSALS};
use super::{Address, Handle, Table, absent, code};
use crate::error::Result;
use crate::sync::Mutex;
use std::ffi::CStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Since when the driver has been refusing to say how far something is.
type Refusing = Mutex<Option<Instant>>;

/// A stream of our own.
pub struct Stream {
    pub(super) context: Arc<Context>,
    pub(super) handle: Handle,
    pub(super) refusing: Refusing,
}

impl Stream {
    pub fn handle(&self) -> Handle {
        self.handle
    }

    /// Everything queued later comes after what `event` was last recorded behind.
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
    /// `from` stays readable for the device, and `to` writable and otherwise untouched, until the copy has ended.
    pub unsafe fn copy_to_host(&self, from: Address, to: *mut u8, len: usize) -> Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.context.copy_to_host(from, to, len, self.handle) }
    }

    /// Queues a copy to the device. Where the host's memory is not pinned, the call may wait for all that is before it.
    ///
    /// # Safety
    /// `from` stays readable and unchanged, and `to` writable for the device, until the copy has ended.
    pub unsafe fn copy_to_device(&self, from: *const u8, to: Address, len: usize) -> Result<()> {
        // SAFETY: as the caller says.
        self.context.call("cuMemcpyHtoDAsync_v2", |t| unsafe { (t.to_device)(to, from.cast(), len, self.handle) })
    }

    /// Queues a store of `value`, seen by whoever looks after everything that was queued before it.
    ///
    /// # Safety
    /// `at` is a multiple of 8 in memory of the device that lives until then.
    pub unsafe fn write(&self, at: Address, value: u64) -> Result<()> {
        const CALL: &str = "cuStreamWriteValue64_v2";
        let write = self.context.driver.table.write_value.ok_or_else(|| absent(CALL))?;
        // SAFETY: as the caller says.
        self.context.call(CALL, |_| unsafe { write(self.handle, at, value, 0) })
    }

    /// Queues zeros over all of `memory`.
    pub fn zero(&self, memory: &Memory) -> Result<()> {
        self.context.zero(memory, self.handle)
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: made by us and not used again; what is queued still runs.
        self.context.give_back("cuStreamDestroy_v2", |t| unsafe { (t.stream_destroy)(self.handle) });
    }
}

/// An event of our own.
pub struct Event {
    pub(super) context: Arc<Context>,
    pub(super) handle: Handle,
    pub(super) refusing: Refusing,
}

impl Event {
    /// Records it behind everything queued in `stream` so far.
    pub fn record(&self, stream: Handle) -> Result<()> {
        // SAFETY: a live event; the stream is ours, or one for which the program vouched.
        self.context.call("cuEventRecord", |t| unsafe { (t.event_record)(self.handle, stream) })
    }

    /// Records it in a stream of the program behind what was queued there just now, and goes on trying for
    /// `REFUSALS`: an event that was not recorded counts as reached, and sources would be freed under kernels
    /// that read them. After an error nothing of that runs any more, or the context is lost.
    pub fn insist(&self, stream: Handle) -> Result<()> {
        const POLL: Duration = Duration::from_micros(50);
        let (table, began) = (&self.context.driver.table, Instant::now());
        loop {
            let mut code = code::SUCCESS;
            for _ in 0..2 {
                self.context.alive()?;
                // SAFETY: as in `record`.
                code = unsafe { (table.event_record)(self.handle, stream) };
                if code == code::SUCCESS {
                    return Ok(());
                }
            }
            let refused = self.context.judge("cuEventRecord", code).map(drop);
            // SAFETY: as in `record`.
            let idle = self.context.code("cuStreamQuery", |t| unsafe { (t.stream_query)(stream) });
            if code == code::INVALID_HANDLE || idle.is_ok_and(|code| code == code::SUCCESS) {
                return refused;
            }
            if let (Err(error), true) = (&refused, began.elapsed() >= REFUSALS) {
                self.context.lose(error);
            }
            std::thread::sleep(POLL);
        }
    }

    /// Makes `stream` wait for what it was last recorded behind.
    pub fn make_wait(&self, stream: Handle) -> Result<()> {
        // SAFETY: as in `record`.
        self.context.call("cuStreamWaitEvent", |t| unsafe { (t.stream_wait)(stream, self.handle, 0) })
    }

    /// True when everything that it was last recorded behind has ended.
    pub fn is_reached(&self) -> Result<bool> {
        // SAFETY: a live event.
        self.context.query("cuEventQuery", &self.refusing, |t| unsafe { (t.event_query)(self.handle) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: made by us and not used again; the driver keeps it until it is reached.
        self.context.give_back("cuEventDestroy_v2", |t| unsafe { (t.event_destroy)(self.handle) });
    }
}

/// Pinned memory.
pub struct Registered {
    pub(super) context: Arc<Context>,
    pub(super) base: usize,
}

impl Drop for Registered {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        let base = std::ptr::without_provenance_mut(self.base);
        // SAFETY: registered by us, and given back once, before it is unmapped.
        self.context.give_back("cuMemHostUnregister", |t| unsafe { (t.unregister)(base) });
    }
}

/// Memory that the driver allocated, on the device or pinned on the host.
pub struct Memory {
    pub(super) context: Arc<Context>,
    pub(super) at: Address,
    pub(super) len: usize,
    pub(super) host: bool,
}

impl Memory {
    /// The address, for the device.
    pub fn address(&self) -> Address {
        self.at
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// The address of pinned memory, for the host.
    pub fn pointer(&self) -> *mut u8 {
        debug_assert!(self.host);
        std::ptr::with_exposed_provenance_mut(self.at as usize)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: allocated by us and used no more, as its owner sees to.
        let free = |t: &Table| unsafe { if self.host { (t.free_host)(self.at) } else { (t.free)(self.at) } };
        self.context.give_back(if self.host { "cuMemFreeHost" } else { "cuMemFree_v2" }, free);
    }
}

/// Kernels that are loaded.
pub struct Module {
    pub(super) context: Arc<Context>,
    pub(super) handle: Handle,
}

impl Module {
    pub fn function(&self, name: &CStr) -> Result<Handle> {
        let _entered = self.context.enter()?;
        let mut function = 0;
        // SAFETY: a live module, a name that ends in a zero; writes one handle.
        let find = |t: &Table| unsafe { (t.module_function)(&mut function, self.handle, name.as_ptr()) };
        self.context.call("cuModuleGetFunction", find)?;
        Ok(function)
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let _entered = self.context.enter();
        // SAFETY: loaded by us, and none of its kernels is running, as its owner sees to.
        self.context.give_back("cuModuleUnload", |t| unsafe { (t.module_unload)(self.handle) });
    }
}
