//! The CUDA driver, found at run time: the one file that calls it.
//!
//! A library that is absent, a symbol that it lacks, a driver without a device: each is an error that names it, never a panic.
//! A result code is a plain number, because a newer driver may return ones that nobody here knows.
//!
//! **Failure.** A code after which a context is lost is sticky: from then on every call on that context fails with the same
//! error and the driver is not called any more, not even to give things back. **Exit, fork.** A driver that the end of the process
//! has taken down already is no error for whoever gives something back; a forked child never calls it.
//!
//! # Safety argument
//! The signatures are those of `cuda.h` for the symbols named, which the driver keeps stable, and the library is never unloaded.
//! Handles are made here and destroyed once, by the owner that wraps them. Pointers to results are to locals of the call. What
//! a call reads or writes later, in stream order, is what the caller of an `unsafe fn` vouches for.
#![expect(unsafe_code, reason = "calls of a C library; argument above")]

use crate::error::{Error, ErrorKind, Result};
use crate::fork;
use crate::sync::{Mutex, lock};
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A `CUstream`, `CUevent`, `CUcontext`, `CUfunction`: opaque, and harmless as a number.
type Handle = usize;
/// An address of a device.
pub(super) type Address = u64;

/// Codes that mean something here; any other is only a number.
mod code {
    pub const SUCCESS: i32 = 0;
    pub const DEINITIALIZED: i32 = 4;
    pub const STUB: i32 = 34;
    pub const NO_DEVICE: i32 = 100;
    pub const NOT_READY: i32 = 600;
    /// Errors of stream capture lie together.
    pub const CAPTURE: std::ops::RangeInclusive<i32> = 900..=908;
    /// After these nothing on the context works any more.
    pub const STICKY: [i32; 17] =
        [DEINITIALIZED, 46, 214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999];
    pub const NAMES: [(i32, &str); 20] = [
        (1, "invalid value"),
        (2, "out of memory"),
        (3, "not initialized"),
        (DEINITIALIZED, "deinitialized"),
        (STUB, "the library is the stub of a toolkit, not a driver"),
        (46, "device unavailable"),
        (NO_DEVICE, "no device"),
        (101, "invalid device"),
        (200, "invalid image"),
        (201, "invalid context"),
        (214, "uncorrectable memory error"),
        (218, "invalid kernel text"),
        (222, "kernel text of a newer toolkit"),
        (400, "invalid handle"),
        (700, "illegal address"),
        (702, "launch timeout"),
        (712, "host memory registered already"),
        (719, "launch failed"),
        (803, "driver and library do not fit"),
        (999, "unknown"),
    ];
}

macro_rules! table {
    ($($name:ident = $symbol:literal ($($argument:ty),* $(,)?);)*) => {
        /// The functions of the library.
        // SAFETY: types of pointers, which promise nothing and do nothing.
        struct Table { $($name: unsafe extern "C" fn($($argument),*) -> c_int,)* }

        impl Table {
            /// Looks every symbol up, once.
            ///
            /// # Safety
            /// `library` is a CUDA driver.
            unsafe fn find(library: &libloading::Library) -> Result<Self, &'static str> {
                Ok(Self { $(
                    // SAFETY: the caller says that it is a driver; the signature is that of `cuda.h`.
                    $name: unsafe { *library.get(concat!($symbol, "\0").as_bytes()).map_err(|_| $symbol)? },
                )* })
            }
        }
    };
}

table! {
    init = "cuInit"(c_uint);
    version = "cuDriverGetVersion"(*mut c_int);
    device_count = "cuDeviceGetCount"(*mut c_int);
    device_get = "cuDeviceGet"(*mut c_int, c_int);
    device_name = "cuDeviceGetName"(*mut c_char, c_int, c_int);
    retain = "cuDevicePrimaryCtxRetain"(*mut Handle, c_int);
    get_current = "cuCtxGetCurrent"(*mut Handle);
    set_current = "cuCtxSetCurrent"(Handle);
    priorities = "cuCtxGetStreamPriorityRange"(*mut c_int, *mut c_int);
    exchange_capture = "cuThreadExchangeStreamCaptureMode"(*mut c_uint);
    stream_create = "cuStreamCreateWithPriority"(*mut Handle, c_uint, c_int);
    stream_destroy = "cuStreamDestroy_v2"(Handle);
    stream_query = "cuStreamQuery"(Handle);
    stream_wait = "cuStreamWaitEvent"(Handle, Handle, c_uint);
    stream_capturing = "cuStreamIsCapturing"(Handle, *mut c_uint);
    event_create = "cuEventCreate"(*mut Handle, c_uint);
    event_destroy = "cuEventDestroy_v2"(Handle);
    event_record = "cuEventRecord"(Handle, Handle);
    event_query = "cuEventQuery"(Handle);
    register = "cuMemHostRegister_v2"(*mut c_void, usize, c_uint);
    unregister = "cuMemHostUnregister"(*mut c_void);
    to_host = "cuMemcpyDtoHAsync_v2"(*mut c_void, Address, usize, Handle);
    allocate = "cuMemAlloc_v2"(*mut Address, usize);
    free = "cuMemFree_v2"(Address);
    allocate_host = "cuMemHostAlloc"(*mut Address, usize, c_uint);
    free_host = "cuMemFreeHost"(Address);
    fill = "cuMemsetD8Async"(Address, u8, usize, Handle);
    write_value = "cuStreamWriteValue64_v2"(Handle, Address, u64, c_uint);
    module_load = "cuModuleLoadData"(*mut Handle, *const c_char);
    module_unload = "cuModuleUnload"(Handle);
    module_function = "cuModuleGetFunction"(*mut Handle, Handle, *const c_char);
    launch = "cuLaunchKernel"(
        Handle, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, c_uint, Handle, *const *const c_void, *const *const c_void
    );
}

/// The driver of this machine.
pub(super) struct Driver {
    table: Table,
    version: i32,
}

impl Driver {
    /// The driver that the system's loader finds.
    ///
    /// # Errors
    /// `Unavailable`, naming what is missing.
    pub fn find() -> Result<Arc<Self>> {
        let mut missing = None;
        // The first is the driver's own name; toolkits carry stubs under the second.
        for name in ["libcuda.so.1", "libcuda.so"] {
            match Self::open(Path::new(name)) {
                Err(error) if error.kind() == ErrorKind::NotFound => missing = missing.or(Some(error)),
                found => return found,
            }
        }
        let missing = missing.unwrap_or_else(|| Error::internal("no library was looked for"));
        Err(missing.with_kind(ErrorKind::Unavailable))
    }

    /// The driver in the library `path`.
    ///
    /// # Errors
    /// `NotFound` when it cannot be loaded; `Unavailable`, naming what is missing, when it is no driver that works.
    pub fn open(path: &Path) -> Result<Arc<Self>> {
        let named = || format!("library={path:?}");
        // SAFETY: a driver's initialisers are meant to be run by any program; the caller named a driver.
        let library = unsafe { libloading::Library::new(path) }.map_err(|error| {
            Error::new(ErrorKind::NotFound, format!("no CUDA driver is installed {}", named())).with_source(error)
        })?;
        // Never unloaded: drivers have threads.
        let library = std::mem::ManuallyDrop::new(library);
        // SAFETY: the library was named as that of a driver.
        let table = unsafe { Table::find(&library) };
        let unavailable = |why: String| Error::new(ErrorKind::Unavailable, why);
        let table = table
            .map_err(|symbol| unavailable(format!("the CUDA driver is too old or none symbol={symbol} {}", named())))?;
        let mut driver = Self { table, version: 0 };
        // SAFETY: no arguments but a reserved zero.
        driver.start("cuInit", unsafe { (driver.table.init)(0) })?;
        let mut version = 0;
        // SAFETY: writes one number.
        driver.start("cuDriverGetVersion", unsafe { (driver.table.version)(&mut version) })?;
        driver.version = version;
        if driver.devices()? == 0 {
            return Err(unavailable("the CUDA driver has no device".into()));
        }
        Ok(Arc::new(driver))
    }

    /// How many devices there are.
    pub fn devices(&self) -> Result<u32> {
        let mut count = 0;
        // SAFETY: writes one number.
        self.start("cuDeviceGetCount", unsafe { (self.table.device_count)(&mut count) })?;
        Ok(u32::try_from(count).unwrap_or(0))
    }

    /// The version of CUDA that it speaks: 12040 is 12.4.
    pub fn version(&self) -> i32 {
        self.version
    }

    fn start(&self, call: &'static str, code: c_int) -> Result<()> {
        if code == code::SUCCESS { Ok(()) } else { Err(refused(call, code).with_kind(ErrorKind::Unavailable)) }
    }
}

/// The error of a call that returned `code`.
fn refused(call: &str, code: c_int) -> Error {
    if code::CAPTURE.contains(&code) {
        return Error::invalid(format!("a stream is being captured into a graph call={call} code={code}"));
    }
    let name = code::NAMES.iter().find(|(known, _)| *known == code).map_or("unnamed", |(_, name)| name);
    Error::new(ErrorKind::Device, format!("the CUDA driver refused: {name} call={call} code={code}"))
}

/// The primary context of a device, shared with every other user of the device in this process. It is retained when first
/// used and never given back: others may use it without having retained it.
pub(super) struct Context {
    driver: Arc<Driver>,
    pub ordinal: u32,
    handle: Handle,
    dead: AtomicBool,
    why: Mutex<Option<Error>>,
    generation: u64,
}

impl Context {
    /// The primary context of device `ordinal`.
    ///
    /// # Errors
    /// `Unavailable` when there is no such device; `Device` when it cannot be used.
    pub fn retain(driver: Arc<Driver>, ordinal: u32) -> Result<Arc<Self>> {
        let count = driver.devices()?;
        if ordinal >= count {
            let missing = format!("there is no such device device=cuda:{ordinal} devices={count}");
            return Err(Error::new(ErrorKind::Unavailable, missing));
        }
        let generation = fork::generation();
        let mut context = Self { driver, ordinal, handle: 0, dead: false.into(), why: Mutex::new(None), generation };
        let (mut device, mut handle) = (0, 0);
        // SAFETY: writes one number.
        context.call("cuDeviceGet", |t| unsafe { (t.device_get)(&mut device, ordinal as c_int) })?;
        // SAFETY: writes one handle.
        context.call("cuDevicePrimaryCtxRetain", |t| unsafe { (t.retain)(&mut handle, device) })?;
        context.handle = handle;
        Ok(Arc::new(context))
    }

    /// What the device calls itself.
    pub fn device_name(&self) -> Result<String> {
        let (mut device, mut name) = (0, [0; 128]);
        // SAFETY: writes one number.
        self.call("cuDeviceGet", |t| unsafe { (t.device_get)(&mut device, self.ordinal as c_int) })?;
        let len = name.len() as c_int - 1;
        // SAFETY: writes at most `len` bytes, and the last stays zero.
        self.call("cuDeviceGetName", |t| unsafe { (t.device_name)(name.as_mut_ptr(), len, device) })?;
        // SAFETY: the array ends in a zero.
        Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
    }

    /// Fails when the context is lost, or belongs to the parent of a fork.
    pub fn alive(&self) -> Result<()> {
        if self.generation != fork::generation() {
            return Err(Error::invalid("CUDA cannot be used in a forked child"));
        }
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

    /// The one place where codes are judged.
    fn code(&self, call: &'static str, run: impl FnOnce(&Table) -> c_int) -> Result<c_int> {
        self.alive()?;
        let code = run(&self.driver.table);
        if code == code::SUCCESS || code == code::NOT_READY {
            return Ok(code);
        }
        let error = refused(call, code);
        let error = Error::new(error.kind(), format!("{} device=cuda:{}", error.message(), self.ordinal));
        if code::STICKY.contains(&code) {
            lock(&self.why).get_or_insert_with(|| error.clone());
            self.dead.store(true, Ordering::Release);
        }
        Err(error)
    }

    fn call(&self, call: &'static str, run: impl FnOnce(&Table) -> c_int) -> Result<()> {
        self.code(call, run).map(drop)
    }

    /// Gives something back. There is nobody to tell when that fails; it is never an error of what was done with it.
    fn give_back(&self, call: &'static str, run: impl FnOnce(&Table) -> c_int) {
        if self.alive().is_ok()
            && let Err(error) = self.call(call, run)
            && !self.lost()
        {
            tracing::warn!(%error, "could not give back what the CUDA driver had lent");
        }
    }

    /// Makes the context current in this thread until the guard is dropped.
    pub fn enter(&self) -> Result<Entered<'_>> {
        let mut before = 0;
        // SAFETY: writes one handle.
        self.call("cuCtxGetCurrent", |t| unsafe { (t.get_current)(&mut before) })?;
        if before != self.handle {
            // SAFETY: the context is retained for as long as the process lives.
            self.call("cuCtxSetCurrent", |t| unsafe { (t.set_current)(self.handle) })?;
        }
        Ok(Entered { context: self, before })
    }

    /// Makes the context current in this thread for good.
    pub fn make_current(&self) -> Result<()> {
        // SAFETY: as in `enter`.
        self.call("cuCtxSetCurrent", |t| unsafe { (t.set_current)(self.handle) })
    }

    /// Lets this thread query events while other threads capture graphs.
    pub fn relax_capture(&self) -> Result<()> {
        const RELAXED: c_uint = 2;
        let mut mode = RELAXED;
        // SAFETY: reads and writes one number.
        self.call("cuThreadExchangeStreamCaptureMode", |t| unsafe { (t.exchange_capture)(&mut mode) })
    }

    /// A stream of our own: it does not wait for the legacy default stream, and gives way to all others.
    pub fn stream(self: &Arc<Self>) -> Result<Stream> {
        const NON_BLOCKING: c_uint = 1;
        let _entered = self.enter()?;
        let (mut least, mut greatest, mut handle) = (0, 0, 0);
        // SAFETY: writes two numbers.
        self.call("cuCtxGetStreamPriorityRange", |t| unsafe { (t.priorities)(&mut least, &mut greatest) })?;
        // SAFETY: writes one handle.
        let made = |t: &Table| unsafe { (t.stream_create)(&mut handle, NON_BLOCKING, least) };
        self.call("cuStreamCreateWithPriority", made)?;
        Ok(Stream { context: self.clone(), handle })
    }

    /// An event, which is reached until it is recorded.
    pub fn event(self: &Arc<Self>) -> Result<Event> {
        const DISABLE_TIMING: c_uint = 2;
        let _entered = self.enter()?;
        let mut handle = 0;
        // SAFETY: writes one handle.
        self.call("cuEventCreate", |t| unsafe { (t.event_create)(&mut handle, DISABLE_TIMING) })?;
        Ok(Event { context: self.clone(), handle })
    }

    /// Refuses a stream that is being captured into a graph: what is queued there would not run now.
    pub fn refuse_capture(&self, stream: Handle) -> Result<()> {
        let mut status = 0;
        // SAFETY: writes one number; that the handle is a stream is in the contract of `DeviceStream`'s users.
        self.call("cuStreamIsCapturing", |t| unsafe { (t.stream_capturing)(stream, &mut status) })?;
        if status == 0 {
            return Ok(());
        }
        let why = "a stream is being captured into a graph: save and fence between launches";
        Err(Error::invalid(format!("{why} device=cuda:{} stream={stream:#x}", self.ordinal)))
    }

    /// `len` bytes of the device, of unknown content.
    pub fn memory(self: &Arc<Self>, len: usize) -> Result<Memory> {
        let _entered = self.enter()?;
        let mut at = 0;
        // SAFETY: writes one address.
        self.call("cuMemAlloc_v2", |t| unsafe { (t.allocate)(&mut at, len) })?;
        Ok(Memory { context: self.clone(), at, len, host: false })
    }

    /// `len` pinned bytes of the host, which the device sees at the same address; all zero.
    pub fn pinned(self: &Arc<Self>, len: usize) -> Result<Memory> {
        const PORTABLE_MAPPED: c_uint = 3;
        let _entered = self.enter()?;
        let mut at = 0;
        // SAFETY: writes one address.
        self.call("cuMemHostAlloc", |t| unsafe { (t.allocate_host)(&mut at, len, PORTABLE_MAPPED) })?;
        let memory = Memory { context: self.clone(), at, len, host: true };
        // SAFETY: just allocated, and known to nobody.
        unsafe { std::ptr::write_bytes(memory.pointer(), 0, len) };
        Ok(memory)
    }

    /// Loads kernels: a PTX text that ends in a zero.
    pub fn module(self: &Arc<Self>, text: &CStr) -> Result<Module> {
        let _entered = self.enter()?;
        let mut handle = 0;
        // SAFETY: a text that ends in a zero; writes one handle.
        self.call("cuModuleLoadData", |t| unsafe { (t.module_load)(&mut handle, text.as_ptr()) })?;
        Ok(Module { context: self.clone(), handle })
    }

    /// Queues a kernel with one structure as its argument, in any stream of this device.
    ///
    /// # Safety
    /// `function` is of a live module of this context and takes an `A`; what its addresses point to stays until it has run.
    pub unsafe fn launch<A: Copy>(
        &self,
        function: Handle,
        stream: Handle,
        grid: u32,
        block: u32,
        argument: &A,
    ) -> Result<()> {
        let arguments = [std::ptr::from_ref(argument).cast::<c_void>()];
        // SAFETY: the argument is copied by the call; the rest is as the caller says.
        self.call("cuLaunchKernel", |t| unsafe {
            (t.launch)(function, grid, 1, 1, block, 1, 1, 0, stream, arguments.as_ptr(), std::ptr::null())
        })
    }

    /// Pins `len` bytes at `base` for all contexts, until the guard is dropped.
    ///
    /// # Safety
    /// The memory stays mapped until then.
    pub unsafe fn register(self: &Arc<Self>, base: *mut u8, len: usize) -> Result<Registered> {
        const PORTABLE: c_uint = 1;
        let _entered = self.enter()?;
        // SAFETY: mapped memory, as the caller says.
        self.call("cuMemHostRegister_v2", |t| unsafe { (t.register)(base.cast(), len, PORTABLE) })?;
        Ok(Registered { context: self.clone(), base: base.addr() })
    }
}

/// While it lives, its context is current in its thread.
pub(super) struct Entered<'c> {
    context: &'c Context,
    before: Handle,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if self.before != self.context.handle {
            // SAFETY: what was current before is made current again.
            self.context.give_back("cuCtxSetCurrent", |t| unsafe { (t.set_current)(self.before) });
        }
    }
}

/// A stream of our own.
pub(super) struct Stream {
    context: Arc<Context>,
    handle: Handle,
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
        let query = |t: &Table| unsafe { (t.stream_query)(self.handle) };
        Ok(self.context.code("cuStreamQuery", query)? == code::SUCCESS)
    }

    /// Queues a copy to the host.
    ///
    /// # Safety
    /// `from` stays readable for the device, and `to` writable and otherwise untouched, until the copy has ended.
    pub unsafe fn copy_to_host(&self, from: Address, to: *mut u8, len: usize) -> Result<()> {
        // SAFETY: as the caller says.
        self.context.call("cuMemcpyDtoHAsync_v2", |t| unsafe { (t.to_host)(to.cast(), from, len, self.handle) })
    }
}

impl Stream {
    /// Queues a store of `value`, seen by whoever looks after everything that was queued before it.
    ///
    /// # Safety
    /// `at` is a multiple of 8 in memory of the device that lives until then.
    pub unsafe fn write(&self, at: Address, value: u64) -> Result<()> {
        // SAFETY: as the caller says.
        self.context.call("cuStreamWriteValue64_v2", |t| unsafe { (t.write_value)(self.handle, at, value, 0) })
    }

    /// Queues zeros over all of `memory`.
    pub fn zero(&self, memory: &Memory) -> Result<()> {
        // SAFETY: within the allocation, whose owner waits for the stream before it lets go.
        self.context.call("cuMemsetD8Async", |t| unsafe { (t.fill)(memory.at, 0, memory.len, self.handle) })
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
pub(super) struct Event {
    context: Arc<Context>,
    handle: Handle,
}

impl Event {
    /// Records it behind everything queued in `stream` so far.
    pub fn record(&self, stream: Handle) -> Result<()> {
        // SAFETY: a live event; the stream is ours, or one for which the program vouched.
        self.context.call("cuEventRecord", |t| unsafe { (t.event_record)(self.handle, stream) })
    }

    /// Makes `stream` wait for what it was last recorded behind.
    pub fn make_wait(&self, stream: Handle) -> Result<()> {
        // SAFETY: as in `record`.
        self.context.call("cuStreamWaitEvent", |t| unsafe { (t.stream_wait)(stream, self.handle, 0) })
    }

    /// True when everything that it was last recorded behind has ended.
    pub fn is_reached(&self) -> Result<bool> {
        // SAFETY: a live event.
        let query = |t: &Table| unsafe { (t.event_query)(self.handle) };
        Ok(self.context.code("cuEventQuery", query)? == code::SUCCESS)
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
pub(super) struct Registered {
    context: Arc<Context>,
    base: usize,
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
pub(super) struct Memory {
    context: Arc<Context>,
    at: Address,
    len: usize,
    host: bool,
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
pub(super) struct Module {
    context: Arc<Context>,
    handle: Handle,
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
