//! Waits of streams that the host can end without the driver.

use crate::error::Result;
use crate::state::DeviceStream;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

/// Implemented for devices whose streams can wait for a number in memory.
pub(crate) trait Waits: Send + Sync + Debug {
    /// The maximum number of pending fences.
    fn at_once(&self) -> usize;

    /// As [`Device::order`], but the waits also end when the last clone of the returned guard is dropped: by
    /// a store to memory, without a driver call. Returns None when too many fences are pending; nothing was
    /// queued then.
    ///
    /// # Errors
    /// As [`Device::order`]; nothing waits after an error.
    fn order(&self, streams: &[DeviceStream]) -> Result<Option<WaitGuard>>;
}

/// A wait guard: streams wait while it lives.
pub(crate) type WaitGuard = Arc<dyn Any + Send + Sync>;
