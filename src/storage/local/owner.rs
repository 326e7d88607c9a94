//! Who writes an attempt: a record beside it, locked for as long as the writer lives.
//!
//! The lock tells a live writer from a dead one, but only as far as it reaches: some network file systems keep locks per host.
//! So the record names the host, and only attempts of this host are judged. Process id and start time are for people.

use super::dir::Dir;
use super::direct::Bypass;
use super::sys::{Fd, Kind, Stat, uninterrupted};
use super::{direct, durable, names, transfer};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use serde::{Deserialize, Serialize};
use std::fs;

/// Longer than any record.
const LIMIT: usize = 4096;

/// The record of an attempt of ours. The lock goes with it.
#[derive(Debug)]
pub(super) struct Owner {
    name: String,
    _lock: Fd,
}

impl Owner {
    /// Creates, locks and fills the record, and makes it durable.
    pub(super) fn record(root: &Dir, step: &str, attempt: Attempt) -> Result<Self> {
        let name = names::owner(step, attempt);
        let (fd, bypass) =
            direct::create(root, &name, false).map_err(root.error("cannot create the owner record", &name))?;
        Self::fill(root, &name, &fd, &bypass).inspect_err(|_| drop(root.unlink(&name, Kind::File)))?;
        Ok(Self { name, _lock: fd })
    }

    fn fill(root: &Dir, name: &str, fd: &Fd, bypass: &Bypass) -> Result<()> {
        match uninterrupted(|| fd.sys().try_lock(fd.raw())) {
            Ok(true) => {}
            Ok(false) => {
                return Err(Error::new(ErrorKind::Conflict, "somebody else locked a new owner record")
                    .with_path(root.path().join(name)));
            }
            // Nobody can lock here, so nobody will take this attempt for dead. Where only this call failed, others can, and would.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) => {
                tracing::warn!(path = %root.path().join(name).display(), %error, "no locks; dead attempts stay")
            }
            Err(error) => return Err(root.error("cannot lock the owner record", name)(error)),
        }
        let record = serde_json::to_vec(&Record::of_this_process())
            .map_err(|error| Error::internal("cannot write the owner record").with_source(error))?;
        transfer::write_all(fd, bypass, &record, 0).map_err(root.error("cannot write the owner record", name))?;
        durable::owner(fd, root).map_err(root.error("cannot make the owner record durable", name))
    }

    /// Deletes the record.
    pub(super) fn erase(&self, root: &Dir) -> Result<()> {
        root.unlink(&self.name, Kind::File).map_err(root.error("cannot delete the owner record", &self.name))
    }
}

/// What a sweep finds out about the owner of an attempt.
#[derive(Debug)]
pub(super) enum Finding {
    /// Dead, and locked by us now.
    Dead(Owner),
    /// To be left alone, for this reason.
    Left(String),
    /// Somebody else swept it.
    Gone,
}

/// Judges the owner that the record `name` speaks of.
pub(super) fn judge(root: &Dir, name: &str) -> Result<Finding> {
    let failed = "cannot read the owner record";
    let (fd, bypass) = match direct::open(root, name, false) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Finding::Gone),
        opened => opened.map_err(root.error(failed, name))?,
    };
    let mut bytes = [0; LIMIT];
    let len = transfer::read_full(&fd, &bypass, &mut bytes, 0).map_err(root.error(failed, name))?;
    let Ok(record) = serde_json::from_slice::<Record>(bytes.get(..len).unwrap_or_default()) else {
        return Ok(Finding::Left("its owner record is empty or not ours".into()));
    };
    if !record.is_of_this_host() {
        return Ok(Finding::Left(format!("of another host host={} pid={}", record.host, record.pid)));
    }
    if !crate::mutant::on(crate::mutant::Mutant::SweepLock) {
        match uninterrupted(|| fd.sys().try_lock(fd.raw())) {
            Ok(true) => {}
            Ok(false) => return Ok(Finding::Left(format!("live pid={}", record.pid))),
            Err(error) => return Ok(Finding::Left(format!("cannot be locked: {error} pid={}", record.pid))),
        }
    }
    // Between open and lock the record can have been swept, and even written anew.
    let held = uninterrupted(|| fd.sys().stat(fd.raw())).map_err(root.error(failed, name))?;
    let named = root.look(name).map_err(root.error(failed, name))?;
    if named.is_none_or(|named: Stat| named.identity != held.identity) {
        return Ok(Finding::Gone);
    }
    Ok(Finding::Dead(Owner { name: name.to_owned(), _lock: fd }))
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    host: String,
    boot_id: String,
    pid: u32,
    start_time: u64,
}

impl Record {
    fn of_this_process() -> Self {
        let (host, boot_id) = this_host();
        Self { host, boot_id, pid: std::process::id(), start_time: start_time().unwrap_or(0) }
    }

    /// One kernel, or the name of one machine: then a lock that we get means that the owner is gone.
    fn is_of_this_host(&self) -> bool {
        let (host, boot_id) = this_host();
        self.host == host || (self.boot_id == boot_id && !boot_id.is_empty())
    }
}

fn this_host() -> (String, String) {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    (rustix::system::uname().nodename().to_string_lossy().into_owned(), boot_id.trim().to_owned())
}

/// When this process started, in clock ticks since boot: with the process id, it names a process.
fn start_time() -> Option<u64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The second field is the program's name in brackets, which can hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}
