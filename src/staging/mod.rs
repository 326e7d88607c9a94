//! Staging: one thread copies each save's chunks from the memory of the tensors into slabs, and passes them
//! to a sink.
//!
//! **Consistency.** The stager stages saves strictly in order. Staged bytes are the bytes at the fence.
//! Captured tensors have their bytes from the call of `save`. **Back-pressure.** The stager waits for a free
//! slab, never for the disk. **Completion.** A save is staged when its last copy from live memory has arrived
//! and its sources are dropped. **Cancellation.** The stager reads no more of a failed save. It waits for the
//! copies in flight, then returns slabs and releases sources. **Time.** The stager also expires saves at
//! their deadlines, because it never touches storage and so never hangs there.

mod capture;
mod capture_pool;
mod deferred;
mod device_state;
mod enqueue;
mod fence;
mod in_flight;
mod in_flight_chunk;
mod job;
mod kernel_set;
mod late_copy;
mod next_action;
mod on_device;
mod parts;
mod pieces;
mod planned;
mod scratch;
mod stage;
mod stager;
#[cfg(all(test, not(loom)))]
mod tests;

pub(crate) use capture::Captured;
pub(crate) use capture_pool::Allocation;
pub(crate) use fence::freeze;
pub(crate) use job::Job;
pub(crate) use late_copy::LateCopy;
pub(crate) use on_device::{OnDevice, without_kernels};
pub(crate) use scratch::Scratch;
pub(crate) use stager::Stager;
