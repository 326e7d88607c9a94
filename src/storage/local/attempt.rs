//! An attempt: a hidden directory that one rename makes the step.

use super::dir::Dir;
use super::direct::Bypass;
use super::file::LocalFile;
use super::owner::{Owner, Owners};
use super::progress::Progress;
use super::sys::Kind;
use super::{direct, durable, names, publish, transfer, trash};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::memory::ALIGNMENT;
use crate::mutant::{self, Mutant};
use crate::storage::{FileWriting, Writing, name};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Minimum size of whole files that are written like shards, with direct I/O: the manifest of many tensors
/// has several MiB.
const WORTHWHILE: usize = 128 << 10;

#[derive(Debug)]
enum Phase {
    Open(Owner),
    Published(Owner),
    /// The publish may have happened.
    Unclear,
    Over,
}

/// An attempt in a directory of its own.
#[derive(Debug)]
pub(super) struct LocalAttempt {
    /// Its own descriptor of the root: a failed fsync spoils this attempt and no other.
    root: Dir,
    dir: Dir,
    step: String,
    temp: String,
    identity: (u64, u64),
    direct: bool,
    progress: Arc<Progress>,
    phase: Mutex<Phase>,
    owners: Arc<Owners>,
}

impl LocalAttempt {
    pub(super) fn begin(
        root: Dir,
        step: &str,
        attempt: Attempt,
        overwrite: bool,
        direct: bool,
        owners: Arc<Owners>,
    ) -> Result<Self> {
        name::check_step(step)?;
        match root.look(step).map_err(root.error("cannot look for the step", step))? {
            None => {}
            Some(stat) if overwrite && stat.kind == Kind::Dir => {}
            Some(_) => return Err(root.conflict("the step exists", step)),
        }
        let owner = owners.record(&root, step, attempt)?;
        let temp = names::temp(step, attempt);
        let made = root.mkdir(&temp).map_err(root.error("cannot create the attempt", &temp));
        let opened = made.and_then(|()| {
            let dir = root.enter(&temp).map_err(root.error("cannot open the attempt", &temp))?;
            let identity = dir.stat().map_err(root.error("cannot stat the attempt", &temp))?.identity;
            Ok((dir, identity))
        });
        let (dir, identity) = opened.inspect_err(|_| {
            // Best effort: a sweep does it otherwise. The record is deleted last.
            if root.unlink(&temp, Kind::Dir).is_ok() && durable::deleted(&root).is_ok() {
                let _ = owner.erase(&root);
            }
        })?;
        let (step, phase) = (step.to_owned(), Mutex::new(Phase::Open(owner)));
        Ok(Self { root, dir, step, temp, identity, direct, progress: Arc::default(), phase, owners })
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path_of(&self, file: &str) -> PathBuf {
        self.dir.path().join(file)
    }

    fn check_file(&self, file: &str) -> Result<()> {
        name::check_file(file).map_err(|error| error.with_kind(ErrorKind::Invalid).with_path(self.dir.path()))?;
        match *self.phase() {
            Phase::Open(_) => Ok(()),
            _ => Err(Error::invalid("the attempt is over").with_path(self.path_of(file))),
        }
    }

    fn write_small(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let (fd, bypass): (_, Bypass) =
            direct::create(&self.dir, file, false).map_err(self.dir.error("cannot create file", file))?;
        transfer::write_all(&fd, &bypass, bytes, 0).map_err(self.dir.error("cannot write file", file))?;
        durable::file(&fd).map_err(self.dir.error("cannot make file durable", file))
    }

    /// Publishes: fsyncs, rename, fsync of the root, without bookkeeping.
    fn rename_and_sync(&self, overwrite: bool) -> Result<()> {
        let files = || durable::attempt(&self.dir).map_err(self.dir.own_error("cannot make the attempt durable"));
        let rename = || publish::rename(&self.root, &self.temp, &self.step, self.identity, overwrite);
        if mutant::on(Mutant::PublishFirst) {
            rename()?;
            files()?;
        } else {
            files()?;
            rename()?;
        }
        durable::published(&self.root).map_err(|error| {
            let path = self.root.path().join(&self.step);
            Error::io("cannot make the publish durable", error).with_kind(ErrorKind::Indeterminate).with_path(path)
        })
    }
}

impl Writing for LocalAttempt {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        self.check_file(file)?;
        let made = LocalFile::create(&self.dir, file, len, self.direct, &self.progress);
        Ok(Arc::new(made.inspect_err(|_| self.progress.lose())?))
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.check_file(file)?;
        if bytes.len() >= WORTHWHILE && bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            let long = self.create(file, bytes.len() as u64)?;
            return long.write_at(0, bytes).and_then(|()| long.seal());
        }
        self.progress.begin_file();
        self.write_small(file, bytes).inspect_err(|_| self.progress.lose())?;
        self.progress.end_file();
        Ok(())
    }

    fn publish(&self, overwrite: bool) -> Result<()> {
        let mut phase = self.phase();
        if !matches!(*phase, Phase::Open(_)) {
            return Err(Error::invalid("an attempt is published once").with_path(self.dir.path()));
        }
        if let Some(obstacle) = self.progress.obstacle() {
            return Err(Error::invalid(obstacle).with_path(self.dir.path()));
        }
        let done = self.rename_and_sync(overwrite);
        if let Phase::Open(owner) = std::mem::replace(&mut *phase, Phase::Over) {
            *phase = match &done {
                Ok(()) => Phase::Published(owner),
                Err(error) if error.kind() == ErrorKind::Indeterminate => {
                    self.owners.keep(owner);
                    Phase::Unclear
                }
                Err(_) => {
                    self.progress.lose();
                    Phase::Open(owner)
                }
            };
        }
        done
    }

    fn settle(&self) -> Result<()> {
        let mut phase = self.phase();
        let Phase::Published(owner) = &*phase else {
            return Err(Error::invalid("only a published attempt is settled").with_path(self.dir.path()));
        };
        let displaced =
            self.root.look(&self.temp).map_err(self.root.error("cannot look for the displaced step", &self.temp))?;
        if displaced.is_some_and(|stat| stat.identity != self.identity) {
            trash::delete_attempt(&self.root, &self.temp)?;
        }
        owner.erase(&self.root)?;
        *phase = Phase::Over;
        Ok(())
    }

    fn abandon(&self) -> Result<()> {
        let mut phase = self.phase();
        match &*phase {
            Phase::Over => Ok(()),
            Phase::Published(_) => {
                Err(Error::invalid("a published attempt cannot be abandoned").with_path(self.dir.path()))
            }
            Phase::Unclear => {
                Err(Error::new(ErrorKind::Indeterminate, "an attempt that may be published is left alone")
                    .with_path(self.root.path().join(&self.step)))
            }
            Phase::Open(owner) => {
                trash::delete_attempt(&self.root, &self.temp)?;
                owner.erase(&self.root)?;
                *phase = Phase::Over;
                Ok(())
            }
        }
    }
}
