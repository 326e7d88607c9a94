//! A program that trains on a GPU: it uses the driver itself and shares a context with ashore, which knows
//! nothing of it.
#![expect(unsafe_code, reason = "calls of a C library, and sources over its memory")]

use crate::fixtures::executor::LONG;
use crate::fixtures::strided::View;
use ashore::id::step_name;
use ashore::internal::device::Cuda;
use ashore::storage::{Memory, Storage};
use ashore::{
    Builder, Capture, Checkpoint, CheckpointExecutor, DeviceStream, DeviceTarget, Dtype, RawDevice, StateDict,
};
use cudarc::driver::sys::{self, CUresult::CUDA_SUCCESS as SUCCESS};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

/// Opens the driver, once; cudarc then finds the same one. Its functions are those of `cuda.h`, and none of
/// them is absent there.
fn open() {
    static OPENED: OnceLock<()> = OnceLock::new();
    OPENED.get_or_init(|| {
        // SAFETY: the driver, or its simulation; it stays open.
        let library = unsafe { std::mem::ManuallyDrop::new(libloading::Library::new(library()).unwrap()) };
        let live = |library: &libloading::Library| {
            // SAFETY: the symbol is only looked for.
            unsafe { library.get::<fn()>(b"fakecuda_live\0") }.map(|f| *f as usize).ok()
        };
        let simulated = live(&library);
        assert!(!(simulated.is_some() && real()), "a real device was asked for");
        // SAFETY: there is one, opened above.
        assert_eq!(simulated, live(unsafe { sys::culib() }), "cudarc has found another driver");
        // SAFETY: a reserved zero.
        assert_eq!(unsafe { sys::cuInit(0) }, SUCCESS);
    });
}

/// Calls the driver, which must not refuse.
macro_rules! cuda {
    ($name:ident($($argument:expr),*)) => {{
        open();
        // SAFETY: handles and addresses are live, and results go to locals, as each caller sees to.
        let code = unsafe { sys::$name($($argument),*) };
        assert_eq!(code, SUCCESS, stringify!($name));
    }};
}

/// Device `ordinal` of the driver in `library`.
pub fn open_device(library: &Path, ordinal: u32) -> ashore::Result<Cuda> {
    // SAFETY: the driver of these tests, or a library whose initialisers any program may run.
    unsafe { Cuda::with_driver(library, ordinal) }
}

/// Whether a real device was requested.
pub fn real() -> bool {
    std::env::var_os("ASHORE_REQUIRE_GPU").is_some()
}

/// Reports that part of a test is not available on a real device.
pub fn left_out() {
    let _ = writeln!(std::io::stderr(), "left out: what needs a simulated device");
}

/// The setting "hold" by which copies to the host do not begin.
pub const COPIES: u64 = 1;

/// The driver to test with.
pub fn library() -> PathBuf {
    if super::loader::here() { "libcuda.so.1".into() } else { fakecuda::library() }
}

/// A device, and a context of it that is current in this thread.
pub struct Gpu {
    pub ordinal: u32,
    /// None on a real one.
    fake: Option<fakecuda::Device>,
    context: Context,
}

/// A context, for any thread.
#[derive(Clone, Copy, PartialEq)]
struct Context(sys::CUcontext);

// SAFETY: a handle, which the driver takes in any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Gpu {
    pub fn take() -> Self {
        // The library comes before the whole simulated driver, because it may be a copy without some
        // functions.
        open();
        let fake = (!real()).then(fakecuda::Device::claim);
        let ordinal = fake.as_ref().map_or(0, fakecuda::Device::ordinal) as u32;
        let (mut device, mut context) = (0, null_mut());
        cuda!(cuDeviceGet(&mut device, ordinal as i32));
        cuda!(cuDevicePrimaryCtxRetain(&mut context, device));
        let gpu = Self { ordinal, fake, context: Context(context) };
        gpu.enter();
        gpu
    }

    /// The knobs of the simulated device; a test that needs them is left out on a real one.
    pub fn fake(&self) -> Option<&fakecuda::Device> {
        if self.fake.is_none() {
            left_out();
        }
        self.fake.as_ref()
    }

    /// Changes how the simulated device behaves. On a real one, copies of another stream stand in for two
    /// settings: "hold" of copies to the host occupies the bus for some 80 ms, and "lag_us" for as long as it
    /// is above 0.
    pub fn set(&self, name: &str, value: u64) {
        match (&self.fake, name) {
            (Some(fake), _) => fake.set(name, value),
            (None, "hold") if value & COPIES != 0 => Traffic::of(self.context).queue(16),
            (None, "lag_us") => Traffic::of(self.context).keep_up(value > 0),
            (None, _) => {}
        }
    }

    /// Makes the context current in this thread.
    pub fn enter(&self) {
        cuda!(cuCtxSetCurrent(self.context.0));
    }

    /// Makes no context current in this thread.
    pub fn leave() {
        cuda!(cuCtxSetCurrent(null_mut()));
    }

    /// Whether the context is current in this thread.
    pub fn is_current(&self) -> bool {
        let mut current = null_mut();
        cuda!(cuCtxGetCurrent(&mut current));
        Context(current) == self.context
    }

    /// Whether nothing has failed on it for good.
    pub fn is_well(&self) -> bool {
        self.enter();
        // SAFETY: no arguments.
        unsafe { sys::cuCtxSynchronize() == SUCCESS }
    }

    /// A device for an executor.
    pub fn device(&self) -> Arc<Cuda> {
        Arc::new(self.try_device().unwrap())
    }

    pub fn try_device(&self) -> ashore::Result<Cuda> {
        open_device(&library(), self.ordinal)
    }

    pub fn stream(&self) -> Stream {
        self.enter();
        let mut handle = null_mut();
        cuda!(cuStreamCreate(&mut handle, NON_BLOCKING));
        // SAFETY: just made, and never destroyed.
        Stream(unsafe { DeviceStream::new(self.ordinal, handle as usize) })
    }

    pub fn tensor(&self, bytes: &[u8]) -> Tensor {
        self.enter();
        let mut at = 0;
        cuda!(cuMemAlloc_v2(&mut at, bytes.len().max(1)));
        cuda!(cuMemcpyHtoD_v2(at, bytes.as_ptr().cast(), bytes.len()));
        // From unpinned memory the call returns once the bytes are taken, not once they have arrived; streams
        // do not wait for it.
        cuda!(cuCtxSynchronize());
        Tensor(Arc::new(Block { at, len: bytes.len(), owner: None }))
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.fake.is_none() {
            Traffic::of(self.context).keep_up(false);
        }
    }
}

/// Copies to the host in a stream of their own that delay those of other streams: a copy engine takes them in
/// turn.
struct Traffic {
    context: Context,
    stream: DeviceStream<'static>,
    from: u64,
    to: usize,
    thread: Mutex<Option<(Arc<AtomicBool>, JoinHandle<()>)>>,
}

impl Traffic {
    /// 5 ms of a bus of 55 GB/s.
    const BYTES: usize = 256 << 20;

    /// The process's instance. Its memory stays until the end.
    fn of(context: Context) -> &'static Self {
        static TRAFFIC: OnceLock<Traffic> = OnceLock::new();
        TRAFFIC.get_or_init(|| {
            cuda!(cuCtxSetCurrent(context.0));
            let (mut stream, mut from, mut to) = (null_mut(), 0, null_mut());
            cuda!(cuStreamCreate(&mut stream, NON_BLOCKING));
            // SAFETY: just made, and never destroyed; no device is requested.
            let stream = unsafe { DeviceStream::new(0, stream as usize) };
            cuda!(cuMemAlloc_v2(&mut from, Self::BYTES));
            cuda!(cuMemHostAlloc(&mut to, Self::BYTES, 0));
            Self { context, stream, from, to: to as usize, thread: Mutex::default() }
        })
    }

    fn queue(&self, copies: usize) {
        cuda!(cuCtxSetCurrent(self.context.0));
        for _ in 0..copies {
            cuda!(cuMemcpyDtoHAsync_v2(self.to as *mut _, self.from, Self::BYTES, raw(self.stream)));
        }
    }

    /// Starts a thread that queues copies endlessly, or ends it.
    fn keep_up(&'static self, on: bool) {
        let mut thread = self.thread.lock().unwrap();
        if let Some((stop, thread)) = thread.take() {
            stop.store(true, Ordering::Release);
            thread.join().unwrap();
        }
        if on {
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = stop.clone();
            let run = move || {
                let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
                cuda!(cuCtxSetCurrent(self.context.0));
                cuda!(cuThreadExchangeStreamCaptureMode(&mut mode));
                while !stopped.load(Ordering::Acquire) {
                    self.queue(2);
                    cuda!(cuStreamSynchronize(raw(self.stream)));
                }
            };
            *thread = Some((stop, std::thread::spawn(run)));
        }
    }
}

const NON_BLOCKING: u32 = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;

/// The handle that the driver takes.
fn raw(stream: DeviceStream<'_>) -> sys::CUstream {
    stream.handle() as sys::CUstream
}

/// A stream of the program.
#[derive(Clone, Copy)]
pub struct Stream(pub DeviceStream<'static>);

impl Stream {
    /// The default stream, for which streams wait that are made without the flag for the opposite.
    pub fn legacy(ordinal: u32) -> Self {
        Self(DeviceStream::legacy(ordinal))
    }

    pub fn fill(&self, tensor: &Tensor, value: u8) {
        // A real driver refuses to fill nothing.
        if tensor.0.len > 0 {
            cuda!(cuMemsetD8Async(tensor.0.at, value, tensor.0.len, raw(self.0)));
        }
    }

    /// Memory in stream order: freed in this stream with the last reference.
    pub fn tensor(&self, len: usize) -> Tensor {
        let mut at = 0;
        cuda!(cuMemAllocAsync(&mut at, len, raw(self.0)));
        Tensor(Arc::new(Block { at, len, owner: Some(*self) }))
    }

    pub fn wait(&self) {
        cuda!(cuStreamSynchronize(raw(self.0)));
    }

    /// Runs `during` while the stream is being captured into a graph, which must not break.
    pub fn capture(&self, during: impl FnOnce()) {
        /// Ends the capture also when a test fails in it: while it is open, no other test can use the device.
        struct Open(Stream);
        impl Drop for Open {
            fn drop(&mut self) {
                let mut graph = null_mut();
                // SAFETY: the stream lives as long as its device, and the result goes to a local.
                let code = unsafe { sys::cuStreamEndCapture(raw(self.0.0), &mut graph) };
                if !std::thread::panicking() {
                    assert_eq!(code, SUCCESS, "the capture was broken");
                    cuda!(cuGraphDestroy(graph));
                }
            }
        }
        let global = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL;
        cuda!(cuStreamBeginCapture_v2(raw(self.0), global));
        let _open = Open(*self);
        during();
    }
}

/// Device memory; clones are the same memory.
#[derive(Clone)]
pub struct Tensor(pub Arc<Block>);

pub struct Block {
    pub at: u64,
    pub len: usize,
    owner: Option<Stream>,
}

impl Drop for Block {
    fn drop(&mut self) {
        // Any thread; after a fault nothing can be freed any more.
        // SAFETY: allocated by this program and used no more.
        let _ = unsafe {
            match self.owner {
                Some(stream) => sys::cuMemFreeAsync(self.at, raw(stream.0)),
                None => sys::cuMemFree_v2(self.at),
            }
        };
    }
}

impl Tensor {
    /// A source that keeps the memory.
    pub fn source(&self, stream: Stream) -> RawDevice {
        self.kept_by(stream, self.clone())
    }

    /// A source whose tensor `keep` owns.
    pub fn kept_by(&self, stream: Stream, keep: impl Send + Sync + 'static) -> RawDevice {
        let len = self.0.len;
        // SAFETY: the block is kept alive; what else is asked of the program is what these tests are about.
        unsafe { RawDevice::new(self.0.at, len as u64, Dtype::U8, [len], stream.0, keep) }
    }

    /// Elements of `dtype` from the byte `at` on, with strides in bytes.
    pub fn strided(&self, stream: Stream, at: u64, dtype: Dtype, shape: &[usize], strides: &[i64]) -> RawDevice {
        // SAFETY: as for `source`; the tests keep inside the block.
        unsafe { RawDevice::strided(self.0.at + at, dtype, shape, strides, stream.0, self.0.clone()) }
    }

    /// Where a restore writes all of it.
    pub fn target(&self, stream: Stream) -> DeviceTarget<'static> {
        self.target_at(0, self.0.len, stream)
    }

    /// Where a restore writes `len` bytes of it from `offset` on.
    pub fn target_at(&self, offset: usize, len: usize, stream: Stream) -> DeviceTarget<'static> {
        assert!(offset + len <= self.0.len);
        // SAFETY: the tests keep the tensor until the restore is over.
        unsafe { DeviceTarget::new(self.0.at + offset as u64, len as u64, stream.0) }
    }

    /// Where a restore writes the elements of `view`, in a part that begins at `offset`.
    pub fn target_of(&self, offset: usize, view: &View, stream: Stream) -> DeviceTarget<'static> {
        assert!(offset + view.len <= self.0.len);
        let at = self.0.at + (offset + view.first) as u64;
        // SAFETY: as for `target_at`.
        unsafe { DeviceTarget::strided(at, view.dtype, &view.shape, &view.strides, stream.0) }
    }

    /// The bytes, at this moment: in the order of the legacy stream, for which no other stream here waits.
    pub fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.0.len];
        cuda!(cuMemcpyDtoH_v2(bytes.as_mut_ptr().cast(), self.0.at, bytes.len()));
        bytes
    }

    /// Makes an executor use this memory, or `bytes` of it, as scratch.
    pub fn scratch_of(&self, builder: Builder, ordinal: u32, bytes: u64) -> Builder {
        assert!(bytes <= self.0.len as u64);
        // SAFETY: the block is kept alive, and nothing else writes it until the executor has released it.
        unsafe { builder.scratch_in(ordinal, self.0.at, bytes, self.clone()) }
    }

    /// A source that keeps nothing: for scopes, which end before the tensor does.
    pub fn lent(&self, stream: Stream) -> RawDevice {
        // SAFETY: the tests drop the tensor, in `stream`, after the scope.
        unsafe { RawDevice::new(self.0.at, self.0.len as u64, Dtype::U8, [self.0.len], stream.0, ()) }
    }
}

/// An executor on a GPU, over storage in memory, with chunks of 4 KiB in four slabs.
pub struct Fixture {
    pub executor: CheckpointExecutor,
    pub storage: Arc<dyn Storage>,
    pub gpu: Gpu,
}

pub fn fixture(change: impl FnOnce(Builder) -> Builder) -> Fixture {
    rig_on(Gpu::take(), change)
}

pub fn rig_on(gpu: Gpu, change: impl FnOnce(Builder) -> Builder) -> Fixture {
    let storage: Arc<dyn Storage> = Arc::new(Memory::new());
    let builder = CheckpointExecutor::builder("in memory").storage(storage.clone()).made_device(gpu.device());
    let executor = change(builder.arena(4 * 4096).chunk(4096).gather(64 << 10).shutdown_timeout(LONG)).build().unwrap();
    Fixture { executor, storage, gpu }
}

/// A state of one tensor, "t", that is left to the fence, however small it is.
pub fn at_fence(source: RawDevice) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor_captured("t", source, Capture::AtFence).unwrap();
    state
}

impl Fixture {
    pub fn checkpoint(&self, step: u64) -> ashore::Result<Checkpoint> {
        Checkpoint::from_storage(self.storage.clone(), &step_name(step))
    }
}
