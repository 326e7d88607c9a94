//! Waits of streams that the host can end without the driver.

use crate::error::Result;
use crate::state::DeviceStream;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;

/// What a device offers whose streams can wait for a number in memory.
pub(crate) trait Waits: Send + Sync + Debug {
    /// How many fences may be pending.
    fn at_once(&self) -> usize;

    /// As [`Device::order`], but the waits also end when the last clone of what is returned is dropped, by a store to memory and
    /// without a call of the driver. None when too many are pending: nothing was queued.
    ///
    /// # Errors
    /// As [`Device::order`]; nothing waits then.
    fn order(&self, streams: &[DeviceStream]) -> Result<Option<Hold>>;
}

/// While it lives, streams wait.
pub(crate) type Hold = Arc<dyn Any + Send + Sync>;
