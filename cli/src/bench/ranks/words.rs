//! The orders of the first process on a rank's stdin, and the answers of the rank on its stdout: a line of
//! JSON each. Times are nanoseconds of the clock that all processes of a machine share.

use crate::limit::Config;
use ashore::IoMode;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// Save the share of this rank.
    Save { step: u64 },
    /// Write files of these lengths plainly.
    Write { files: Vec<u64>, config: Config },
    /// Leave the ranks.
    End,
}

#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    Met { bytes: u64, arena: u64, engine: String },
    Saved(Saved),
    Written(Written),
    Left { peak: u64 },
    Failed(String),
}

/// A save, as one rank saw it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    pub path: PathBuf,
    pub began: u64,
    pub call: u64,
    pub staged: u64,
    pub durable: u64,
    pub stage_cpu: Duration,
    pub rest_cpu: Duration,
    pub io: IoMode,
    /// On rank 0: when the last receipt arrived, and when the step was durable, before rank 0 sent the
    /// outcome.
    pub last_receipt: Option<u64>,
    pub published: Option<u64>,
}

/// Plain files, as one rank wrote them.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Written {
    pub began: u64,
    pub durable: u64,
    pub io: IoMode,
}

/// Returns the current time, by the clock of the machine.
pub fn now() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Converts an instant of this process to the clock of the machine.
pub fn clock(instant: Instant) -> u64 {
    now().saturating_sub(nanos(instant.elapsed()))
}

pub fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}
