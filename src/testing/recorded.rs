//! Records the system calls that change a file system. A test then compares the contents of a disk with the
//! prediction of the simulated file system.

use crate::memory::Pages;
use crate::storage::local::sys::{Direct, Kind, Open, RawFd, Rename, Stat, Sys};
use serde::{Deserialize, Serialize};
use std::any::Any;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A call that succeeded.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Done {
    Open { dir: Option<RawFd>, path: PathBuf, how: Open, fd: RawFd },
    Close { fd: RawFd },
    Mkdir { dir: Option<RawFd>, path: PathBuf },
    Write { fd: RawFd, bytes: Vec<u8>, offset: u64 },
    Fsync { fd: RawFd },
    Resize { fd: RawFd, len: u64, shrink: bool },
    Rename { dir: RawFd, from: PathBuf, to: PathBuf, how: Rename },
    Unlink { dir: RawFd, name: PathBuf, kind: Kind },
    Link { file: RawFd, dir: RawFd, name: PathBuf },
    Clone { from: RawFd, to: RawFd },
}

/// A call, and the length of the disk's log before and after it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub(super) process: u32,
    pub(super) began: u64,
    pub(super) ended: u64,
    pub(super) done: Done,
}

impl Record {
    /// Reads a file that one or more instances of [`Recorded`] have written.
    ///
    /// # Errors
    /// `InvalidData` if the file does not hold records.
    pub fn read(file: &Path) -> io::Result<Vec<Self>> {
        let bytes = std::fs::read(file)?;
        let (mut rest, mut records) = (&bytes[..], Vec::new());
        while !rest.is_empty() {
            let (record, after) = postcard::take_from_bytes(rest).map_err(invalid)?;
            records.push(record);
            rest = after;
        }
        Ok(records)
    }
}

/// A [`Sys`] that records the calls of another one, in order. Only one call at a time runs among all
/// processes that write to the same file.
#[derive(Debug)]
pub struct Recorded {
    inner: Arc<dyn Sys>,
    file: Mutex<File>,
    disk: PathBuf,
}

impl Recorded {
    /// Records the calls that `inner` makes at the end of `file`. `disk` is the log of the disk. The disk's
    /// driver appends every write to it before it answers.
    ///
    /// # Errors
    /// The errors of opening `file`.
    pub fn new(inner: Arc<dyn Sys>, file: &Path, disk: &Path) -> io::Result<Self> {
        let file = File::options().append(true).create(true).open(file)?;
        Ok(Self { inner, file: Mutex::new(file), disk: disk.to_owned() })
    }

    fn record<T>(&self, call: impl FnOnce() -> io::Result<T>, done: impl FnOnce(&T) -> Done) -> io::Result<T> {
        let file: MutexGuard<'_, File> = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // The lock of the file orders processes; the mutex orders the threads of this process.
        file.lock()?;
        let position = || self.disk.metadata().map(|disk| disk.len());
        let began = position()?;
        let result = call();
        let written = result.as_ref().map_or(Ok(()), |result| {
            let record = Record { process: std::process::id(), began, ended: position()?, done: done(result) };
            (&*file).write_all(&postcard::to_allocvec(&record).map_err(invalid)?)
        });
        file.unlock()?;
        // A record with a gap would make the file system look faulty.
        written.expect("the record of system calls is written");
        result
    }
}

fn invalid(error: postcard::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Sys for Recorded {
    fn open(&self, dir: Option<RawFd>, path: &Path, how: Open, follow: bool) -> io::Result<RawFd> {
        let done = |fd: &RawFd| Done::Open { dir, path: path.to_owned(), how, fd: *fd };
        self.record(|| self.inner.open(dir, path, how, follow), done)
    }

    fn close(&self, fd: RawFd) {
        let close = || {
            self.inner.close(fd);
            Ok(())
        };
        self.record(close, |()| Done::Close { fd }).expect("the record of system calls can be locked");
    }

    fn mkdir(&self, dir: Option<RawFd>, path: &Path) -> io::Result<()> {
        self.record(|| self.inner.mkdir(dir, path), |()| Done::Mkdir { dir, path: path.to_owned() })
    }

    fn pwrite(&self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let done = |len: &usize| Done::Write { fd, bytes: bytes[..*len].to_vec(), offset };
        self.record(|| self.inner.pwrite(fd, bytes, offset), done)
    }

    fn fsync(&self, fd: RawFd) -> io::Result<()> {
        self.record(|| self.inner.fsync(fd), |()| Done::Fsync { fd })
    }

    fn fallocate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        self.record(|| self.inner.fallocate(fd, len), |()| Done::Resize { fd, len, shrink: false })
    }

    fn ftruncate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        self.record(|| self.inner.ftruncate(fd, len), |()| Done::Resize { fd, len, shrink: true })
    }

    fn rename(&self, dir: RawFd, from: &Path, to: &Path, how: Rename) -> io::Result<()> {
        let done = |(): &()| Done::Rename { dir, from: from.to_owned(), to: to.to_owned(), how };
        self.record(|| self.inner.rename(dir, from, to, how), done)
    }

    fn unlink(&self, dir: RawFd, name: &Path, kind: Kind) -> io::Result<()> {
        self.record(|| self.inner.unlink(dir, name, kind), |()| Done::Unlink { dir, name: name.to_owned(), kind })
    }

    fn link(&self, file: RawFd, dir: RawFd, name: &Path) -> io::Result<()> {
        let done = |(): &()| Done::Link { file, dir, name: name.to_owned() };
        self.record(|| self.inner.link(file, dir, name), done)
    }

    fn clone_file(&self, from: RawFd, to: RawFd) -> io::Result<()> {
        self.record(|| self.inner.clone_file(from, to), |()| Done::Clone { from, to })
    }

    // Permissions are not compared.
    fn protect(&self, fd: RawFd) -> io::Result<()> {
        self.inner.protect(fd)
    }

    fn pread(&self, fd: RawFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.pread(fd, buffer, offset)
    }

    fn stat(&self, fd: RawFd) -> io::Result<Stat> {
        self.inner.stat(fd)
    }

    fn stat_at(&self, dir: RawFd, name: &Path) -> io::Result<Stat> {
        self.inner.stat_at(dir, name)
    }

    fn touch(&self, fd: RawFd) -> io::Result<()> {
        self.inner.touch(fd)
    }

    fn path_of(&self, dir: RawFd) -> Option<PathBuf> {
        self.inner.path_of(dir)
    }

    fn list(&self, dir: RawFd) -> io::Result<Vec<OsString>> {
        self.inner.list(dir)
    }

    fn try_lock(&self, fd: RawFd) -> io::Result<bool> {
        self.inner.try_lock(fd)
    }

    fn direct(&self, fd: RawFd) -> io::Result<Direct> {
        self.inner.direct(fd)
    }

    fn buffered(&self, fd: RawFd) -> io::Result<()> {
        self.inner.buffered(fd)
    }

    fn register(&self, pages: Pages<'_>) -> Box<dyn Any + Send + Sync> {
        self.inner.register(pages)
    }

    fn engine(&self) -> &'static str {
        self.inner.engine()
    }
}
