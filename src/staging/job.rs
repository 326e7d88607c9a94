//! A job: one save as the stager receives it.

use super::capture::Captured;
use super::capture_pool::Allocation;
use super::late_copy::LateCopy;
use crate::device::{Dependency, Queued};
use crate::plan::{Plan, Prediction, Sink};
use crate::state::StateDict;
use crate::ticket::Ticket;
use std::sync::Arc;
use std::time::Instant;

/// A save to be staged.
pub(crate) struct Job {
    pub ticket: Arc<Ticket>,
    pub plan: Arc<Plan>,
    pub state: StateDict<'static>,
    pub captured: Captured,
    /// The work that wrote device tensors. Copies wait for this work.
    pub behind: Option<Dependency>,
    /// Gathers the chunks of the save on its devices, and copies them late.
    pub late_copy: Option<Arc<LateCopy>>,
    /// Memory of the captured tensors; `queued` is the work that the device queued at `save`.
    pub allocation: Option<Allocation>,
    pub queued: Vec<Arc<dyn Queued>>,
    /// Which bytes may be the same as in an older step.
    pub prediction: Option<Arc<Prediction>>,
    /// The program may free the sources as soon as the save is released.
    pub borrowed: bool,
    /// The stager does not stage the save before this time, because a failed save waits before its next
    /// attempt.
    pub not_before: Option<Instant>,
    pub sink: Arc<dyn Sink>,
}
