//! An attempt that another process can continue when its writer has died, for a program that writes the same
//! bytes in each run, such as a conversion.
//!
//! **Consistency.** The attempt's identity is computed from its content, so its files can be compared with
//! what they must be. The next process takes the lock of the owner record and writes itself into the record
//! before it reads a file. If the lock cannot tell (another host or boot, no locks), an owner that was judged
//! dead may live. That owner reads its record before it creates, rewrites or deletes a file and before it
//! publishes, and gives up if the record names another process. The other process deletes a file that was
//! being written, because the file is not complete. One race remains: a take-over between the owner's read of
//! the record and the call right after it. **Crash.** A file that the dead process left counts only after the
//! caller has checked its bytes and [`Resumable::adopt`] or [`Resumable::rewrite`] has made them durable.

use super::attempt::LocalAttempt;
use super::clock::Clock;
use super::direct;
use super::direct::Bypass;
use super::judge::{Finding, judge};
use super::reading::LocalReading;
use super::sys::{Kind, Open, uninterrupted};
use super::{Local, durable, names, transfer};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::storage::{FileReading, Reading, State, Writing, name as rules};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// An attempt, and the files that a dead process left in it.
#[derive(Debug)]
pub struct Resumable(Arc<LocalAttempt>);

impl Local {
    /// Takes over the attempt `attempt` at the step `name`, if a dead process left it. An attempt of another
    /// host, or of another boot of this host, counts as dead when it has not changed for `older_than`. If its
    /// owner lives after all, the owner's later calls on the attempt are refused.
    ///
    /// # Errors
    /// `Conflict` when its owner is alive or may be.
    #[doc(hidden)]
    pub fn resume(&self, name: &str, attempt: Attempt, older_than: Duration) -> Result<Option<Resumable>> {
        self.alive()?;
        rules::check_step(name)?;
        let root = self.root.afresh()?;
        let (temp, record) = (names::temp(name, attempt), names::owner(name, attempt));
        let dead = match judge(&root, &Clock::of(&root), &record, &temp, older_than)? {
            Finding::Dead(dead) => dead,
            Finding::Left(remnant) => {
                let why = match remnant.state {
                    State::Live => "another process writes it at present",
                    _ => "another process may still write it",
                };
                return Err(root.conflict(&format!("{why}: {}", remnant.why), &temp));
            }
            Finding::Gone => {
                return match root.look(&temp).map_err(root.error("cannot look for an attempt", &temp))? {
                    None => Ok(None),
                    Some(_) => Err(root.conflict("an attempt has no owner record; delete it to start again", &temp)),
                };
            }
        };
        durable::inherited(&root).map_err(root.own_error("cannot make changes of a dead process durable"))?;
        if dead.identity.is_none() {
            // The owner died before it made the attempt, or after the publish.
            dead.owner.erase(&root)?;
            return Ok(None);
        }
        let owner = self.owners.adopt(&root, dead.owner)?;
        let taken = LocalAttempt::taken_over(root, name, attempt, self.direct, self.owners.clone(), owner)?;
        Ok(Some(Resumable(Arc::new(taken))))
    }

    /// Begins an attempt that can be resumed.
    ///
    /// # Errors
    /// `Conflict` when the step exists.
    #[doc(hidden)]
    pub fn begin_resumable(&self, name: &str, attempt: Attempt) -> Result<Resumable> {
        self.alive()?;
        let (root, owners) = (self.root.afresh()?, self.owners.clone());
        let begun = LocalAttempt::begin(root, name, attempt, false, self.direct, owners, None)?;
        Ok(Resumable(Arc::new(begun.resumable())))
    }
}

impl Local {
    /// Begins an attempt that replaces the step `name`. Its files can be read before the publish.
    ///
    /// # Errors
    /// Those of the file system.
    #[doc(hidden)]
    pub fn begin_replacement(&self, name: &str, attempt: Attempt) -> Result<Resumable> {
        self.alive()?;
        let (root, owners) = (self.root.afresh()?, self.owners.clone());
        let begun = LocalAttempt::begin(root, name, attempt, true, self.direct, owners, None)?;
        Ok(Resumable(Arc::new(begun)))
    }
}

impl Resumable {
    /// Opens the files of the attempt like the files of a step.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn as_step(&self) -> Result<Arc<dyn Reading>> {
        Ok(Arc::new(self.reading()?))
    }

    /// The path of its directory.
    pub fn path(&self) -> PathBuf {
        self.0.files.dir.path().to_owned()
    }

    /// Returns the attempt, to write further files and to publish.
    pub fn writing(&self) -> &dyn Writing {
        self.0.as_ref()
    }

    /// Publishes the attempt in the place of the step that `opened` has open. Replaces no other step.
    ///
    /// # Errors
    /// `Conflict`, and nothing changed, when another step or no step has the name by now; otherwise as
    /// [`Writing::publish`].
    pub fn replace(&self, opened: &dyn Reading) -> Result<()> {
        let unknown = || Error::internal("a step that another storage has opened is to be replaced");
        self.0.publish_over(true, Some(opened.identity().ok_or_else(unknown)?))
    }

    /// The names of the files of the attempt.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn list(&self) -> Result<Vec<String>> {
        self.reading()?.list()
    }

    /// Opens a file of the attempt, so that the caller can check it.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn open(&self, file: &str) -> Result<Arc<dyn FileReading>> {
        self.reading()?.open(file)
    }

    /// Makes a file durable that a dead process wrote and whose fsync succeeded, and adds it to the attempt.
    /// The caller has checked every byte of the file. For other files see [`Resumable::rewrite`].
    ///
    /// # Errors
    /// Those of the file system; the attempt cannot be published then.
    pub fn adopt(&self, file: &str) -> Result<()> {
        let dir = &self.0.files.dir;
        self.0.files.count(|| {
            let (fd, _) = direct::open(dir, file, false).map_err(dir.error("cannot open file", file))?;
            durable::confirmed(&fd).map_err(dir.error("cannot make file durable", file))
        })
    }

    /// Writes a file, of which the caller knows every byte, over the remains that a dead process left, makes
    /// it durable and adds it to the attempt. If the fsync of the dead process failed, the kernel treats the
    /// pages as clean and reports the next fsync as successful. Only a new write brings the bytes to the
    /// medium.
    ///
    /// # Errors
    /// Those of the file system; the attempt cannot be published then.
    pub fn rewrite(&self, file: &str, bytes: &[u8]) -> Result<()> {
        rules::check_file(file).map_err(|error| error.with_kind(ErrorKind::Invalid))?;
        self.0.check_owned()?;
        let dir = &self.0.files.dir;
        self.0.files.count(|| {
            let fd = match dir.open(file, Open::Update) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    dir.open(file, Open::Create { direct: false })
                }
                opened => opened,
            };
            let fd = fd.map_err(dir.error("cannot open file", file))?;
            let written = transfer::write_all(&fd, &Bypass::off(), bytes, 0);
            let cut = || uninterrupted(|| fd.sys().ftruncate(fd.raw(), bytes.len() as u64));
            written.and_then(|()| cut()).map_err(dir.error("cannot write file", file))?;
            durable::file(&fd).map_err(dir.error("cannot make file durable", file))
        })
    }

    /// Deletes a file of the attempt.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn discard(&self, file: &str) -> Result<()> {
        rules::check_file(file).map_err(|error| error.with_kind(ErrorKind::Invalid))?;
        self.0.check_owned()?;
        let dir = &self.0.files.dir;
        dir.unlink(file, Kind::File).map_err(dir.error("cannot delete file", file))
    }

    fn reading(&self) -> Result<LocalReading> {
        Ok(LocalReading::of(self.0.files.dir.afresh()?, self.0.direct()))
    }
}
