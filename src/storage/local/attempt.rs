//! An attempt: a hidden directory. One rename makes it the step.

use super::dir::Dir;
use super::direct::Bypass;
use super::file::LocalFile;
use super::owner::{Owner, Owners};
use super::progress::Progress;
use super::reading::LocalFileReading;
use super::sys::Kind;
use super::{adopt, direct, durable, names, publish, transfer, trash};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::memory::ALIGNMENT;
use crate::mutant::{self, Mutant};
use crate::storage::shared::{SharedWriting, Vetoed};
use crate::storage::{Adopted, FileReading, FileWriting, Writing, name};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Minimum size of whole files that are written like shards, with direct I/O. The manifest of many tensors
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

/// The directory of an attempt, and the files that this process creates in it.
#[derive(Debug)]
pub(super) struct AttemptFiles {
    pub(super) dir: Dir,
    pub(super) identity: (u64, u64),
    direct: bool,
    progress: Arc<Progress>,
}

impl AttemptFiles {
    /// Opens the attempt `temp` in `root`.
    pub(super) fn open(root: &Dir, temp: &str, direct: bool) -> Result<Self> {
        let dir = root.enter(temp).map_err(root.error("cannot open the attempt", temp))?;
        let identity = dir.stat().map_err(root.error("cannot stat the attempt", temp))?.identity;
        Ok(Self { dir, identity, direct, progress: Arc::default() })
    }

    fn check(&self, file: &str) -> Result<()> {
        name::check_file(file).map_err(|error| error.with_kind(ErrorKind::Invalid).with_path(self.dir.path()))
    }

    pub(super) fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        self.check(file)?;
        let made = LocalFile::create(&self.dir, file, len, self.direct, &self.progress);
        Ok(Arc::new(made.inspect_err(|_| self.progress.lose())?))
    }

    pub(super) fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.check(file)?;
        if bytes.len() >= WORTHWHILE && bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            let long = self.create(file, bytes.len() as u64)?;
            return long.write_at(0, bytes).and_then(|()| long.seal());
        }
        self.count(|| self.write_small(file, bytes))
    }

    pub(super) fn adopt(&self, file: &str, source: &dyn FileReading, head: &[u8]) -> Result<Adopted> {
        self.check(file)?;
        let Some(source) = source.as_any().and_then(|source| source.downcast_ref::<LocalFileReading>()) else {
            return Ok(Adopted::Refused("the source lies in a storage of another kind".into()));
        };
        let adopted = adopt::adopt(&self.dir, file, source, head).inspect_err(|_| self.progress.lose())?;
        if !matches!(adopted, Adopted::Refused(_)) {
            self.count(|| Ok(()))?;
        }
        Ok(adopted)
    }

    /// Counts a file that `make` writes whole.
    pub(super) fn count(&self, make: impl FnOnce() -> Result<()>) -> Result<()> {
        self.progress.begin_file();
        make().inspect_err(|_| self.progress.lose())?;
        self.progress.end_file();
        Ok(())
    }

    fn write_small(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let (fd, bypass): (_, Bypass) =
            direct::create(&self.dir, file, false).map_err(self.dir.error("cannot create file", file))?;
        transfer::write_all(&fd, &bypass, bytes, 0).map_err(self.dir.error("cannot write file", file))?;
        durable::file(&fd).map_err(self.dir.error("cannot make file durable", file))
    }

    /// Refuses to go on unless every file of this process is sealed. The process may have no file.
    pub(super) fn check_sealed(&self) -> Result<()> {
        let fault = self.progress.fault();
        fault.map_or(Ok(()), |why| Err(Error::invalid(why).with_path(self.dir.path())))
    }

    /// Makes the names of its files durable.
    pub(super) fn sync_names(&self) -> Result<()> {
        durable::attempt(&self.dir).map_err(self.dir.own_error("cannot make the attempt durable"))
    }

    /// Refuses to go on unless every file of this process is sealed.
    pub(super) fn check_whole(&self) -> Result<()> {
        let obstacle = self.progress.obstacle();
        obstacle.map_or(Ok(()), |why| Err(Error::invalid(why).with_path(self.dir.path())))
    }
}

/// Whether the directory `name` is empty, so that a publish replaces it without `overwrite`.
fn is_empty(root: &Dir, name: &str) -> Result<bool> {
    let names = root.enter(name).and_then(|dir| dir.list());
    Ok(names.map_err(root.error("cannot list the directory that is there", name))?.is_empty())
}

/// An attempt in a directory of its own.
#[derive(Debug)]
pub(super) struct LocalAttempt {
    /// Its own descriptor of the root, so that a failed fsync spoils only this attempt.
    root: Dir,
    pub(super) files: AttemptFiles,
    step: String,
    attempt: Attempt,
    phase: Mutex<Phase>,
    /// Rank 0 has claimed the attempt, which then has another hidden name.
    claimed: AtomicBool,
    /// Another process may take the attempt over and go on with it, although this process lives.
    resumable: bool,
    owners: Arc<Owners>,
}

impl LocalAttempt {
    /// Begins an attempt; `generation` is that of the session, if several ranks write it.
    pub(super) fn begin(
        root: Dir,
        step: &str,
        attempt: Attempt,
        overwrite: bool,
        direct: bool,
        owners: Arc<Owners>,
        generation: Option<u64>,
    ) -> Result<Self> {
        name::check_step(step)?;
        match root.look(step).map_err(root.error("cannot look for the step", step))? {
            None => {}
            Some(stat) if stat.kind == Kind::Dir && (overwrite || is_empty(&root, step)?) => {}
            Some(_) => return Err(root.conflict("the step exists", step)),
        }
        let owner = owners.record(&root, step, attempt, generation)?;
        let temp = names::temp(step, attempt);
        let made = root.mkdir(&temp).map_err(root.error("cannot create the attempt", &temp));
        let files = made.and_then(|()| AttemptFiles::open(&root, &temp, direct)).inspect_err(|_| {
            // Best effort: otherwise a sweep deletes the attempt. The record is deleted last.
            if root.unlink(&temp, Kind::Dir).is_ok() && durable::deleted(&root).is_ok() {
                let _ = owner.erase(&root);
            }
        })?;
        let (step, phase, claimed) = (step.to_owned(), Mutex::new(Phase::Open(owner)), AtomicBool::new(false));
        Ok(Self { root, files, step, attempt, phase, claimed, resumable: false, owners })
    }

    /// The attempt of a dead process, whose record this process has locked as `owner`.
    pub(super) fn taken_over(
        root: Dir,
        step: &str,
        attempt: Attempt,
        direct: bool,
        owners: Arc<Owners>,
        owner: Owner,
    ) -> Result<Self> {
        let files = AttemptFiles::open(&root, &names::temp(step, attempt), direct)?;
        let (step, phase, claimed) = (step.to_owned(), Mutex::new(Phase::Open(owner)), AtomicBool::new(false));
        Ok(Self { root, files, step, attempt, phase, claimed, resumable: true, owners })
    }

    /// Returns the attempt, which from then on checks that no other process has taken it over.
    pub(super) fn resumable(self) -> Self {
        Self { resumable: true, ..self }
    }

    /// Refuses to go on if another process has taken the attempt over, or if the attempt has ended.
    pub(super) fn check_owned(&self) -> Result<()> {
        self.owned(&self.phase(), "")
    }

    fn owned(&self, phase: &Phase, file: &str) -> Result<()> {
        match phase {
            Phase::Open(owner) if self.resumable => owner.check(&self.root),
            Phase::Open(_) => Ok(()),
            _ => Err(Error::invalid("the attempt is over").with_path(self.files.dir.path().join(file))),
        }
    }

    /// True if files are opened with O_DIRECT when possible.
    pub(super) fn direct(&self) -> bool {
        self.files.direct
    }

    /// The hidden name of the attempt. After an overwrite, the replaced step has this name.
    fn hidden(&self) -> String {
        let name = if self.claimed.load(Ordering::Acquire) { names::claimed } else { names::temp };
        name(&self.step, self.attempt)
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_open(&self, file: &str) -> Result<()> {
        self.owned(&self.phase(), file)
    }

    /// Publishes: fsyncs, rename, fsync of the root, without bookkeeping. `over`: the only step to replace.
    fn rename_and_sync(&self, overwrite: bool, over: Option<(u64, u64)>) -> Result<()> {
        // A claim has already made the names durable.
        let claimed = self.claimed.load(Ordering::Acquire);
        let files = || if claimed { Ok(()) } else { self.files.sync_names() };
        let (hidden, identity) = (self.hidden(), self.files.identity);
        let rename = || match over {
            Some(displaced) => publish::exchange(&self.root, &hidden, &self.step, identity, displaced),
            None => publish::rename(&self.root, &hidden, &self.step, identity, overwrite),
        };
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

    /// Publishes. With `over`, it replaces only the step that has this identity.
    pub(super) fn publish_over(&self, overwrite: bool, over: Option<(u64, u64)>) -> Result<()> {
        let mut phase = self.phase();
        if !matches!(*phase, Phase::Open(_)) {
            return Err(Error::invalid("an attempt is published once").with_path(self.files.dir.path()));
        }
        self.files.check_whole()?;
        self.owned(&phase, "")?;
        let done = self.rename_and_sync(overwrite, over);
        if let Phase::Open(owner) = std::mem::replace(&mut *phase, Phase::Over) {
            *phase = match &done {
                Ok(()) => Phase::Published(owner),
                Err(error) if error.kind() == ErrorKind::Indeterminate => {
                    self.owners.keep(owner);
                    Phase::Unclear
                }
                Err(_) => {
                    self.files.progress.lose();
                    Phase::Open(owner)
                }
            };
        }
        done
    }
}

impl Writing for LocalAttempt {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        self.check_open(file)?;
        self.files.create(file, len)
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.check_open(file)?;
        self.files.put(file, bytes)
    }

    fn adopt(&self, file: &str, source: &dyn FileReading, head: &[u8]) -> Result<Adopted> {
        self.check_open(file)?;
        self.files.adopt(file, source, head)
    }

    fn publish(&self, overwrite: bool) -> Result<()> {
        self.publish_over(overwrite, None)
    }

    fn settle(&self) -> Result<()> {
        let mut phase = self.phase();
        let Phase::Published(owner) = &*phase else {
            return Err(Error::invalid("only a published attempt is settled").with_path(self.files.dir.path()));
        };
        let hidden = self.hidden();
        let displaced =
            self.root.look(&hidden).map_err(self.root.error("cannot look for the displaced step", &hidden))?;
        if displaced.is_some_and(|stat| stat.identity != self.files.identity) {
            trash::delete_attempt(&self.root, &hidden)?;
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
                Err(Error::invalid("a published attempt cannot be abandoned").with_path(self.files.dir.path()))
            }
            Phase::Unclear => {
                Err(Error::new(ErrorKind::Indeterminate, "an attempt that may be published is left alone")
                    .with_path(self.root.path().join(&self.step)))
            }
            Phase::Open(owner) => {
                trash::delete_attempt(&self.root, &self.hidden())?;
                owner.erase(&self.root)?;
                *phase = Phase::Over;
                Ok(())
            }
        }
    }
}

impl SharedWriting for LocalAttempt {
    fn sync_names(&self) -> Result<()> {
        self.files.check_sealed()?;
        self.files.sync_names()
    }

    fn claim(&self) -> Result<()> {
        let phase = self.phase();
        if !matches!(*phase, Phase::Open(_)) || self.claimed.load(Ordering::Acquire) {
            return Err(Error::invalid("an attempt is claimed once").with_path(self.files.dir.path()));
        }
        self.files.check_whole()?;
        self.files.sync_names()?;
        publish::claim(&self.root, &self.step, self.attempt, self.files.identity)?;
        self.claimed.store(true, Ordering::Release);
        Ok(())
    }

    fn veto(&self) -> Result<Vetoed> {
        publish::veto(&self.root, &self.step, self.attempt)
    }
}
