//! No checkpoint, where a program takes one.

use super::catalog::CheckpointEntry;
use super::metadata::Metadata;
use super::state::{Bound, CheckpointState};
use crate::error::Result;

/// A session that keeps nothing: for programs that run without checkpoints and are written for them.
///
/// ```
/// use ashore::compat::earth2studio::{Metadata, NullCheckpoint};
/// let session = NullCheckpoint;
/// assert!(!session.exists() && session.write(Metadata::new())?.is_none());
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NullCheckpoint;

impl NullCheckpoint {
    /// There is no row.
    pub fn exists(&self) -> bool {
        false
    }

    /// It is never the active session.
    pub fn is_active(&self) -> bool {
        false
    }

    /// No write is counted.
    pub fn write_count(&self) -> u64 {
        0
    }

    /// There is no metadata.
    pub fn metadata(&self) -> Metadata {
        Metadata::new()
    }

    /// The state, bound to nothing.
    ///
    /// # Errors
    /// None.
    pub fn bind<T: CheckpointState>(&self, state: impl Into<Bound<T>>) -> Result<Bound<T>> {
        Ok(state.into())
    }

    /// Takes a boundary, and commits nothing.
    ///
    /// # Errors
    /// None.
    pub fn write(&self, metadata: Metadata) -> Result<Option<CheckpointEntry>> {
        drop(metadata);
        Ok(None)
    }

    /// Commits nothing.
    ///
    /// # Errors
    /// None.
    pub fn flush(&self, metadata: Metadata) -> Result<Option<CheckpointEntry>> {
        self.write(metadata)
    }
}
