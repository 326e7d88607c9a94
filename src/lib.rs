//! Saves the state of GPU training programs without stopping them.

mod commit;
mod completion;
pub mod device;
pub mod digest;
mod error;
mod executor;
pub mod format;
pub mod id;
pub mod memory;
mod mutant;
mod plan;
mod save;
mod settings;
mod staging;
pub mod state;
pub mod storage;
mod sync;
mod ticket;
mod writer;

pub use error::{Error, ErrorKind, Result};
pub use executor::{Builder, CheckpointExecutor, Fence, Scope};
pub use id::Attempt;
pub use save::{Save, SaveOptions, Snapshot, Staged};
pub use settings::{Detect, IoMode, Overlap, Settings};
pub use state::{Capture, Dtype, Element, HostTensor, Layout, Place, RawHost, Source, StateDict};
pub use ticket::{Committed, Outcome, Phase, Progress};

/// Slabs, chunks and direct I/O are aligned to this many bytes.
pub const ALIGNMENT: usize = 4096;
