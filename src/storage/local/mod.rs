//! Storage in a directory of a local or mounted file system.
//!
//! **Names.** `names` lists the entries of a root. A step is a plain directory that holds the checkpoint and
//! nothing else; an attempt is a hidden directory, with the record of its owner beside it. **Consistency.** A
//! step appears by one rename and never changes. A reader opens its directory once and every file through
//! that descriptor, so it sees one attempt, even if the step is replaced or removed. **Completion.** Files
//! are fsynced first, then the attempt's directory, then comes the rename, then the fsync of the root. Each
//! fsync succeeds before the next of these begins. Only `durable` calls fsync. A failed fsync loses the
//! attempt; an fsync that fails after the rename is `Indeterminate`. **Crash.** A sweep deletes an attempt
//! whose owner is dead, once it is durable that the attempt does not have the name of a step. A removed step
//! first gets a hidden name, durably, so a crash never brings back a step with missing files. If no lock can
//! decide, as for an attempt of another host, the sweep deletes the attempt when it has not changed for long
//! enough, and reports it until then. **Cancellation.** [`Writing::abandon`] deletes the attempt; a sweep
//! deletes an attempt that was dropped. **Fork.** A child never closes, unlocks, touches or deletes anything
//! that its parent has open. To begin an attempt or to sweep, it opens its own storage.
//!
//! Modules from the system calls up: `sys` (the system call interface), `linux`, `dir`, `transfer`, `direct`,
//! `durable`; then `owner`, `clock`, `judge`, `file`, `marks`, `trash`, `publish`, `reading`; then `adopt`,
//! `attempt`, `sweep`, `root`, `shared`; then [`Local`] and `resume`.

mod adopt;
mod attempt;
mod clock;
mod dir;
mod direct;
mod durable;
mod file;
mod judge;
mod linux;
mod marks;
mod names;
mod owner;
mod progress;
mod publish;
mod reading;
mod resume;
mod root;
mod shared;
mod sweep;
#[doc(hidden)]
pub mod sys;
mod transfer;
mod trash;
#[cfg(feature = "uring")]
mod uring;

#[doc(hidden)]
pub use linux::Linux;
#[doc(hidden)]
pub use resume::Resumable;
#[cfg(feature = "uring")]
#[doc(hidden)]
pub use uring::Uring;

use crate::error::{Error, ErrorKind, Result};
use crate::id::{Attempt, parse_step_name, parse_version_name};
use crate::memory::Pages;
use crate::settings::{Engine, Locks};
use crate::storage::shared::Shared;
use crate::storage::{Reading, Storage, Sweep, Swept, Writing, name as rules};
use attempt::LocalAttempt;
use dir::Dir;
use direct::Bypass;
use owner::Owners;
use reading::LocalReading;
use shared::LocalShared;
use std::any::Any;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use sys::{Kind, Open, Rename, Sys};

/// Storage of steps in a directory.
///
/// ```
/// use ashore::storage::{Storage, Sweep, local::Local};
/// use ashore::{CheckpointExecutor, Locks};
/// use std::sync::Arc;
/// # let root = tempfile::tempdir().unwrap();
/// let storage = Arc::new(Local::open(root.path())?.locks(Locks::Flock));
/// let left = storage.sweep(Sweep::default().dry_run())?; // what dead processes have left
/// assert!(left.removed.is_empty());
/// let builder = CheckpointExecutor::builder(root.path()).storage(storage);
/// let executor = builder.arena(16 << 20).chunk(1 << 20).build()?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct Local {
    /// Read only. A caller that fsyncs opens the root again, because a failed fsync is final for a
    /// descriptor.
    root: Dir,
    direct: bool,
    owners: Arc<Owners>,
}

impl Local {
    /// Opens the root at `path`, and creates it if it is missing.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::with_sys(Arc::new(Linux), path)
    }

    /// Opens the root at `path`, and creates it if it is missing. `engine` writes files; if it is not
    /// available, pwrite(2) does.
    pub fn open_with(path: impl AsRef<Path>, engine: Engine) -> Result<Self> {
        Self::with_sys(system(engine), path)
    }

    /// Opens the root at `path` for reading. Creates nothing.
    ///
    /// # Errors
    /// `NotFound` when the root does not exist.
    pub fn at(path: impl AsRef<Path>) -> Result<Self> {
        Self::at_with_sys(Arc::new(Linux), path)
    }

    /// [`Self::open`] on other system calls.
    #[doc(hidden)]
    pub fn with_sys(sys: Arc<dyn Sys>, path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::over(root::make(&sys, path.as_ref())?))
    }

    /// [`Self::at`] on other system calls.
    #[doc(hidden)]
    pub fn at_with_sys(sys: Arc<dyn Sys>, path: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::over(root::find(&sys, path.as_ref())?))
    }

    fn over(root: Dir) -> Self {
        Self { root, direct: true, owners: Arc::new(Owners::new(Locks::Flock)) }
    }

    /// Sets whether files are opened with O_DIRECT where possible: true by default.
    #[must_use]
    pub fn direct(mut self, direct: bool) -> Self {
        self.direct = direct;
        self
    }

    /// Sets how owner records are locked: flock(2) by default.
    #[must_use]
    pub fn locks(mut self, locks: Locks) -> Self {
        self.owners = Arc::new(Owners::new(locks));
        self
    }

    /// Refuses to act after a fork: the attempts are the parent's, and their descriptors are closed.
    fn alive(&self) -> Result<()> {
        if self.root.fd().is_ours() {
            return Ok(());
        }
        Err(Error::invalid("a storage cannot write in a forked child; open a new one there")
            .with_path(self.root.path()))
    }

    /// The present path of the root.
    pub(crate) fn path(&self) -> PathBuf {
        self.root.present_path()
    }

    fn not_found(&self, step: &str) -> Error {
        Error::new(ErrorKind::NotFound, "no such step").with_path(self.root.path().join(step))
    }
}

impl Local {
    /// Removes the step `name`, if its identity is `wanted` or `wanted` is None.
    fn discard(&self, name: &str, wanted: Option<(u64, u64)>) -> Result<()> {
        self.alive()?;
        rules::check_step(name)?;
        let root = self.root.afresh()?;
        let dir = root.enter(name).map_err(root.error("cannot open the step", name))?;
        for file in dir.list().map_err(dir.own_error("cannot list"))? {
            if dir.look(&file).map_err(dir.error("cannot look at", &file))?.is_some_and(|stat| stat.kind == Kind::Dir) {
                let message = "the step holds a directory that no checkpoint has; nothing was removed";
                return Err(Error::invalid(message).with_path(dir.path().join(file)));
            }
        }
        let there = dir.stat().map_err(dir.own_error("cannot stat"))?.identity;
        if wanted.is_some_and(|wanted| wanted != there) {
            return Err(root.conflict("the step was replaced meanwhile; it was not removed", name));
        }
        trash::discard(&root, name, &names::trash(Attempt::new()), there)
    }
}

/// The system calls of `engine`.
fn system(engine: Engine) -> Arc<dyn Sys> {
    match engine {
        #[cfg(feature = "uring")]
        Engine::Uring => match Uring::probe() {
            Ok(uring) => return Arc::new(uring),
            Err(error) => tracing::warn!(
                error = format_args!("{error:#}"),
                "io_uring is not available: files are written by pwrite"
            ),
        },
        #[cfg(not(feature = "uring"))]
        Engine::Uring => tracing::warn!("built without the feature `uring`: files are written by pwrite"),
        Engine::Auto | Engine::Pwrite => {}
    }
    Arc::new(Linux)
}

impl Storage for Local {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        self.alive()?;
        let root = self.root.afresh()?;
        Ok(Arc::new(LocalAttempt::begin(root, name, attempt, overwrite, self.direct, self.owners.clone(), None)?))
    }

    fn elsewhere(&self, parent: &Path, create: bool) -> Result<Arc<dyn Storage>> {
        self.alive()?;
        let open = if create { root::make } else { root::find };
        let root = open(self.root.fd().sys(), parent)?;
        Ok(Arc::new(Self { root, direct: self.direct, owners: self.owners.clone() }))
    }

    fn adopts(&self) -> bool {
        true
    }

    fn shared(&self) -> Option<Arc<dyn Shared>> {
        let root = self.root.afresh().ok()?;
        Some(Arc::new(LocalShared::new(root, self.direct, self.owners.clone())))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        Ok(Arc::new(LocalReading::open(&self.root, name, self.direct)?))
    }

    fn list(&self) -> Result<Vec<String>> {
        let mut steps = Vec::new();
        for name in self.root.list().map_err(self.root.own_error("cannot list"))? {
            let is_ours = |name: &&str| parse_step_name(name).is_some() || parse_version_name(name).is_some();
            let Some(name) = name.to_str().filter(is_ours) else { continue };
            let stat = self.root.look(name).map_err(self.root.error("cannot look at", name))?;
            if stat.is_some_and(|stat| stat.kind == Kind::Dir) {
                steps.push(name.to_owned());
            }
        }
        Ok(steps)
    }

    fn confirm(&self, name: &str) -> Result<()> {
        rules::check_step(name)?;
        let root = self.root.afresh()?;
        let dir = root.enter(name).map_err(root.error("cannot open the step", name))?;
        let failed = "cannot make the step durable";
        for file in dir.list().map_err(dir.own_error("cannot list"))? {
            let file =
                file.to_str().ok_or_else(|| Error::corrupt("a file name that is not text").with_path(dir.path()))?;
            if dir.look(file).map_err(dir.error(failed, file))?.is_some_and(|stat| stat.kind == Kind::File) {
                let opened = dir.open(file, Open::Read { direct: false });
                opened.and_then(|fd| durable::confirmed(&fd)).map_err(dir.error(failed, file))?;
            }
        }
        durable::confirmed(dir.fd()).map_err(dir.own_error(failed))?;
        durable::confirmed(root.fd()).map_err(root.own_error(failed))?;
        let confirmed = dir.stat().map_err(dir.own_error(failed))?.identity;
        match root.look(name).map_err(root.error(failed, name))? {
            Some(stat) if stat.identity == confirmed => Ok(()),
            Some(_) => Err(root.conflict("the step was replaced meanwhile", name)),
            None => Err(self.not_found(name)),
        }
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.discard(name, None)
    }

    fn remove_opened(&self, name: &str, opened: &dyn Reading) -> Result<()> {
        let unknown = || Error::internal("a step that another storage has opened is to be removed");
        self.discard(name, Some(opened.identity().ok_or_else(unknown)?))
    }

    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.alive()?;
        sweep::sweep(&self.root.afresh()?, how)
    }

    fn touch(&self) -> Result<()> {
        self.alive()?;
        self.owners.touch().map_err(self.root.own_error("cannot touch the owner records of live attempts"))
    }

    fn hint(&self, name: &str) -> Result<()> {
        self.alive()?;
        rules::check_step(name)?;
        let failed = |error| self.root.error("cannot write the hint", rules::LATEST)(error);
        // A dead process may have left this file, or another process may be writing it. It does not matter
        // which hint wins.
        self.root.unlink(names::LATEST_NEW, Kind::File).map_err(failed)?;
        let lost = |error: &io::Error| matches!(error.raw_os_error(), Some(libc::EEXIST | libc::ENOENT));
        let (fd, bypass): (_, Bypass) = match direct::create(&self.root, names::LATEST_NEW, false) {
            Err(error) if lost(&error) => return Ok(()),
            created => created.map_err(failed)?,
        };
        transfer::write_all(&fd, &bypass, format!("{name}\n").as_bytes(), 0).map_err(failed)?;
        match self.root.rename(names::LATEST_NEW, rules::LATEST, Rename::Plain) {
            Err(error) if lost(&error) => Ok(()),
            renamed => renamed.map_err(failed),
        }
    }

    fn read_marks(&self) -> Result<Option<Vec<u8>>> {
        marks::read(&self.root)
    }

    fn write_marks(&self, marks: &[u8]) -> Result<()> {
        self.alive()?;
        marks::write(&self.root.afresh()?, marks)
    }

    fn register(&self, pages: Pages<'_>) -> Box<dyn Any + Send + Sync> {
        self.root.fd().sys().register(pages)
    }

    fn directory(&self) -> Option<PathBuf> {
        // `path_of` returns None if the system calls are simulated.
        self.root.fd().sys().path_of(self.root.fd().raw())
    }

    fn engine(&self) -> &'static str {
        self.root.fd().sys().engine()
    }

    fn describe(&self, name: &str) -> PathBuf {
        self.root.present_path().join(name)
    }
}
