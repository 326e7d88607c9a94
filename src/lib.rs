//! Saves the state of GPU training programs without stopping them.

pub mod catalog;
mod checkpoint;
mod commit;
mod completion;
pub mod device;
pub mod digest;
mod error;
mod executor;
mod fork;
pub mod format;
pub mod id;
pub mod memory;
mod mutant;
mod plan;
mod restore;
mod save;
mod settings;
mod staging;
pub mod state;
pub mod storage;
mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
mod ticket;
mod writer;

pub use catalog::{Catalog, Retention};
pub use checkpoint::{Checkpoint, TensorInfo};
pub use error::{Error, ErrorKind, Result};
pub use executor::{Builder, CheckpointExecutor, Fence, Scope};
pub use id::Attempt;
pub use restore::{Damage, Report, Targets};
pub use save::{Save, SaveOptions, Snapshot, Staged};
pub use settings::{Detect, IoMode, Overlap, Settings};
pub use state::{Capture, Dtype, Element, HostTensor, Layout, Place, RawHost, Source, StateDict};
pub use ticket::{Committed, Outcome, Phase, Progress};

/// Slabs, chunks and direct I/O are aligned to this many bytes.
pub const ALIGNMENT: usize = 4096;
