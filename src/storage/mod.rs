//! Where checkpoints are kept: one directory (or prefix) of steps, written once, read many times.
//!
//! **Protocol.** A step comes into being in three moves: [`Storage::begin`] makes an attempt that no reader looks at, its
//! files are written and sealed, [`Writing::publish`] makes it a step at once or not at all. A step is never changed.
//! **Completion.** `Ok` from `seal`, `put`, `publish` means durable, not merely accepted.
//! **Crash.** Whatever was begun and not published is an attempt; [`Storage::sweep`] removes those whose owner is dead.
//! **Cancellation.** [`Writing::abandon`], or dropping the process.

pub mod local;
mod memory;
mod name;

pub use memory::Memory;

use crate::error::Result;
use crate::id::Attempt;
use crate::memory::Pages;
pub use crate::settings::IoMode;
use std::any::Any;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// A place for steps. Names are single path components.
pub trait Storage: Send + Sync + Debug {
    /// Begins an attempt at the step `name`; early `Conflict` when the step exists and `overwrite` is false.
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>>;

    /// Opens what was published under `name`, to be read even if it is replaced or pruned meanwhile.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>>;

    /// Names that may be steps, in no order; attempts and trash are not among them.
    fn list(&self) -> Result<Vec<String>>;

    /// Makes a step that somebody else published durable: its files, its directory, its name.
    fn confirm(&self, name: &str) -> Result<()>;

    /// Removes a step: it disappears at once and durably, then its bytes are freed.
    fn remove(&self, name: &str) -> Result<()>;

    /// As [`Storage::remove`], but only the step that `opened` has open: another that has taken its name
    /// stays.
    ///
    /// # Errors
    /// `Conflict` when there is another; `NotFound` when there is none.
    fn remove_opened(&self, name: &str, _opened: &dyn Reading) -> Result<()> {
        self.remove(name)
    }

    /// Removes attempts and trash whose owner is dead, and only those.
    fn sweep(&self, how: Sweep) -> Result<Swept>;

    /// Shows those who judge by age that attempts begun here and not settled are alive. Called every few minutes by an executor; a
    /// storage whose sweeps never judge by age has nothing to do.
    fn touch(&self) -> Result<()> {
        Ok(())
    }

    /// Writes the hint file `latest`: best effort, never trusted.
    fn hint(&self, name: &str) -> Result<()>;

    /// Makes memory known from which files will be written, until the returned value is dropped: before the memory is
    /// unmapped, and when nothing is written from it. A storage that gains nothing by it has nothing to do.
    fn register(&self, _pages: Pages<'_>) -> Box<dyn Any + Send + Sync> {
        Box::new(())
    }

    /// How bytes are handed to the medium, for reports.
    fn engine(&self) -> &'static str {
        "its own"
    }

    /// Where this is, for messages.
    fn describe(&self, name: &str) -> std::path::PathBuf;
}

/// How to sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sweep {
    /// An attempt of which no lock tells whether its owner is alive is dead when it has not changed for so long: a day. Live
    /// owners touch their attempts every few minutes: below that, the caller vouches for it that none is alive on another host.
    pub older_than: Duration,
    /// Only say what would be removed.
    pub dry_run: bool,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { older_than: Duration::from_secs(24 * 3600), dry_run: false }
    }
}

impl Sweep {
    /// Sets after what time without a change an attempt is dead whose owner no lock tells of.
    pub fn older_than(mut self, older_than: Duration) -> Self {
        self.older_than = older_than;
        self
    }

    /// Removes nothing.
    pub fn dry_run(mut self) -> Self {
        self.dry_run = true;
        self
    }
}

/// What a sweep did, or would do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Swept {
    /// Attempts and trash that were removed.
    pub removed: Vec<Remnant>,
    /// Attempts and trash that were left alone.
    pub left: Vec<Remnant>,
}

/// An attempt, or trash, that a sweep found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Remnant {
    /// Its name.
    pub name: String,
    /// What is known of its owner.
    pub state: State,
    /// Why, for people.
    pub why: String,
    /// How long it has not changed, by the clock of the file system, where that was asked and can be told.
    pub age: Option<Duration>,
    /// The length of its files; of live ones not all that will be.
    pub bytes: u64,
}

/// What is known of the owner of a [`Remnant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// It is dead.
    Dead,
    /// It is alive.
    Live,
    /// No lock tells, and it changed not long ago: it may be alive on another host.
    Undecided,
    /// It is dead, or may be, but an error kept the attempt from being judged or removed.
    Stuck,
}

/// An attempt being written. Dropping it without `publish` or `abandon` leaves it to a sweep.
pub trait Writing: Send + Sync + Debug {
    /// Creates a file of `len` bytes; space is taken at once where the medium can.
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>>;

    /// Writes a small file whole and durably.
    fn put(&self, file: &str, bytes: &[u8]) -> Result<()>;

    /// Makes the attempt the step, durably. `Conflict` when another attempt won, `Indeterminate` when an error came after
    /// the name may have changed.
    fn publish(&self, overwrite: bool) -> Result<()>;

    /// After a publish was reported: deletes what it replaced, and the owner record. Not part of the commit.
    fn settle(&self) -> Result<()>;

    /// Deletes the attempt. Nothing is lost but the attempt.
    fn abandon(&self) -> Result<()>;
}

/// A file of an attempt.
pub trait FileWriting: Send + Sync + Debug {
    /// Writes at `offset`. Both offset and address are multiples of [`crate::ALIGNMENT`]; the length may be
    /// rounded up beyond the file's end, which `seal` cuts off.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Cuts the file at its length and makes it durable. Not repeated after a failure: the attempt is lost then.
    fn seal(&self) -> Result<()>;

    /// How bytes reach the medium.
    fn mode(&self) -> IoMode;
}

/// A published step, held open.
pub trait Reading: Send + Sync + Debug {
    /// Opens a file of the step. Names with a path separator, `.` and `..` are `Corrupt`; links are not followed.
    fn open(&self, file: &str) -> Result<Arc<dyn FileReading>>;

    /// What tells this step from any other under its name, as long as it is held open; None where nothing
    /// does.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// The names of all its files, in no order.
    fn list(&self) -> Result<Vec<String>>;
}

/// A file of a published step.
pub trait FileReading: Send + Sync + Debug {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// When its bytes were last changed, by the clock of the medium. None where that is not known.
    fn modified(&self) -> Option<SystemTime> {
        None
    }

    /// True when the file has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `buffer` from `offset`; `Corrupt` when the file ends before. Any offset, length and address; when all three
    /// are multiples of [`crate::ALIGNMENT`] the page cache is left alone where the medium can.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;
}
