//! Adapters: tensors of other libraries as sources, and blocking calls as futures of a runtime.
//!
//! **Floor 5**: above everything; nothing below imports it. The adapters do not depend on each other.

#[cfg(feature = "cudarc")]
pub mod cudarc;
#[cfg(feature = "tokio")]
pub mod tokio;
