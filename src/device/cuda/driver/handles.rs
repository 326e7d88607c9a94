//! Handles of the driver's objects: numbers, with a separate type for each kind, so that no call mixes them
//! up.

use crate::state::DeviceStream;

/// An address in device memory.
pub type Address = u64;

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident;)*) => { $(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[repr(transparent)]
        pub struct $name(usize);
    )* };
}

handles! {
    /// A `CUcontext`. The default is none.
    ContextHandle;
    /// A `CUstream`. The default is the legacy default stream.
    StreamHandle;
    /// A `CUevent`.
    EventHandle;
    /// A `CUmodule`.
    ModuleHandle;
    /// A `CUfunction`.
    FunctionHandle;
}

/// The handle of a stream for which the program vouched.
impl From<&DeviceStream<'_>> for StreamHandle {
    fn from(stream: &DeviceStream<'_>) -> Self {
        Self(stream.handle)
    }
}

impl StreamHandle {
    /// The handle as a number, for messages.
    pub fn number(self) -> usize {
        self.0
    }
}
