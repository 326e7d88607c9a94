//! A session that saves nothing.

use super::bound::Bound;
use super::catalog::CheckpointEntry;
use super::metadata::Metadata;
use super::state::CheckpointState;
use crate::error::Result;

/// A session that keeps nothing, for running a program that expects a session without checkpoints.
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
    /// False: there is no row.
    pub fn exists(&self) -> bool {
        false
    }

    /// False: it is never the active session.
    pub fn is_active(&self) -> bool {
        false
    }

    /// 0: writes are not counted.
    pub fn write_count(&self) -> u64 {
        0
    }

    /// Empty: there is no metadata.
    pub fn metadata(&self) -> Metadata {
        Metadata::new()
    }

    /// Returns the state, bound to nothing.
    ///
    /// # Errors
    /// None.
    pub fn bind<T: CheckpointState>(&self, state: impl Into<Bound<T>>) -> Result<Bound<T>> {
        Ok(state.into())
    }

    /// Accepts a boundary, and commits nothing.
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
