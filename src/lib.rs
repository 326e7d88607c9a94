//! Saves the state of GPU training programs without stopping them.

mod completion;
pub mod device;
pub mod digest;
mod error;
pub mod format;
pub mod id;
pub mod memory;
mod mutant;
mod settings;
pub mod state;
pub mod storage;
mod sync;
mod ticket;

pub use error::{Error, ErrorKind, Result};
pub use id::Attempt;
pub use settings::{Detect, IoMode, Overlap, Settings};
pub use state::{Capture, Dtype, Element, HostTensor, Layout, Place, RawHost, Source, StateDict};
pub use ticket::{Committed, Outcome, Phase, Progress};

/// Slabs, chunks and direct I/O are aligned to this many bytes.
pub const ALIGNMENT: usize = 4096;
