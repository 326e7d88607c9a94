//! Staging: one thread brings each save's chunks from where the tensors live into slabs, and hands them on.
//!
//! **Consistency.** Saves are staged strictly in order; bytes are those at the fence, or at `save` for what was captured.
//! **Back-pressure.** A slab, or waiting for one; never the disk. **Completion.** A save is staged when its last copy from
//! live memory has arrived and its sources are dropped. **Cancellation.** A failed save is not read any further; copies in
//! flight are waited for, then slabs and sources go home. **Time.** The thread never touches storage, so it is also the one
//! that expires saves at their deadlines.

mod capture;
mod capture_pool;
mod deferred;
mod device_state;
mod enqueue;
mod fence;
mod in_flight;
mod late_copy;
mod next_action;
mod on_device;
mod pieces;
mod scratch;
mod stage;
mod stager;
#[cfg(all(test, not(loom)))]
mod tests;

pub(crate) use capture::Captured;
pub(crate) use fence::freeze;
pub(crate) use late_copy::LateCopy;
pub(crate) use on_device::{OnDevice, without_kernels};
pub(crate) use scratch::Scratch;
pub(crate) use stager::{Job, Stager};
