//! What the driver knows its objects by: numbers, each kind of a type of its own, so that no call takes one for another.

use crate::state::DeviceStream;

/// An address of a device.
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

/// That of a stream for which the program has vouched.
impl From<&DeviceStream<'_>> for StreamHandle {
    fn from(stream: &DeviceStream<'_>) -> Self {
        Self(stream.handle)
    }
}

impl StreamHandle {
    /// As a number, for the program's eyes.
    pub fn number(self) -> usize {
        self.0
    }
}
