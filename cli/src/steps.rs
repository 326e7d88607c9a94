//! The contents of a directory of checkpoints: steps, attempts being written, and directories that are not
//! steps.

use crate::{out, words};
use ashore::catalog::{Mark, Marked};
use ashore::id::parse_step_name;
use ashore::internal::format::entries::MANIFEST;
use ashore::storage::{Remnant, State, Sweep};
use ashore::{Attempt, Catalog, ErrorKind, Result};
use rustix::fs::{AtFlags, StatxFlags};
use serde::Serialize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The kind of a name in the directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A step: manifest and tables are valid, and every file exists, has its length, and belongs to this
    /// save. `verify` checks the bytes.
    Complete,
    /// A step of this library that is incomplete, or whose bytes are not those that were written.
    Damaged,
    /// Another directory has the same step, or the name and the manifest differ.
    Conflict,
    /// A step that cannot be read at present.
    Unreadable,
    /// A directory with the name of a step that another program made.
    Foreign,
    /// An attempt that a process is writing.
    InFlight,
}

/// A row of the list.
#[derive(Serialize)]
pub struct Row {
    pub step: u64,
    #[serde(serialize_with = "out::path")]
    pub path: PathBuf,
    pub bytes: u64,
    /// The part of `bytes` in files that have several names, such as files that steps share. Clones are not
    /// included.
    pub shared_bytes: u64,
    pub complete: bool,
    pub state: Kind,
    /// When the manifest was written, in seconds since 1970 by the clock of the file system.
    #[serde(serialize_with = "seconds")]
    pub saved: Option<SystemTime>,
    /// The time since `saved`.
    pub age_seconds: Option<u64>,
    /// The time from the first file that this step wrote to the manifest, if the file system knows when files
    /// were made.
    pub took_seconds: Option<f64>,
    pub mark: Option<Mark>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
    /// The reason in words.
    #[serde(skip)]
    pub said: Option<String>,
}

/// The contents of a directory of checkpoints.
pub struct Steps {
    /// The rows, sorted by step.
    pub rows: Vec<Row>,
    /// Directories that are not steps, by name.
    pub left_out: Vec<String>,
}

impl Steps {
    /// Lists the directory `root`.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn of(catalog: &Catalog, root: &Path) -> Result<Self> {
        let (entries, problems) = catalog.survey()?;
        let marks = catalog.marks().unwrap_or_else(|error| {
            out::complain(&words::of(&error));
            Vec::new()
        });
        let mut rows: Vec<Row> = Vec::with_capacity(entries.len());
        for entry in entries {
            let row = Row::new(entry.step, entry.path, Kind::Complete, entry.bytes);
            rows.push(Row { saved: entry.modified, mark: mark_of(&marks, entry.attempt), ..row });
        }
        for problem in problems {
            let kind = match problem.error.kind() {
                ErrorKind::Corrupt => Kind::Damaged,
                ErrorKind::Conflict => Kind::Conflict,
                _ => Kind::Unreadable,
            };
            let bytes = bytes_in(&problem.path);
            let (why, said) = (Some(format!("{:#}", problem.error)), Some(words::of(&problem.error)));
            rows.push(Row { why, said, ..Row::new(problem.step, problem.path, kind, bytes) });
        }
        let left_out = foreign(root, &mut rows);
        // A storage that is not a directory has no attempts to list.
        let attempts = catalog.sweep(Sweep::default().dry_run()).map(|swept| swept.left).unwrap_or_default();
        rows.extend(attempts.iter().filter(|left| left.state == State::Live).filter_map(|left| in_flight(root, left)));
        let now = SystemTime::now();
        for row in &mut rows {
            row.look(now);
        }
        rows.sort_by(|a, b| (a.step, &a.path).cmp(&(b.step, &b.path)));
        Ok(Self { rows, left_out })
    }
}

impl Row {
    fn new(step: u64, path: PathBuf, state: Kind, bytes: u64) -> Self {
        let (shared_bytes, complete) = (0, state == Kind::Complete);
        let (saved, age_seconds, took_seconds, mark, why, said) = (None, None, None, None, None, None);
        Self { step, path, bytes, shared_bytes, complete, state, saved, age_seconds, took_seconds, mark, why, said }
    }

    /// Adds sizes and times from the file system.
    fn look(&mut self, now: SystemTime) {
        let mut first: Option<Duration> = None;
        for file in files_in(&self.path) {
            if let Ok(meta) = file.symlink_metadata()
                && meta.nlink() > 1
            {
                self.shared_bytes += meta.len();
                // Another step may have written this file, so its time does not count.
                continue;
            }
            if let Some(born) = born(&file) {
                first = Some(first.map_or(born, |first| first.min(born)));
            }
        }
        let saved = self.saved.and_then(|saved| saved.duration_since(SystemTime::UNIX_EPOCH).ok());
        if self.state == Kind::Complete {
            // The files of a copied step are newer than its save: the subtraction then gives None.
            self.took_seconds =
                first.zip(saved).and_then(|(first, saved)| saved.checked_sub(first)).map(|t| t.as_secs_f64());
        }
        self.age_seconds = self.saved.map(|saved| now.duration_since(saved).unwrap_or_default().as_secs());
    }
}

fn mark_of(marks: &[Marked], attempt: Attempt) -> Option<Mark> {
    marks.iter().find(|marked| marked.attempt == attempt).map(|marked| marked.mark)
}

/// Adds directories that have the name of a step but were not made by this library. Returns the directories
/// that do not have such a name.
fn foreign(root: &Path, rows: &mut Vec<Row>) -> Vec<String> {
    let mut left_out = Vec::new();
    for entry in std::fs::read_dir(root).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with('.') || !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        let path = entry.path();
        let Some(step) = parse_step_name(&name) else {
            left_out.push(name);
            continue;
        };
        if rows.iter().any(|row| row.path.file_name() == path.file_name()) {
            continue;
        }
        let files = files_in(&path);
        let named = |end: &str| files.iter().any(|file| file.to_string_lossy().ends_with(end));
        let what = if files.is_empty() {
            "an empty directory"
        } else if named(MANIFEST) {
            "its manifest.json is not of this library"
        } else if named(".safetensors") {
            "plain safetensors, not a step of this library"
        } else if named(".distcp") {
            "a checkpoint of torch.distributed, not a step of this library"
        } else {
            "no manifest.json: another program made it"
        };
        let (why, said) = (Some(what.to_owned()), Some(format!("step {step}: {what}, in {}", out::printable(&name))));
        let bytes = bytes_in(&path);
        rows.push(Row { why, said, ..Row::new(step, path, Kind::Foreign, bytes) });
    }
    left_out.sort_unstable();
    left_out
}

/// Returns the row of an attempt that a live process writes.
fn in_flight(root: &Path, left: &Remnant) -> Option<Row> {
    let (name, rest) = left.name.strip_prefix('.')?.split_once('.')?;
    let step = parse_step_name(name)?;
    let attempt = rest.split('.').next()?;
    let record = std::fs::read_to_string(root.join(format!(".{name}.{attempt}.owner"))).ok();
    let record: Option<serde_json::Value> = record.and_then(|text| serde_json::from_str(&text).ok());
    let pid = record.as_ref().and_then(|record| record["pid"].as_u64());
    let host = record.as_ref().and_then(|record| record["host"].as_str());
    let here = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_owned();
    let place = match host {
        Some(host) if host != here => format!(" on {}", out::printable(host)),
        _ => String::new(),
    };
    let writer = pid.map_or_else(|| "a process".to_owned(), |pid| format!("pid {pid}")) + &place;
    let why = Some(format!("being written by {writer}"));
    let row = Row::new(step, root.join(&left.name), Kind::InFlight, left.bytes);
    Some(Row { why, ..row })
}

fn files_in(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter(|file| file.file_type().is_ok_and(|kind| kind.is_file())).map(|file| file.path()).collect()
}

fn bytes_in(dir: &Path) -> u64 {
    files_in(dir).iter().filter_map(|file| file.metadata().ok()).map(|meta| meta.len()).sum()
}

/// Returns the time since 1970 at which a file was made, if the file system knows it.
fn born(file: &Path) -> Option<Duration> {
    let stat = rustix::fs::statx(rustix::fs::CWD, file, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BTIME).ok()?;
    let known = stat.stx_mask & StatxFlags::BTIME.bits() != 0;
    known.then(|| Duration::new(u64::try_from(stat.stx_btime.tv_sec).unwrap_or(0), stat.stx_btime.tv_nsec))
}

fn seconds<S: serde::Serializer>(time: &Option<SystemTime>, serializer: S) -> Result<S::Ok, S::Error> {
    let since = time.and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map(|since| since.as_secs_f64()).serialize(serializer)
}
