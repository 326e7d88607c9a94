//! Saves the state of GPU training programs without stopping them: durable, never torn, readable by stock tools.
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
//! executor.shutdown(Duration::from_secs(60))?; // reports an error that nobody has seen
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
//! | say what is saved | [`StateDict`]: tensors from a [`Source`], values of any serde type, metadata |
//! | save while computing | [`CheckpointExecutor::save`], then [`fence`](CheckpointExecutor::fence) before writing tensors |
//! | save what is only borrowed | [`CheckpointExecutor::scope`] |
//! | know how it ended | [`Save`], a future of [`Outcome`]; [`Save::staged`] for the moment when tensors are free |
//! | start again | [`CheckpointExecutor::latest`], [`Checkpoint::open`], [`Checkpoint::read_into`] memory of the host or of a GPU ([`DeviceTarget`]) |
//! | start again past damage | [`CheckpointExecutor::latest_valid`], which says what it passed over; [`OnDamaged`] |
//! | see, check and delete steps | [`Catalog`], [`Checkpoint::verify`], [`Retention`], [`catalog::Best`] |
//! | go back to an earlier step | [`Catalog::discard_after`] |
//! | end well when the machine is taken away | [`sigterm::Sigterm`] |
//! | keep steps elsewhere | [`storage::Storage`] |
//! | come from another system | [`compat`]: its interface, on this engine |
//!
//! # What is promised
//!
//! - **Durable means durable.** A save resolves to [`Outcome::Durable`] after every byte that was planned is written, every file
//!   and directory is fsynced, and one atomic publish is fsynced too. `docs/durability.md` has the whole story.
//! - **Never torn.** No crash leaves a step that is listed and incomplete, and none that was durable is lost. Every byte has a
//!   digest that is checked when it is read.
//! - **Bounded memory.** One arena of the size that you set, taken at start; a state larger than it flows through it.
//! - **Stock files.** Plain safetensors in the Hugging Face layout; `docs/format.md` specifies the manifest beside them.
//! - **No silent failure.** An error reaches every future of its save; if nobody looks, the next `save` or `shutdown` returns it.
//!
//! # Before the tensors change
//!
//! A save reads its tensors until the *fence*. Sources that cannot be written while they are held (an `Arc`, a borrowed slice)
//! make a forgotten fence impossible: `Arc::get_mut` says no. With raw memory ([`RawHost`]) it is possible, so the first saves
//! compare digests from `save` with the staged bytes ([`Detect`]), and a difference fails the save and names the tensor. Small
//! raw tensors such as step counters are copied at `save` ([`Capture`]), because they tend to change before the fence.
//!
//! # Which calls block
//!
//! | call | its thread waits |
//! |---|---|
//! | [`save`](CheckpointExecutor::save) | only while the overlap policy finds no room, until the save deadline |
//! | [`Save`], [`Save::staged`], [`fenced`](CheckpointExecutor::fenced) | not at all: they are futures for any runtime |
//! | [`fence`](CheckpointExecutor::fence), the end of a [`scope`](CheckpointExecutor::scope) | until nothing reads the tensors, until the fence deadline |
//! | [`fence_on`](CheckpointExecutor::fence_on), and a scope that ends on streams | until the copies are queued, which needs room in the arena |
//! | [`Builder::build`], [`latest`](CheckpointExecutor::latest), [`Catalog`], [`Checkpoint`] | for the storage |
//! | [`Save::wait`], [`shutdown`](CheckpointExecutor::shutdown), dropping the executor | until saves have ended, as long as they are told to |
//!
//! In an asynchronous program those that wait belong on a thread for them. With the feature `tokio` each has a form that does this, such as
//! `build_async`; without it:
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
//! With the feature `cuda`, on by default, the driver is looked for when an executor is built; building the program needs no toolkit.
//! A tensor in a GPU's memory is a [`RawDevice`]: an address, the stream that wrote it, and what keeps it allocated. With the
//! feature `cudarc`, slices and views of that crate are sources as they are, without unsafe code: see [`adapters`].
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
//! Copies go to the arena in a stream of our own, behind everything that was in the tensors' streams at `save`. After
//! [`fence`](CheckpointExecutor::fence) nothing reads the tensors any more; [`fence_on`](CheckpointExecutor::fence_on) waits only until all
//! copies are queued, which needs room in the arena, and leaves the rest to the streams that it is given. A stream that is being
//! captured into a graph is refused by both. Tensors of at most 128 KiB are captured on the GPU at `save`, in the order of their streams,
//! while the memory of [`Builder::gather`] has room, and may be written at once; the others of the first two saves are digested there, so
//! that a forgotten fence fails the save. Strided tensors ([`RawDevice::strided`]) are saved packed. [`Builder::scratch`] sets memory of the GPU apart for what has not left it at the
//! fence, so that little need be waited for; that is experimental. Which GPU it is need not be said: [`DeviceChoice::Auto`] is that of the current context, or of the first tensor
//! of one that is saved, and before that none is touched. Where there is no driver or no device, the host copies, and an executor
//! that was asked for a GPU by [`DeviceChoice::Cuda`] is not built. Nothing of this has run on a GPU yet: it was shown on a simulated
//! driver.
//!
//! # Features
//!
//! `cuda` and `uring` are on, and looked for at run time. `cudarc` adds the sources over its types. `testing` adds the module of that name: a device that copies late, and the conformance suites for storage and for graph checkpointers.
//! `sqlite` adds a store for many small graph states. `tokio` adds forms of the calls that block, as futures: [`adapters`].

#[cfg(not(all(target_os = "linux", target_pointer_width = "64")))]
compile_error!(
    "ashore runs on 64-bit Linux: it needs fsync of directories, renameat2, direct I/O and pinned memory as Linux has them"
);

pub mod adapters;
mod call_thread;
pub mod catalog;
mod checkpoint;
mod commit;
pub mod compat;
mod completion;
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
mod restore;
mod save;
mod settings;
pub mod sigterm;
mod staging;
mod state;
pub mod storage;
mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod ticket;
#[doc(hidden)]
pub mod tries;
mod writer;

pub use catalog::{Catalog, PruneOptions, Retention};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use device::DeviceReport;
pub use error::{Error, ErrorKind, Result};
pub use executor::{Builder, CheckpointExecutor, Fence, Scope};
pub use id::Attempt;
pub use outcome::{Committed, Outcome, Phase, Progress};
pub use restore::{Damage, DeviceTarget, Report, Targets};
pub use save::{Fenced, Save, SaveOptions, Snapshot, Staged};
pub use settings::{
    Detect, DeviceChoice, Engine, IoMode, Locks, OnDamaged, OnUnseenError, Overlap, Priority, Settings,
};
pub use state::{
    Capture, DeviceStream, Dtype, Element, HostTensor, Layout, Place, Promise, Promised, RawDevice, RawHost, Shape,
    Source, StateDict, promise,
};

/// What the README shows compiles.
#[cfg(all(doctest, feature = "cudarc"))]
#[doc = include_str!("../README.md")]
struct Readme;

/// The embedded GPU kernels: the first 16 hexadecimal digits of the SHA-256 of `kernels/SHA256SUMS`, the version of the compiler that
/// made the PTX, and the architectures whose machine code was built in. Empty without the feature `cuda`.
pub const KERNELS: &str = match option_env!("ASHORE_KERNELS_ID") {
    Some(kernels) => kernels,
    None => "",
};

/// Slabs, chunks and direct I/O are aligned to this many bytes.
pub const ALIGNMENT: usize = 4096;
