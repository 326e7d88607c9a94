//! Saves the state of GPU training programs without stopping them.

pub mod digest;
mod error;
pub mod format;
pub mod id;
pub mod memory;
mod mutant;
pub mod state;
pub mod storage;

pub use error::{Error, ErrorKind, Result};
pub use id::Attempt;
pub use state::{Capture, Dtype, Element, HostTensor, Layout, Place, RawHost, Source, StateDict};
