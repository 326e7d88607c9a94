//! The primary context of a device, and the calls on it.
//!
//! # Safety argument
//! See the module above.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use super::codes::{self, flag};
use super::functions::Table;
use super::handles::{Address, ContextHandle, FunctionHandle, StreamHandle};
use super::library::Driver;
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::sync::{Mutex, lock};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// How long a driver may refuse to report progress before its context counts as lost.
pub(super) const REFUSALS: Duration = Duration::from_secs(2);

/// The primary context of a device, shared with every other user of the device in this process. It is
/// retained at first use and never released: others may use it without having retained it.
pub struct Context {
    pub(super) driver: Arc<Driver>,
    pub ordinal: u32,
    handle: ContextHandle,
    dead: AtomicBool,
    why: Mutex<Option<Error>>,
    origin: ForkGuard,
}

impl Context {
    /// Retains the primary context of device `ordinal`.
    ///
    /// # Errors
    /// `Unavailable` when there is no such device; `Device` when it cannot be used.
    pub fn retain(driver: Arc<Driver>, ordinal: u32) -> Result<Arc<Self>> {
        let count = driver.devices()?;
        if ordinal >= count {
            let missing = format!("there is no such device device=cuda:{ordinal} devices={count}");
            return Err(Error::new(ErrorKind::Unavailable, missing));
        }
        let (origin, handle) = (ForkGuard::new(), ContextHandle::default());
        let mut context = Self { driver, ordinal, handle, dead: false.into(), why: Mutex::new(None), origin };
        let (mut device, mut handle) = (0, handle);
        // SAFETY: writes one number.
        context.call("cuDeviceGet", |t| unsafe { (t.device_get)(&mut device, ordinal as c_int) })?;
        // SAFETY: writes one handle.
        context.call("cuDevicePrimaryCtxRetain", |t| unsafe { (t.retain)(&mut handle, device) })?;
        context.handle = handle;
        Ok(Arc::new(context))
    }

    /// The device's name.
    pub fn device_name(&self) -> Result<String> {
        // SAFETY: writes at most `len` bytes.
        self.text("cuDeviceGetName", |t, to, len, device| unsafe { (t.device_name)(to, len, device) })
    }

    /// The device's PCI bus id: `0000:0F:00.0`.
    pub fn pci_id(&self) -> Result<String> {
        // SAFETY: writes at most `len` bytes.
        self.text("cuDeviceGetPCIBusId", |t, to, len, device| unsafe { (t.device_pci_id)(to, len, device) })
    }

    /// Returns a text about the device, from a call that writes at most the given number of bytes.
    fn text(&self, call: &'static str, run: impl Fn(&Table, *mut c_char, c_int, c_int) -> c_int) -> Result<String> {
        let (mut device, mut name) = (0, [0; 128]);
        // SAFETY: writes one number.
        self.call("cuDeviceGet", |t| unsafe { (t.device_get)(&mut device, self.ordinal as c_int) })?;
        let len = name.len() as c_int - 1;
        // The last byte stays zero.
        self.call(call, |t| run(t, name.as_mut_ptr(), len, device))?;
        // SAFETY: the array ends in a zero.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Fails when the context is lost, or belongs to the parent of a fork.
    pub fn alive(&self) -> Result<()> {
        self.origin.check("CUDA cannot be used in a forked child")?;
        if self.dead.load(Ordering::Acquire) {
            let lost = || Error::new(ErrorKind::Device, "the CUDA context is lost");
            return Err(lock(&self.why).clone().unwrap_or_else(lost));
        }
        Ok(())
    }

    /// True once the context is lost. The driver has stopped all of its work by then.
    pub fn lost(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(super) fn code(&self, call: &'static str, run: impl FnOnce(&Table) -> c_int) -> Result<c_int> {
        self.alive()?;
        self.judge(call, run(&self.driver.table))
    }

    /// Judges a result code; all calls pass through here.
    pub(super) fn judge(&self, call: &'static str, code: c_int) -> Result<c_int> {
        if code == codes::SUCCESS || code == codes::NOT_READY {
            return Ok(code);
        }
        let error = self.refused(call, code);
        if codes::is_sticky(code) {
            self.lose(&error);
        }
        Err(error)
    }

    fn refused(&self, call: &'static str, code: c_int) -> Error {
        let error = codes::refused(call, code);
        Error::new(error.kind(), format!("{} device=cuda:{}", error.message(), self.ordinal))
    }

    /// Marks the context as lost. From then on the driver is not called, host memory that it may still use
    /// stays pinned, and data that is copied with this context is never published.
    pub(super) fn lose(&self, why: &Error) {
        lock(&self.why).get_or_insert_with(|| why.clone());
        if !self.dead.swap(true, Ordering::AcqRel) {
            tracing::error!(error = %why, "a CUDA context is lost");
        }
    }

    /// Queries one of our objects: true when its work has ended. The caller waits, but must not wait for ever
    /// for a driver that refuses to answer. If the driver does not know our handle in our own context, that
    /// context was reset and its work has ended. Any other refusal becomes permanent after `REFUSALS` without
    /// an answer.
    pub(super) fn query(
        &self,
        call: &'static str,
        refusing: &Mutex<Option<Instant>>,
        ask: impl Fn(&Table) -> c_int,
    ) -> Result<bool> {
        self.alive()?;
        let mut code = ask(&self.driver.table);
        // Code of the program that ran in this thread may have left the thread without a context.
        if code == codes::INVALID_CONTEXT && self.make_current().is_ok() {
            code = ask(&self.driver.table);
        }
        let answer = self.judge(call, code);
        let mut refusing = lock(refusing);
        match &answer {
            Ok(_) => *refusing = None,
            Err(error) => {
                let unknown = code == codes::INVALID_CONTEXT || code == codes::INVALID_HANDLE;
                if unknown || refusing.get_or_insert_with(Instant::now).elapsed() >= REFUSALS {
                    self.lose(error);
                }
            }
        }
        answer.map(|code| code == codes::SUCCESS)
    }

    pub(super) fn call(&self, call: &'static str, run: impl FnOnce(&Table) -> c_int) -> Result<()> {
        self.code(call, run).map(drop)
    }

    /// Releases an object. A failure is only logged, because it does not affect the work done with the
    /// object.
    pub(super) fn give_back(&self, call: &'static str, run: impl FnOnce(&Table) -> c_int) {
        if self.alive().is_ok()
            && let Err(error) = self.call(call, run)
            && !self.lost()
        {
            tracing::warn!(error = format_args!("{error:#}"), "could not release an object of the CUDA driver");
        }
    }

    /// Makes the context current in this thread until the guard is dropped. Until then the thread's calls
    /// break no graph capture, neither its own nor that of another thread.
    pub fn enter(&self) -> Result<Entered<'_>> {
        let mut before = ContextHandle::default();
        // SAFETY: writes one handle.
        self.call("cuCtxGetCurrent", |t| unsafe { (t.get_current)(&mut before) })?;
        if before != self.handle {
            // SAFETY: the context is retained for as long as the process lives.
            self.call("cuCtxSetCurrent", |t| unsafe { (t.set_current)(self.handle) })?;
        }
        let mut entered = Entered { context: self, before, mode: None };
        entered.mode = Some(self.exchange_capture(flag::CAPTURE_RELAXED)?);
        Ok(entered)
    }

    /// Makes the context current in this thread for good.
    pub fn make_current(&self) -> Result<()> {
        // SAFETY: as in `enter`.
        self.call("cuCtxSetCurrent", |t| unsafe { (t.set_current)(self.handle) })
    }

    /// Lets this thread query events while other threads capture graphs.
    pub fn relax_capture(&self) -> Result<()> {
        self.exchange_capture(flag::CAPTURE_RELAXED).map(drop)
    }

    /// Exchanges this thread's capture mode; returns the previous one.
    fn exchange_capture(&self, mode: c_uint) -> Result<c_uint> {
        let mut mode = mode;
        // SAFETY: reads and writes one number.
        self.call("cuThreadExchangeStreamCaptureMode", |t| unsafe { (t.exchange_capture)(&mut mode) })?;
        Ok(mode)
    }

    /// Refuses a stream that is being captured into a graph, because work queued there would not run now.
    pub fn refuse_capture(&self, stream: StreamHandle) -> Result<()> {
        let mut status = 0;
        // SAFETY: writes one number; users of `DeviceStream` vouch that the handle is a stream.
        self.call("cuStreamIsCapturing", |t| unsafe { (t.stream_capturing)(stream, &mut status) })?;
        if status == flag::NOT_CAPTURING {
            return Ok(());
        }
        let why = "a stream is being captured into a graph: save, fence and restore between launches";
        Err(Error::invalid(format!("{why} device=cuda:{} stream={:#x}", self.ordinal, stream.number())))
    }

    /// Queues a kernel with one structure as its argument, in any stream of this device.
    ///
    /// # Safety
    /// `function` belongs to a live module of this context and takes an `A`. The memory at the addresses in
    /// it stays until the kernel has run.
    pub unsafe fn launch<A: Copy>(
        &self,
        function: FunctionHandle,
        stream: StreamHandle,
        grid: u32,
        block: u32,
        argument: &A,
    ) -> Result<()> {
        let mut arguments = [std::ptr::from_ref(argument).cast_mut().cast::<c_void>()];
        // SAFETY: the call copies the argument; the caller's contract covers the rest.
        self.call("cuLaunchKernel", |t| unsafe {
            (t.launch)(function, grid, 1, 1, block, 1, 1, 0, stream, arguments.as_mut_ptr(), std::ptr::null_mut())
        })
    }

    /// Queues a copy to the host, in any stream of this device.
    ///
    /// # Safety
    /// As [`Stream::copy_to_host`](super::Stream::copy_to_host).
    pub unsafe fn copy_to_host(&self, from: Address, to: *mut u8, len: usize, stream: StreamHandle) -> Result<()> {
        // SAFETY: the caller's contract.
        self.call("cuMemcpyDtoHAsync_v2", |t| unsafe { (t.to_host)(to.cast(), from, len, stream) })
    }

    /// Queues a store of `value`, in any stream of this device, visible after everything that was queued
    /// before it.
    ///
    /// # Safety
    /// `at` is a multiple of 4 in pinned memory that lives until the store is done.
    pub unsafe fn write_number(&self, at: Address, value: u32, stream: StreamHandle) -> Result<()> {
        const CALL: &str = "cuStreamWriteValue32_v2";
        let write = self.driver.table.write_number.ok_or_else(|| codes::absent(CALL))?;
        // SAFETY: the caller's contract.
        self.call(CALL, |_| unsafe { write(stream, at, value, flag::WRITE_DEFAULT) })
    }

    /// Makes later work in `stream`, any stream of this device, wait until the number at `at` is `value`, or
    /// has gone past `value`.
    ///
    /// # Safety
    /// As [`Context::write_number`].
    pub unsafe fn wait_number(&self, at: Address, value: u32, stream: StreamHandle) -> Result<()> {
        const CALL: &str = "cuStreamWaitValue32_v2";
        let wait = self.driver.table.wait_number.ok_or_else(|| codes::absent(CALL))?;
        // SAFETY: the caller's contract.
        self.call(CALL, |_| unsafe { wait(stream, at, value, flag::WAIT_AT_LEAST) })
    }
}

/// A guard: while it lives, its context is current in its thread.
pub struct Entered<'c> {
    context: &'c Context,
    before: ContextHandle,
    mode: Option<c_uint>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if !self.context.origin.is_ours() {
            return;
        }
        // Restore even if the context was lost meanwhile: the thread belongs to the program, which may
        // continue with another device.
        let table = &self.context.driver.table;
        if let Some(mut mode) = self.mode {
            // SAFETY: reads and writes one number.
            unsafe { (table.exchange_capture)(&mut mode) };
        }
        if self.before != self.context.handle {
            // SAFETY: makes the previous context current again.
            unsafe { (table.set_current)(self.before) };
        }
    }
}
