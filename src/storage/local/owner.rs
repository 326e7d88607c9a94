//! The owner record: a file beside an attempt that names the attempt's writer, and is locked while the writer
//! lives.
//!
//! The lock tells a live writer from a dead one, but may not work between two machines, or between two boots
//! of one machine. So the record names the boot, for `judge`. A live writer also touches its record, for
//! sweeps on machines where the lock does not work. Host, process id and start time are there only for
//! people.

use super::dir::Dir;
use super::direct::{self, Bypass};
use super::sys::{Fd, Kind, uninterrupted};
use super::{durable, names, transfer};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::settings::Locks;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::{fs, io};

/// Maximum length of a record.
pub(super) const RECORD: usize = 4096;

/// ENOTSUPP, a kernel-internal code that some parallel file systems return to programs.
const ENOTSUPP: i32 = 524;

/// The record of an attempt, with its lock.
#[derive(Debug)]
pub(super) struct Owner {
    name: String,
    record: Arc<Fd>,
    /// The bytes that this process wrote into the record.
    content: Vec<u8>,
}

/// The owner records of one storage.
#[derive(Debug)]
pub(super) struct Owners {
    locks: Locks,
    /// Records of publishes with an unclear outcome. Their locks are kept until the storage is dropped, so
    /// that no sweep of this process removes them.
    kept: Mutex<Vec<Owner>>,
    live: Mutex<Vec<Weak<Fd>>>,
    /// True once the missing locks were logged.
    warned: AtomicBool,
}

impl Owners {
    pub(super) fn new(locks: Locks) -> Self {
        Self { locks, kept: Mutex::default(), live: Mutex::default(), warned: AtomicBool::new(false) }
    }

    /// Creates, locks and fills a record, and makes it durable.
    ///
    /// `generation` is the generation of the session, for an attempt of several ranks.
    pub(super) fn record(&self, root: &Dir, step: &str, attempt: Attempt, generation: Option<u64>) -> Result<Owner> {
        let name = names::owner(step, attempt);
        let (fd, bypass) =
            direct::create(root, &name, false).map_err(root.error("cannot create the owner record", &name))?;
        let filled = self.fill(root, &name, &fd, &bypass, generation);
        let content = filled.inspect_err(|_| drop(root.unlink(&name, Kind::File)))?;
        let record = Arc::new(fd);
        self.lives(&record);
        Ok(Owner { name, record, content })
    }

    fn lives(&self, record: &Arc<Fd>) {
        let mut live = lock(&self.live);
        live.retain(|record| record.strong_count() > 0);
        live.push(Arc::downgrade(record));
    }

    /// Writes this process into the record of a dead process, which this process has judged and locked.
    pub(super) fn adopt(&self, root: &Dir, owner: Owner) -> Result<Owner> {
        let (name, fd) = (&owner.name, &owner.record);
        let failed = "cannot write the owner record";
        let locked = self.locks != Locks::None && uninterrupted(|| fd.sys().try_lock(fd.raw())).unwrap_or(false);
        let (mut old, bypass) = ([0; RECORD], Bypass::off());
        let length = transfer::read_full(fd, &bypass, &mut old, 0).map_err(root.error(failed, name))?;
        let takeovers = Record::parse(&old[..length]).map_or(0, |old| old.takeovers).saturating_add(1);
        let mut record = serde_json::to_vec(&Record { takeovers, ..Record::of_this_process(locked) })
            .map_err(|error| Error::internal(failed).with_source(error))?;
        // Pad with spaces up to the old length, so that one write leaves a whole record.
        record.resize(record.len().max(length), b' ');
        transfer::write_all(fd, &bypass, &record, 0).map_err(root.error(failed, name))?;
        durable::owner(fd, root).map_err(root.error("cannot make the owner record durable", name))?;
        self.lives(&owner.record);
        Ok(Owner { content: record, ..owner })
    }

    fn fill(&self, root: &Dir, name: &str, fd: &Fd, bypass: &Bypass, generation: Option<u64>) -> Result<Vec<u8>> {
        let locked = self.lock(root, name, fd)?;
        let record = Record { generation, ..Record::of_this_process(locked) };
        let record = serde_json::to_vec(&record)
            .map_err(|error| Error::internal("cannot write the owner record").with_source(error))?;
        transfer::write_all(fd, bypass, &record, 0).map_err(root.error("cannot write the owner record", name))?;
        durable::owner(fd, root).map_err(root.error("cannot make the owner record durable", name))?;
        Ok(record)
    }

    /// Locks a new record. Returns false if there are no locks, and the record then says so.
    fn lock(&self, root: &Dir, name: &str, fd: &Fd) -> Result<bool> {
        if self.locks == Locks::None {
            return Ok(false);
        }
        match uninterrupted(|| fd.sys().try_lock(fd.raw())) {
            Ok(true) => Ok(true),
            Ok(false) => Err(Error::new(ErrorKind::Conflict, "another process locked a new owner record")
                .with_path(root.path().join(name))),
            Err(error) if has_no_locks(&error) => {
                if !self.warned.swap(true, Ordering::AcqRel) {
                    let path = root.path().display();
                    tracing::warn!(%path, error = format_args!("{error:#}"), "the file system has no locks: dead attempts are told by their age");
                }
                Ok(false)
            }
            Err(error) => {
                let what = "cannot lock the owner record; where the file system has no locks that work, set locks=none";
                Err(root.error(what, name)(error))
            }
        }
    }

    /// Keeps `owner` until the storage is dropped.
    pub(super) fn keep(&self, owner: Owner) {
        lock(&self.kept).push(owner);
    }

    /// Touches the records of all live attempts.
    ///
    /// # Errors
    /// The first error. The other records are touched nevertheless.
    pub(super) fn touch(&self) -> io::Result<()> {
        let live: Vec<Arc<Fd>> =
            lock(&self.live).iter().filter_map(Weak::upgrade).filter(|record| record.is_ours()).collect();
        let touched: Vec<_> = live.iter().map(|fd| uninterrupted(|| fd.sys().touch(fd.raw()))).collect();
        touched.into_iter().collect()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns true if a lock's error means that the file system has no locks, for any process.
pub(super) fn has_no_locks(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | ENOTSUPP))
}

impl Owner {
    /// The owner whose record this process has judged. This process wrote nothing into that record.
    pub(super) fn judged(name: String, record: Arc<Fd>) -> Self {
        Self { name, record, content: Vec::new() }
    }

    /// Refuses to go on unless the record is as this process wrote it. Opens the record again, because
    /// another host may have written it.
    ///
    /// # Errors
    /// `Conflict` when another process has taken the attempt over, or has published or deleted it.
    pub(super) fn check(&self, root: &Dir) -> Result<()> {
        let failed = "cannot read the owner record";
        let taken = || root.conflict("another process has taken the attempt over", &self.name);
        let (fd, bypass) = match direct::open(root, &self.name, false) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Err(taken()),
            opened => opened.map_err(root.error(failed, &self.name))?,
        };
        let mut found = [0; RECORD];
        let length = transfer::read_full(&fd, &bypass, &mut found, 0).map_err(root.error(failed, &self.name))?;
        if found[..length] == self.content[..] { Ok(()) } else { Err(taken()) }
    }

    /// Deletes the record.
    pub(super) fn erase(&self, root: &Dir) -> Result<()> {
        root.unlink(&self.name, Kind::File).map_err(root.error("cannot delete the owner record", &self.name))
    }
}

/// The content of an owner record. Later versions may add fields.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) host: String,
    boot_id: String,
    pub(super) pid: u32,
    start_time: u64,
    /// True when absent.
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    pub(super) locked: bool,
    /// The generation of the session that writes the attempt, if several ranks do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) generation: Option<u64>,
    /// How many processes have taken the attempt over, one after the other.
    #[serde(default, skip_serializing_if = "is_zero")]
    takeovers: u64,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_yes(locked: &bool) -> bool {
    *locked
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_zero(takeovers: &u64) -> bool {
    *takeovers == 0
}

impl Record {
    /// Parses a record. None for bytes that are not a record: an empty file, zeros after a power failure, or
    /// a file of another program.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }

    fn of_this_process(locked: bool) -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let (pid, start_time) = (std::process::id(), start_time().unwrap_or(0));
        Self { host, boot_id: this_boot(), pid, start_time, locked, generation: None, takeovers: 0 }
    }

    /// Returns true if the record was written during the present boot. Then the kernel knows whether the
    /// writer still has its lock. Host names, and the content of images, can be equal on several machines.
    pub(super) fn is_of_this_boot(&self) -> bool {
        !self.boot_id.is_empty() && self.boot_id == this_boot()
    }
}

fn this_boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// The start of this process in clock ticks since boot; with the process id, it identifies a process.
fn start_time() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the name of the program in brackets. It can contain any character.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
