//! Tensors of other libraries as sources, and calls as futures of a runtime.
//!
//! **Floor 5**: above everything, and nothing below imports it. The adapters know nothing of each other.

#[cfg(feature = "cudarc")]
pub mod cudarc;
#[cfg(feature = "tokio")]
pub mod tokio;
