//! The lines of a run log, and the reading of them. `docs/format.md` specifies them.
//!
//! A log is read as far as its lines are whole. Lines that are cut, too long or of a later version are
//! counted and skipped. Unknown fields are ignored.

use crate::error::{Error, ErrorKind, Result};
use crate::settings::Settings;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// The directory of run logs in a root.
pub const DIRECTORY: &str = ".runs";
/// The extension of a run log.
pub const EXTENSION: &str = "jsonl";
/// The maximum length of a line that is read.
const LINE_MAX: u64 = 64 << 10;
/// The maximum number of bytes of one log that are read.
const LOG_MAX: u64 = 64 << 20;

/// One line.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "lowercase")]
pub enum Entry {
    /// The first line: which process wrote the log, and with which settings.
    Run(Box<Head>),
    /// A save that has ended.
    Save(Box<SaveLine>),
    /// The last line of an executor that ended in order.
    Closed(Closed),
    /// A line of a later version.
    #[serde(other)]
    Unknown,
}

/// The first line of a log.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Head {
    /// The version of the library.
    pub version: String,
    /// The identity of the executor.
    pub session: String,
    /// Microseconds since 1970.
    pub at: u64,
    /// The host and process.
    pub host: String,
    /// The process.
    pub pid: u32,
    /// The number of ranks that save together.
    pub world: u32,
    /// The device that copies, as named in the report of the device.
    pub device: String,
    /// How files are written.
    pub engine: String,
    /// The bytes of the arena, which may be fewer than the settings ask for.
    pub arena: u64,
    /// Whether the arena is pinned.
    pub pinned: bool,
    /// The number of this file among those of its executor, from 0.
    pub part: u32,
    /// The settings. None when a later version has settings that this version does not know.
    #[serde(deserialize_with = "known")]
    pub settings: Option<Settings>,
}

fn known<'de, D: serde::Deserializer<'de>>(from: D) -> std::result::Result<Option<Settings>, D::Error> {
    let any = serde_json::Value::deserialize(from)?;
    Ok(serde_json::from_value(any).ok())
}

/// The last line of a log.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Closed {
    /// Microseconds since 1970.
    pub at: u64,
}

/// How a save ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ended {
    /// The step is durable.
    Durable,
    /// The save failed.
    Failed,
    /// Another save replaced it before it began.
    Superseded,
    /// The save did not begin, because another save was unfinished.
    Skipped,
    /// It is not known whether the step is durable.
    Indeterminate,
    /// An end that only a later version knows.
    #[default]
    #[serde(other)]
    Unknown,
}

/// A save that has ended. Times are in microseconds; moments count from the call of `save`. A value of zero
/// is not written.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct SaveLine {
    /// The step.
    pub step: u64,
    /// When `save` was called, since 1970.
    pub at: u64,
    /// How it ended.
    pub end: Ended,
    /// The kind of the error.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    /// The error, cut at 200 characters.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Whether the checkpoint is outside of the root.
    #[serde(skip_serializing_if = "is_false")]
    pub elsewhere: bool,
    /// Bytes of tensors.
    #[serde(skip_serializing_if = "is_zero")]
    pub bytes: u64,
    /// Bytes that were staged, headers included.
    #[serde(skip_serializing_if = "is_zero")]
    pub staged_bytes: u64,
    /// Bytes that were written, headers included.
    #[serde(skip_serializing_if = "is_zero")]
    pub written_bytes: u64,
    /// How many chunks were written.
    #[serde(skip_serializing_if = "is_zero")]
    pub chunks: u64,
    /// How long the call of `save` lasted.
    pub call: u64,
    /// The part of the call in which it waited for earlier saves.
    #[serde(skip_serializing_if = "is_zero")]
    pub queue: u64,
    /// How long fences waited for this save.
    #[serde(skip_serializing_if = "is_zero")]
    pub fence: u64,
    /// When the first of those waits began.
    #[serde(skip_serializing_if = "is_zero")]
    pub fence_at: u64,
    /// How long the stager waited for a free slab.
    #[serde(skip_serializing_if = "is_zero")]
    pub arena: u64,
    /// When the stager began.
    #[serde(skip_serializing_if = "is_zero")]
    pub stage_at: u64,
    /// When nothing read live memory any more.
    #[serde(skip_serializing_if = "is_zero")]
    pub staged: u64,
    /// When the first write began.
    #[serde(skip_serializing_if = "is_zero")]
    pub write_at: u64,
    /// When the last byte was written.
    #[serde(skip_serializing_if = "is_zero")]
    pub written: u64,
    /// When the save ended.
    pub ended: u64,
    /// How long writers digested, summed over all writers.
    #[serde(skip_serializing_if = "is_zero")]
    pub digest: u64,
    /// How long writers waited for the storage, summed over all writers.
    #[serde(skip_serializing_if = "is_zero")]
    pub write: u64,
    /// How often it was tried again.
    #[serde(skip_serializing_if = "is_zero")]
    pub tries: u64,
    /// Chunks that a fence copied on the device.
    #[serde(skip_serializing_if = "is_zero")]
    pub late: u64,
    /// Number of lines before this one that could not be written.
    #[serde(skip_serializing_if = "is_zero")]
    pub lost: u64,
}

impl SaveLine {
    /// How long training waited for the save: in the call of `save` and in fences.
    pub fn stall(&self) -> u64 {
        self.call.saturating_add(self.fence)
    }

    /// The most of the fences' waits that a larger arena can avoid.
    pub fn starved(&self) -> u64 {
        self.arena.min(self.fence)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
fn is_false(flag: &bool) -> bool {
    !*flag
}

/// One log, as far as it can be read.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Its first line, if that line can be read.
    pub head: Option<Head>,
    /// Its saves, in the order in which they ended.
    pub saves: Vec<SaveLine>,
    /// When the executor ended in order. None: it was killed, or is still alive.
    pub closed: Option<u64>,
    /// Number of lines that could not be read.
    pub unread: u64,
}

impl Run {
    /// Reads the log at `path`.
    ///
    /// # Errors
    /// An I/O error, with the path.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |error| Error::io("cannot read a run log", error).with_path(path);
        let file = File::open(path).map_err(failed)?;
        let mut from = BufReader::new(file.take(LOG_MAX));
        let (mut run, mut line) = (Self::default(), Vec::new());
        loop {
            line.clear();
            let length = (&mut from).take(LINE_MAX).read_until(b'\n', &mut line).map_err(failed)?;
            if length == 0 {
                return Ok(run);
            }
            if line.pop_if(|last| *last == b'\n').is_none() {
                // This is the rest of a line that is too long, or a cut line without an end.
                run.unread += 1;
                from.skip_until(b'\n').map_err(failed)?;
                continue;
            }
            match serde_json::from_slice(&line) {
                Ok(Entry::Run(head)) => run.head = Some(*head),
                Ok(Entry::Save(save)) => run.saves.push(*save),
                Ok(Entry::Closed(closed)) => run.closed = Some(closed.at),
                Ok(Entry::Unknown) | Err(_) => run.unread += u64::from(!line.is_empty()),
            }
        }
    }
}

/// Returns the logs of a root, oldest first. Empty if there is no directory of logs.
///
/// # Errors
/// An I/O error, with the path.
pub fn runs(root: &Path) -> Result<Vec<PathBuf>> {
    let directory = root.join(DIRECTORY);
    let failed = |error| Error::io("cannot list run logs", error).with_path(&directory);
    let entries = match std::fs::read_dir(&directory).map_err(failed) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut logs = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        if path.extension().is_some_and(|extension| extension == EXTENSION) {
            logs.push(path);
        }
    }
    logs.sort();
    Ok(logs)
}
