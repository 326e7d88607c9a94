//! Storage of checkpoints: one directory (or prefix) of steps, each written once and read many times.
//!
//! **Protocol.** A step is made in three moves: [`Storage::begin`] makes an attempt that no reader sees, the
//! executor writes and seals the files of the attempt, and [`Writing::publish`] turns the attempt into a step
//! atomically. A step never changes. **Completion.** `Ok` from `seal`, `put`, `publish` means durable, not
//! merely accepted. **Crash.** A step that was begun and not published is an attempt; [`Storage::sweep`]
//! removes attempts whose owner is dead. **Cancellation.** [`Writing::abandon`] deletes an attempt; a sweep
//! deletes the attempts of a dead process.

pub mod local;
pub(crate) mod memory;
mod name;
#[cfg(feature = "object-store")]
mod object;
mod open;
pub mod process;
pub mod shared;
mod url;

pub use memory::Memory;
#[cfg(feature = "object-store")]
pub use object::ObjectStore;
pub use open::{at, open};
pub(crate) use open::{identity, open_with};
pub use process::Process;
pub(crate) use url::StepPlace;
#[doc(hidden)]
pub use url::is_url;

use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::memory::{Pages, Slab};
pub use crate::settings::IoMode;
use std::any::Any;
use std::fmt::Debug;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

/// A store of steps. Names are single path components.
pub trait Storage: Send + Sync + Debug {
    /// Begins an attempt at the step `name`. Returns `Conflict` early when the step exists and `overwrite` is
    /// false.
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>>;

    /// Makes this process the owner of the root: after this call, no earlier owner can change the steps of
    /// the root. An executor of one process calls it once, before it lists anything; readers never call it.
    /// The default does nothing: attempts that older processes have begun may still be published.
    ///
    /// # Errors
    /// Errors of the storage. `Invalid` for a storage that cannot be written safely.
    fn take_over(&self) -> Result<()> {
        Ok(())
    }

    /// Opens the published step `name`. The step stays readable even if it is replaced or pruned meanwhile.
    /// On an object store, a later read of such a step returns `NotFound`.
    ///
    /// # Errors
    /// `NotFound` when there is no such step.
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>>;

    /// Names that may be steps or [versions](crate::chain), in no order, without attempts and trash.
    fn list(&self) -> Result<Vec<String>>;

    /// Makes a step of another process durable: its files, its directory, its name.
    fn confirm(&self, name: &str) -> Result<()>;

    /// Removes a step: it disappears atomically and durably, then its bytes are freed.
    fn remove(&self, name: &str) -> Result<()>;

    /// Removes a step like [`Storage::remove`], but only the step that `opened` has open. Another step under
    /// the same name stays.
    ///
    /// # Errors
    /// `Conflict` when another step has the name; `NotFound` when no step has it.
    fn remove_opened(&self, name: &str, _opened: &dyn Reading) -> Result<()> {
        self.remove(name)
    }

    /// Removes attempts and trash of dead owners only.
    fn sweep(&self, how: Sweep) -> Result<Swept>;

    /// Touches the attempts that this process has begun and not settled, so that sweeps that judge by age see
    /// them alive. An executor calls it every few minutes. A storage whose sweeps never judge by age does
    /// nothing.
    fn touch(&self) -> Result<()> {
        Ok(())
    }

    /// Writes the hint file `latest`: best effort, never trusted.
    fn hint(&self, name: &str) -> Result<()>;

    /// Reads the marks of steps, which lie beside the steps. None if there are no marks. The default returns
    /// None.
    ///
    /// # Errors
    /// When the marks cannot be read.
    fn read_marks(&self) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    /// Replaces the marks of steps, atomically and durably. The default refuses.
    ///
    /// # Errors
    /// `Invalid` when the storage keeps no marks; an I/O error.
    fn write_marks(&self, _marks: &[u8]) -> Result<()> {
        Err(Error::invalid("this storage keeps no marks of steps"))
    }

    /// Registers memory that files will be written from, until the returned value is dropped: before the
    /// memory is unmapped, and while nothing is written from it. The default does nothing.
    fn register(&self, _pages: Pages<'_>) -> Box<dyn Any + Send + Sync> {
        Box::new(())
    }

    /// Tells the storage how an executor writes, once, before the executor begins an attempt. A storage that
    /// keeps slabs until a peer has acknowledged them uses this: [`Writing::create`] refuses a file for which
    /// there are too few slabs. The default does nothing.
    fn equip(&self, _writers: Writers) {}

    /// Returns the storage of checkpoints in the directory `parent`, with the settings of this storage. A
    /// save with [`SaveOptions::directory`](crate::SaveOptions::directory) writes there. With `create` a
    /// missing directory is created, and all names of its path are made durable. The default refuses.
    ///
    /// # Errors
    /// `NotFound` when the directory does not exist and `create` is false.
    fn elsewhere(&self, parent: &Path, _create: bool) -> Result<Arc<dyn Storage>> {
        let why = "this storage has no directories beside its root; save without `SaveOptions::directory`";
        Err(Error::invalid(why).with_path(parent))
    }

    /// Whether [`Writing::adopt`] may make files from files of published steps. The default is false.
    fn adopts(&self) -> bool {
        false
    }

    /// The operations for several processes that write one step together. None if the storage does not
    /// support that.
    fn shared(&self) -> Option<Arc<dyn shared::Shared>> {
        None
    }

    /// The directory of the root in the file system of this host, in which the [run log] is written. None,
    /// the default, for a storage without such a directory, which gets no log.
    ///
    /// [run log]: crate::Settings::run_log
    fn directory(&self) -> Option<std::path::PathBuf> {
        None
    }

    /// The way bytes are written, for reports.
    fn engine(&self) -> &'static str {
        "its own"
    }

    /// The path of a step, for messages.
    fn describe(&self, name: &str) -> std::path::PathBuf;
}

/// Options of a sweep.
///
/// ```
/// use ashore::storage::Sweep;
/// let two_days = std::time::Duration::from_secs(48 * 3600);
/// let sweep = Sweep::default().older_than(two_days).dry_run();
/// assert!(sweep.dry_run);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sweep {
    /// Age at which an attempt whose lock cannot be judged counts as dead: a day without a change. Live
    /// owners touch their attempts every few minutes. With a shorter time, the caller guarantees that no
    /// owner is alive on another host.
    pub older_than: Duration,
    /// Only report, and remove nothing.
    pub dry_run: bool,
}

impl Default for Sweep {
    fn default() -> Self {
        Self { older_than: Duration::from_secs(24 * 3600), dry_run: false }
    }
}

impl Sweep {
    /// Sets the time without a change after which an attempt whose lock cannot be judged is dead.
    pub fn older_than(mut self, older_than: Duration) -> Self {
        self.older_than = older_than;
        self
    }

    /// Makes the sweep only report, and remove nothing.
    pub fn dry_run(mut self) -> Self {
        self.dry_run = true;
        self
    }
}

/// The result of a sweep, or of a dry run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Swept {
    /// Attempts and trash that the sweep removed.
    pub removed: Vec<Remnant>,
    /// Attempts and trash that the sweep kept.
    pub left: Vec<Remnant>,
}

/// An attempt, or trash, that a sweep found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Remnant {
    /// Its name.
    pub name: String,
    /// The state of its owner.
    pub state: State,
    /// The reason, for people.
    pub why: String,
    /// Time since its last change by the clock of the file system, if the sweep needed it and could read it.
    pub age: Option<Duration>,
    /// The total length of its files in bytes. A live attempt may still grow.
    pub bytes: u64,
}

/// The state of a [`Remnant`]'s owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum State {
    /// The owner is dead.
    Dead,
    /// The owner is alive.
    Live,
    /// No lock decides, and the attempt changed recently: its owner may be alive on another host.
    Undecided,
    /// The owner is or may be dead, but an error prevented judging or removing the attempt.
    Stuck,
}

/// How an executor writes: see [`Storage::equip`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Writers {
    /// The bytes of the arena.
    pub arena: u64,
    /// The bytes of a slab: [`Settings::chunk`](crate::Settings::chunk).
    pub chunk: u64,
    /// The number of threads that call [`FileWriting::write_slab`].
    pub threads: usize,
}

impl Writers {
    /// Writers of slabs of `chunk` bytes, in an arena of `arena` bytes.
    pub fn new(arena: u64, chunk: u64, threads: usize) -> Self {
        Self { arena, chunk, threads }
    }
}

/// An attempt being written. If it is dropped without `publish` or `abandon`, a sweep deletes the attempt.
pub trait Writing: Send + Sync + Debug {
    /// Sets the time at which the save fails if it has not ended. Calls that wait for a peer then return an
    /// error of the kind `Deadline`. The default does nothing.
    fn expires(&self, _at: Instant) {}

    /// Creates a file of `len` bytes, and allocates its space at once if the medium can.
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>>;

    /// Writes a small file whole and durably.
    fn put(&self, file: &str, bytes: &[u8]) -> Result<()>;

    /// Makes a file from `source` without writing its bytes. The file is a durable clone, in which `head`
    /// replaces the first bytes of the source; or it is a hard link to the source itself. The length of
    /// `head` is a multiple of [`crate::ALIGNMENT`]. `source` is a file of a step of this storage that is
    /// known to be durable. A file system that can neither clone nor link refuses, which is not an error, and
    /// leaves no such file in the attempt.
    ///
    /// # Errors
    /// When the file was made and is not durable. The attempt is then lost, as after a failed
    /// [`FileWriting::seal`].
    fn adopt(&self, _file: &str, _source: &dyn FileReading, _head: &[u8]) -> Result<Adopted> {
        Ok(Adopted::Refused("this storage shares no files between steps".into()))
    }

    /// Publishes the attempt as its step, durably. `Conflict` when another attempt won; `Indeterminate` when
    /// an error came after the name may have changed.
    fn publish(&self, overwrite: bool) -> Result<()>;

    /// Deletes the replaced step and the owner record, after a publish was reported. Not part of the commit.
    fn settle(&self) -> Result<()>;

    /// Deletes only the attempt.
    fn abandon(&self) -> Result<()>;
}

/// How [`Writing::adopt`] made a file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Adopted {
    /// A clone: it has its own first bytes, and shares the blocks of the others with the source.
    Cloned,
    /// A hard link to the source. The first bytes of the file name the step that wrote it.
    Linked,
    /// The file was not made, for this reason.
    Refused(String),
}

/// A file of an attempt.
pub trait FileWriting: Send + Sync + Debug {
    /// Writes at `offset`. Offset and address are multiples of [`crate::ALIGNMENT`]. The length may be
    /// rounded up beyond the file's end; `seal` cuts the excess off.
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Writes a slab at `offset`, as [`FileWriting::write_at`] does, and takes ownership of the slab. A
    /// storage that sends bytes to a peer may send them from the slab and return before the peer has them;
    /// `seal` then waits. The storage drops the slab when no thread reads it any more, also after an error.
    /// The default calls `write_at`.
    fn write_slab(&self, offset: u64, slab: Slab) -> Result<()> {
        self.write_at(offset, slab.as_ref())
    }

    /// Cuts the file at its length and makes it durable. Never repeated: a failure loses the attempt.
    fn seal(&self) -> Result<()>;

    /// How bytes reach the medium.
    fn mode(&self) -> IoMode;
}

/// How the bytes of files are best read.
///
/// ```
/// use ashore::storage::Access;
/// let store = Access::remote(8 << 20, 16);
/// assert!(store.again && !Access::LOCAL.again);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Access {
    /// The length of an efficient read in bytes, up to 32 MiB. None: the reader chooses.
    pub read: Option<u64>,
    /// The number of concurrent reads that is still efficient. None: as many as the reader has threads.
    pub in_flight: Option<usize>,
    /// A second read may return other bytes than the first, because the medium may have lost or changed bytes
    /// in transit. Bytes with a wrong digest are therefore read once more.
    pub again: bool,
}

impl Access {
    /// The access of a disk or of memory of this machine.
    pub const LOCAL: Self = Self { read: None, in_flight: None, again: false };

    /// The access of a peer that answers requests: reads of `read` bytes, of which `in_flight` are under way
    /// at once.
    pub fn remote(read: u64, in_flight: usize) -> Self {
        Self { read: Some(read), in_flight: Some(in_flight), again: true }
    }
}

/// Metadata of a file in a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inode {
    /// Device and inode number. Names with equal values are names of one file.
    pub identity: (u64, u64),
    /// The length of the file in bytes.
    pub len: u64,
    /// The number of names of the file, in all directories. A clone is a file of its own, and is not counted
    /// here.
    pub names: u64,
}

/// A published step, kept open.
pub trait Reading: Send + Sync + Debug {
    /// Opens a file of the step. Names with a path separator, `.` and `..` are `Corrupt`; links are not
    /// followed.
    fn open(&self, file: &str) -> Result<Arc<dyn FileReading>>;

    /// An identity that no other step under the same name has while this step is open. None if the storage
    /// has no identities.
    fn identity(&self) -> Option<(u64, u64)> {
        None
    }

    /// True when the storage has recorded that this library made the step, whatever is left of its files.
    /// Default: false, so the files have to show it.
    fn is_recorded(&self) -> bool {
        false
    }

    /// The names of all its files, in no order.
    fn list(&self) -> Result<Vec<String>>;

    /// The current metadata of a file, without opening it. None if there is no such file, or if each file of
    /// this storage has only one name (the default).
    ///
    /// # Errors
    /// `Corrupt` for a name that [`Reading::open`] refuses; an I/O error.
    fn inode(&self, _file: &str) -> Result<Option<Inode>> {
        Ok(None)
    }

    /// How the bytes of the step's files are best read. Default: like files of a local disk.
    fn access(&self) -> Access {
        Access::LOCAL
    }
}

/// A file of a published step.
pub trait FileReading: Send + Sync + Debug {
    /// Its length in bytes.
    fn len(&self) -> u64;

    /// When its bytes last changed, by the clock of the medium; None if unknown.
    fn modified(&self) -> Option<SystemTime> {
        None
    }

    /// Returns true when the file has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The file itself, so that the storage that opened it can downcast it to its own type. The default is
    /// None: no other file is made from this one.
    fn as_any(&self) -> Option<&dyn Any> {
        None
    }

    /// Fills `buffer` from `offset`; `Corrupt` when the file ends earlier. Offset, length and address are
    /// arbitrary; if all three are multiples of [`crate::ALIGNMENT`], the read bypasses the page cache if the
    /// medium can.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Asks the system to drop the cached pages of the file, so that the next read comes from the medium.
    /// Does nothing by default, or if the system does not support it.
    fn drop_cached(&self) {}
}
