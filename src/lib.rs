//! Checkpoints GPU training programs while they compute: saves are durable, never torn, and readable by stock
//! tools.
//!
//! # In one minute
//!
//! ```
//! use ashore::{CheckpointExecutor, HostTensor, StateDict};
//! use std::{sync::Arc, time::Duration};
//! # fn train(root: &std::path::Path, steps: u64) -> ashore::Result<Vec<f32>> {
//! let executor = CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).keep_last(3).build()?;
//!
//! // Every training loop begins where the newest durable step ended, or from nothing.
//! let (mut step, mut weights) = match executor.latest()? {
//!     Some(newest) => (newest.step(), Arc::new(newest.read_as::<f32>("weights")?)),
//!     None => (0, Arc::new(vec![0.0_f32; 6])),
//! };
//!
//! while step < steps {
//!     // ... forward and backward: they only read the weights ...
//!     executor.fence()?; // from here on the last save does not read them any more
//!     Arc::get_mut(&mut weights).expect("the only reference again")[0] += 1.0;
//!     step += 1; // as many updates are in the weights: what is saved as a step is the state after it
//!     let mut state = StateDict::new();
//!     state
//!         .tensor("weights", HostTensor::new(weights.clone(), [2, 3]))? // not copied: the stager reads it
//!         .value("learning_rate", &0.1)?; // any serde type, kept exactly
//!     let save = executor.save(step, state)?; // returns at once
//!     drop(save); // or keep it, and `.await` or `.wait` for the moment when it is durable
//! }
//! executor.shutdown(Duration::from_secs(60))?; // returns an error that no call has returned
//! # Ok(weights.to_vec())
//! # }
//! # let (whole, restarted) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
//! # for steps in [2, 3] { train(restarted.path(), steps)?; }
//! # assert_eq!(train(restarted.path(), 5)?, train(whole.path(), 5)?);
//! # assert_eq!(ashore::Catalog::open(whole.path())?.latest()?.unwrap().step(), 5);
//! # Ok::<(), ashore::Error>(())
//! ```
//!
//! # The parts
//!
//! | to | use |
//! |---|---|
//! | name what is saved | [`StateDict`]: tensors from a [`Source`], values of any serde type, metadata |
//! | save views of memory | [`RawHost::strided`], [`RawDevice::strided`]; [`HostTensor::from_owner`] for bytes of any owner |
//! | save while computing | [`CheckpointExecutor::save`], then [`fence`](CheckpointExecutor::fence) before writing tensors |
//! | save borrowed tensors | [`CheckpointExecutor::scope`] |
//! | learn how a save ended | [`Save`], a future of [`Outcome`]; [`Save::staged`] resolves when the tensors may be written |
//! | restore | [`CheckpointExecutor::latest`], [`Checkpoint::open`], [`Checkpoint::read_into`] host or GPU memory, packed or strided ([`HostTarget`], [`DeviceTarget`]) |
//! | restore past damage | [`CheckpointExecutor::latest_valid`], which reports the damaged steps it skipped; [`OnDamaged`] |
//! | see, check and delete steps | [`Catalog`], [`Checkpoint::verify`], [`Retention`], [`catalog::Best`] |
//! | go back to an earlier step | [`Catalog::discard_after`] |
//! | finish or abandon saves on SIGTERM | [`sigterm::Sigterm`] |
//! | publish weights to other programs | [`chain::Publisher`], [`CheckpointExecutor::publish_delta`], [`chain::Follow`] |
//! | store steps elsewhere | [`storage::Storage`] |
//! | migrate from another library | [`compat`]: the interfaces of other libraries, on this engine |
//!
//! # What is promised
//!
//! - **Durable means durable.** A save resolves to [`Outcome::Durable`] only after every planned byte is
//!   written, every file and directory is fsynced, and one atomic rename is fsynced too. `docs/durability.md`
//!   has the details.
//! - **Never torn.** A crash never leaves a listed step incomplete and never loses a durable one. Every byte
//!   has a digest, checked when it is read.
//! - **Bounded memory.** The executor allocates one arena of the size that you set, at start; larger states
//!   pass through it in chunks.
//! - **Stock files.** Steps are plain safetensors in the Hugging Face layout; `docs/format.md` specifies the
//!   manifest beside them.
//! - **No silent failure.** An error reaches every future of its save; if no caller takes it, the next `save`
//!   or `shutdown` returns it.
//!
//! # Before the tensors change
//!
//! A save reads its tensors until the *fence*. Some sources cannot be written while the save holds them: an
//! `Arc`, whose `Arc::get_mut` returns `None`, and a borrowed slice. The program cannot forget the fence for
//! these. Raw memory ([`RawHost`]) has no such protection, so the first saves compare digests taken at `save`
//! with the staged bytes ([`Detect`]). A difference fails the save and names the tensor. Small raw tensors
//! such as step counters are copied at `save` ([`Capture`]), because programs tend to write them before the
//! fence.
//!
//! # Which calls block
//!
//! | call | the calling thread waits |
//! |---|---|
//! | [`save`](CheckpointExecutor::save) | only while the overlap policy admits no further save, until the save deadline |
//! | [`Save`], [`Save::staged`], [`fenced`](CheckpointExecutor::fenced) | never: they are futures for any runtime |
//! | [`fence`](CheckpointExecutor::fence), the end of a [`scope`](CheckpointExecutor::scope) | until nothing reads the tensors, until the fence deadline |
//! | [`fence_on`](CheckpointExecutor::fence_on), and a scope that ends on streams | until the copies are queued, which needs free slabs in the arena |
//! | [`Builder::build`], [`latest`](CheckpointExecutor::latest), [`Catalog`], [`Checkpoint`] | for the storage |
//! | [`Save::wait`], [`shutdown`](CheckpointExecutor::shutdown), dropping the executor | until saves have ended, at most the given timeout |
//!
//! Asynchronous programs run the blocking calls on a blocking thread. With the feature `tokio` each call has
//! an async form, such as `build_async`; without it:
//! ```
//! # use ashore::{Catalog, CheckpointExecutor, StateDict};
//! # use std::{sync::Arc, time::Duration};
//! # let dir = tempfile::tempdir().unwrap();
//! # let root = dir.path().to_owned();
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let builder = CheckpointExecutor::builder(&root).arena(16 << 20).chunk(1 << 20);
//! let executor = tokio::task::spawn_blocking(|| builder.build()).await??;
//! let mut state = StateDict::new();
//! state.tensor("weights", Arc::new(vec![1.0_f32; 6]))?;
//! let save = executor.save(1, state)?;
//! executor.fenced().await?; // the tensors may be written
//! save.await?; // durable
//! tokio::task::spawn_blocking(move || executor.shutdown(Duration::from_secs(60))).await??;
//! # assert_eq!(Catalog::open(&root)?.latest()?.unwrap().step(), 1);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! # }).unwrap();
//! ```
//!
//! # On a GPU
//!
//! The executor loads the CUDA driver when it is built (feature `cuda`, on by default); compiling needs no
//! toolkit. A tensor in GPU memory is a [`RawDevice`]: an address, the stream that wrote it, and an object
//! that keeps it allocated. With the feature `cudarc`, slices and views of that crate are sources without
//! unsafe code: see [`adapters`].
//!
//! ```no_run
//! use ashore::{CheckpointExecutor, DeviceStream, Dtype, RawDevice, StateDict};
//! # let (address, handle, memory) = (0_u64, 0_usize, std::sync::Arc::new(()));
//! let executor = CheckpointExecutor::builder("runs/a").build()?;
//! println!("copies with {}", executor.device()); // or why the host copies
//! // SAFETY: `handle` is the `CUstream` that wrote the tensor, and outlives all of this.
//! let stream = unsafe { DeviceStream::new(0, handle) };
//!
//! let mut state = StateDict::new();
//! // SAFETY: 24 bytes of device 0, which `memory` keeps; they are written in `stream` alone, and only after the fence.
//! state.tensor("weights", unsafe { RawDevice::new(address, 24, Dtype::F32, [2, 3], stream, memory) })?;
//! let save = executor.save(1, state)?; // as the stream has left them when it gets here
//! // ... queue forward and backward ...
//! executor.fence_on(&[stream])?; // what is queued in it from here on waits on the GPU for the copies
//! // ... queue the optimizer's step ...
//! # drop(save);
//! # Ok::<(), ashore::Error>(())
//! ```
//!
//! The executor copies tensors to the arena in a stream of its own, after all work that was in the tensors'
//! streams at `save`. After [`fence`](CheckpointExecutor::fence) nothing reads the tensors any more.
//! [`fence_on`](CheckpointExecutor::fence_on) waits only until all copies are queued, which needs free slabs
//! in the arena, and makes the given streams wait for them on the GPU. Both refuse a stream that is being
//! captured into a graph.
//!
//! Tensors of at most 128 KiB are captured on the GPU at `save`, in the order of their streams, while the
//! capture pool ([`Builder::gather`]) has space; the program may write them at once. In the first two saves
//! the GPU digests the other tensors, so that a forgotten fence fails the save. Strided tensors
//! ([`RawDevice::strided`]) are saved packed.
//!
//! [`Builder::scratch`] reserves GPU memory for late copies, which shortens the wait of a fence. This is
//! experimental. [`DeviceChoice::Auto`] uses the GPU of the current context, or of the first tensor in GPU
//! memory that is saved. It touches no GPU before that. Without a driver or a device, the host copies; with
//! [`DeviceChoice::Cuda`], building the executor fails instead. None of this has run on a GPU yet: it was
//! tested on a simulated driver.
//!
//! # Features
//!
//! `cuda` and `uring` are on by default, and are used where the machine supports them. `cudarc` adds sources
//! over the types of that crate. `testing` adds a module of the same name: a device that copies late, and
//! conformance suites for storage, for coordinators of ranks and for graph checkpointers. `sqlite` adds a
//! store for many small graph states. `tokio` adds async forms of the calls that block (see [`adapters`]).
//! `etcd` and `mpi` add coordinators ([`ranks`]); `mpi` needs an installed MPI and libclang to build. `zstd`
//! compresses the deltas of a [`chain`].

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "ashore runs on 64-bit Linux: it needs fsync of directories, renameat2, direct I/O and pinned memory as Linux has them"
);

pub mod adapters;
mod call_thread;
pub mod catalog;
pub mod chain;
mod checkpoint;
mod commit;
pub mod compat;
mod completion;
mod delta;
mod device;
mod digest;
mod error;
mod executor;
mod fork;
mod format;
mod guard;
pub mod id;
#[doc(hidden)]
pub mod internal;
pub mod memory;
mod mutant;
mod outcome;
mod own_threads;
mod plan;
pub mod ranks;
mod restore;
mod save;
mod settings;
pub mod sigterm;
mod staging;
mod state;
pub mod storage;
mod sync;
mod telemetry;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod thread;
mod ticket;
pub mod tiers;
#[doc(hidden)]
pub mod tries;
mod wire;
mod writer;

pub use catalog::{Catalog, PruneOptions, Retention};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use delta::Form;
pub use device::DeviceReport;
pub use digest::Flip;
pub use error::{Error, ErrorKind, Result};
pub use executor::{Builder, CheckpointExecutor, Fence, Scope};
pub use id::Attempt;
pub use outcome::{Committed, Outcome, Phase, Progress, Promoted};
pub use restore::{Again, ChangedElement, Damage, DeviceTarget, HostTarget, Located, Report, Targets};
pub use save::{DurableIn, Fenced, Save, SaveOptions, Snapshot, Staged};
pub use settings::{
    Detect, DeviceChoice, Engine, IoMode, Locks, OnDamaged, OnUnseenError, Overlap, Priority, Settings, Unpromoted,
};
pub use state::{
    Capture, DeviceStream, Dtype, Element, HostTensor, Layout, MemoryLocation, OwnedBytes, Promise, Promised,
    RawDevice, RawHost, Shape, Source, StateDict, Value, promise,
};

/// Compiles the examples of the README as doc tests.
#[cfg(all(doctest, feature = "cudarc"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// Identifies the embedded GPU kernels: the first 16 hexadecimal digits of the SHA-256 of
/// `kernels/SHA256SUMS`, the version of the compiler that made the PTX, and the architectures with built-in
/// machine code. Empty without the feature `cuda`.
pub const KERNELS: &str = match option_env!("ASHORE_KERNELS_ID") {
    Some(kernels) => kernels,
    None => "",
};

/// Slabs, chunks and direct I/O are aligned to this many bytes.
pub const ALIGNMENT: usize = 4096;
