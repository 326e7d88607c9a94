//! Judges whether the owner of an attempt is dead.
//!
//! On the boot that wrote the record, its lock decides. On other boots and hosts, and without locks, age
//! decides: an attempt is dead when neither its record nor its files have changed for long enough, because a
//! live owner touches its record.

use super::clock::Clock;
use super::dir::Dir;
use super::owner::{Owner, RECORD, Record, has_no_locks};
use super::sys::{Fd, Kind, uninterrupted};
use super::{direct, transfer};
use crate::error::Result;
use crate::storage::{Remnant, State};
use std::sync::Arc;
use std::time::Duration;

/// An unreadable record of this age is not being written any more.
const WRITTEN_BY_THEN: Duration = Duration::from_secs(60);

/// The judgement on the owner of an attempt.
pub(super) enum Finding {
    Dead(Dead),
    Left(Remnant),
    /// Another sweep, or the owner itself, removed the attempt.
    Gone,
}

/// An attempt to remove. The sweep has the lock of its record, where locks work.
pub(super) struct Dead {
    pub(super) owner: Owner,
    pub(super) remnant: Remnant,
    /// True when only its age decided.
    pub(super) by_age: bool,
    /// The identity of its directory at the judgement; None when the directory did not exist.
    pub(super) identity: Option<(u64, u64)>,
}

/// The size of an attempt, and its last modification.
#[derive(Clone, Copy, Default)]
pub(super) struct Extent {
    /// None when the directory does not exist.
    pub(super) identity: Option<(u64, u64)>,
    pub(super) bytes: u64,
    pub(super) modified: Duration,
}

impl Extent {
    /// The extent of the directory `name`, or the default if the directory does not exist.
    ///
    /// # Errors
    /// Errors of the file system: an attempt that cannot be read may exist and be alive.
    pub(super) fn of(root: &Dir, name: &str) -> Result<Self> {
        let failed = "cannot look at what is to be swept";
        let Some(stat) = root.look(name).map_err(root.error(failed, name))? else { return Ok(Self::default()) };
        let mut extent = Self { identity: Some(stat.identity), bytes: 0, modified: stat.modified };
        if stat.kind != Kind::Dir {
            return Ok(extent);
        }
        let dir = match root.enter(name) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Self::default()),
            opened => opened.map_err(root.error(failed, name))?,
        };
        for file in dir.list().map_err(dir.own_error(failed))? {
            if let Some(stat) = dir.look(&file).map_err(dir.error(failed, &file))? {
                extent.bytes += stat.len;
                extent.modified = extent.modified.max(stat.modified);
            }
        }
        Ok(extent)
    }
}

/// Judges the owner of the attempt `temp` by its record `name`. If age decides, the owner is dead when the
/// attempt has not changed for `older_than`.
pub(super) fn judge(root: &Dir, clock: &Clock<'_>, name: &str, temp: &str, older_than: Duration) -> Result<Finding> {
    let failed = "cannot read the owner record";
    let (fd, bypass) = match direct::update(root, name) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Finding::Gone),
        opened => opened.map_err(root.error(failed, name))?,
    };
    let mut bytes = [0; RECORD];
    let len = transfer::read_full(&fd, &bypass, &mut bytes, 0).map_err(root.error(failed, name))?;
    let record = Record::parse(bytes.get(..len).unwrap_or_default());
    let held = uninterrupted(|| fd.sys().stat(fd.raw())).map_err(root.error(failed, name))?;
    let extent = Extent::of(root, temp);
    let bytes = extent.as_ref().map_or(0, |extent| extent.bytes);
    let remnant = |state, why: String, age| Remnant { name: temp.to_owned(), state, why, age, bytes };
    let live = |who: &str| Ok(Finding::Left(remnant(State::Live, format!("live{who}"), None)));

    let who = record.as_ref().map_or_else(String::new, |record| format!(" host={} pid={}", record.host, record.pid));
    let mut by_age = true;
    let mut why = match &record {
        None => "its owner record cannot be read".to_owned(),
        Some(record) if !record.is_of_this_boot() => format!("of another host, or another boot{who}"),
        Some(record) if !record.locked => format!("its owner took no lock{who}"),
        Some(_) => format!("its owner holds no lock{who}"),
    };
    if let Some(record) = record.as_ref().filter(|record| record.locked) {
        match may_be_dead(&fd) {
            Ok(true) => by_age = !record.is_of_this_boot(),
            Ok(false) => return live(&who),
            Err(error) => why = format!("its owner record cannot be locked: {error:#}{who}"),
        }
    }
    // An owner that holds its lock is alive even if the attempt cannot be read. Every other decision needs
    // the attempt.
    let extent = extent?;
    let mut age = None;
    if by_age {
        age = clock.age(held.modified.max(extent.modified));
        let enough = match (&record, extent.identity.is_some()) {
            (Some(_), _) => older_than,
            (None, true) => older_than.max(WRITTEN_BY_THEN),
            (None, false) => WRITTEN_BY_THEN,
        };
        if age.is_none_or(|age| age < enough) {
            return Ok(Finding::Left(remnant(State::Undecided, why, age)));
        }
        // Do not lock earlier: the owner of a record that is being written would find the record locked, and
        // fail.
        if record.is_none() {
            match may_be_dead(&fd) {
                Ok(true) => {}
                Ok(false) => return live(""),
                Err(error) if has_no_locks(&error) => {}
                Err(error) => {
                    let why = format!("{why}, nor locked: {error:#}");
                    return Ok(Finding::Left(remnant(State::Undecided, why, age)));
                }
            }
        }
    }
    // Another sweep may have removed the record between open and lock, and an owner may have written a new
    // one.
    let named = root.look(name).map_err(root.error(failed, name))?;
    if named.is_none_or(|named| named.identity != held.identity) {
        return Ok(Finding::Gone);
    }
    let owner = Owner::judged(name.to_owned(), Arc::new(fd));
    Ok(Finding::Dead(Dead { owner, remnant: remnant(State::Dead, why, age), by_age, identity: extent.identity }))
}

/// Locks a record. Returns false if its owner has the lock.
fn may_be_dead(fd: &Fd) -> std::io::Result<bool> {
    if crate::mutant::on(crate::mutant::Mutant::SweepLock) {
        return Ok(true);
    }
    uninterrupted(|| fd.sys().try_lock(fd.raw()))
}
