//! The lines of a trace: events in Chrome's JSON, and the rows that show them.
//!
//! In this format, a *process* is one kind of work of one rank, and its *threads* are threads, or the copy
//! stream of a GPU. So viewers show each kind of work in a group of its own, and ranks one below the other.

use super::Work;
use serde::Serialize;

/// The rows of a rank, in the order in which viewers show them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Row {
    Saves,
    Training,
    Copies,
    Device(u32),
    Digest,
    Disk,
    Commit,
}

/// The distance of the process numbers of two ranks.
const RANK: u64 = 1000;
/// The number of the first GPU's row.
const DEVICE: u64 = 10;

impl Row {
    pub fn of(work: Work) -> Self {
        match work {
            Work::Call | Work::Fence => Self::Training,
            Work::Stage | Work::Copy | Work::Queue => Self::Copies,
            Work::DeviceCopy { ordinal, .. } => Self::Device(ordinal),
            Work::Digest => Self::Digest,
            Work::Write | Work::Seal => Self::Disk,
            Work::Commit => Self::Commit,
        }
    }

    /// Returns the number of the process that contains the row.
    pub fn pid(self, rank: u32) -> u64 {
        let number = match self {
            Self::Saves => 1,
            Self::Training => 2,
            Self::Copies => 3,
            Self::Digest => 4,
            Self::Disk => 5,
            Self::Commit => 6,
            Self::Device(ordinal) => DEVICE + u64::from(ordinal),
        };
        u64::from(rank) * RANK + number
    }

    pub fn name(self, rank: u32) -> String {
        match self {
            Self::Saves => format!("rank {rank}: saves"),
            Self::Training => format!("rank {rank}: training"),
            Self::Copies => format!("rank {rank}: copies"),
            Self::Device(ordinal) => format!("rank {rank}: GPU {ordinal} (device clock)"),
            Self::Digest => format!("rank {rank}: digest"),
            Self::Disk => format!("rank {rank}: disk"),
            Self::Commit => format!("rank {rank}: commit"),
        }
    }
}

impl Work {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Call => "save",
            Self::Fence => "fence",
            Self::Stage => "stage",
            Self::Copy | Self::DeviceCopy { .. } => "copy",
            Self::Queue => "queue",
            Self::Digest => "digest",
            Self::Write => "write",
            Self::Seal => "seal",
            Self::Commit => "commit",
        }
    }

    pub(super) fn is_copy(self) -> bool {
        matches!(self, Self::Copy | Self::DeviceCopy { .. })
    }

    /// Whether a trace shows it for every save. Otherwise only saves written chunk by chunk show it.
    pub(super) fn is_always_shown(self) -> bool {
        matches!(self, Self::Call | Self::Fence | Self::Stage | Self::Commit)
    }
}

/// One event. Times are in microseconds since 1970.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Event<'a> {
    pub ph: &'static str,
    pub name: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cat: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ts: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dur: Option<u64>,
    pub pid: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tid: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id: Option<u64>,
    /// The identity of a save within its process. Viewers would share a plain `id` between all processes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub id2: Option<Local>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bp: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub s: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub args: Option<Arguments<'a>>,
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Local {
    pub local: String,
}

/// Further fields of an event.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Arguments<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub labels: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sort_index: Option<u64>,
    /// How many bytes of the arena hold chunks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub used: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub step: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chunk: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The maximum error of begin and end, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_us: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub end: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<&'a str>,
    /// The number of spans, or of messages before this one, that are not in the trace.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost: Option<u64>,
}
