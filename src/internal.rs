//! Items that tests, programs and fuzz targets of this repository need beyond the API. They are not part of
//! the API, and may change at any time.

pub mod delta {
    pub use crate::delta::{How, Manifest, Numbers, Patch, apply, check, encode};
}
pub mod device {
    #[cfg(all(feature = "cuda", not(any(loom, miri))))]
    pub use crate::device::Cuda;
    pub use crate::device::{CopyQueue, Dependency, Device, Host, choose};
}
pub mod digest {
    pub use crate::digest::Digest;
}
pub mod executor {
    /// Whether the calling thread is one of the executor's, in which a shutdown is refused.
    pub fn is_own_thread(executor: &crate::CheckpointExecutor) -> bool {
        executor.threads().are_here()
    }
}
pub mod format {
    pub use crate::format::{
        agreement, columns, entries, header, index, invariants, manifest, seal, shard, split, table, template, v1,
    };
}
pub mod messages {
    /// Reads bytes as each kind of message between ranks. Panics when an accepted message, written again,
    /// differs from these bytes.
    pub fn read(bytes: &[u8]) {
        crate::ranks::read_any(bytes);
        crate::commit::several::read_any(bytes);
    }
}
pub mod plan {
    pub use crate::plan::{
        BoxOf, Described, Description, Merge, Part, Replica, Share, Whole, WholeTensor, Written, share_out,
    };
}
pub mod storage {
    pub use crate::storage::is_url;
}
pub mod run_log {
    pub use crate::telemetry::{Closed, Ended, Entry, Head, Run, SaveLine, runs};
}
pub mod state {
    pub use crate::state::{decode_value, encode_value};
}
