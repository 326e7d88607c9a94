//! The system call interface: every kernel call of the local storage.
//!
//! Production runs on [`Linux`](super::linux::Linux). Tests put a simulated file system here, *below* the
//! code that decides what to fsync, so that they test the production code.

use crate::fork::ForkGuard;
use crate::memory::Pages;
use std::any::Any;
use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// A descriptor, owned by the [`Fd`] that wraps it.
pub type RawFd = i32;

/// Mode of an open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "testing", derive(serde::Serialize, serde::Deserialize))]
pub enum Open {
    /// An existing directory. Symbolic links in the last component are not followed.
    Dir,
    /// An existing file, to read; direct when the flag is set. Symbolic links in the last component are not
    /// followed.
    Read {
        /// With O_DIRECT.
        direct: bool,
    },
    /// An existing file, to read and write. Symbolic links in the last component are not followed.
    Update,
    /// A new file, to read and write; it is an error if it exists.
    Create {
        /// With O_DIRECT.
        direct: bool,
    },
}

/// The file type of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "testing", derive(serde::Serialize, serde::Deserialize))]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// A link, a device, or another type that is never followed.
    Other,
}

/// Metadata of an open file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Stat {
    /// Its file type.
    pub kind: Kind,
    /// Its length in bytes.
    pub len: u64,
    /// Device and inode, equal for two descriptors of the same file.
    pub identity: (u64, u64),
    /// The number of names; zero after the last name is removed.
    pub links: u64,
    /// When it was last modified, since 1970, by the clock of the file system.
    pub modified: Duration,
}

/// How a rename treats its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "testing", derive(serde::Serialize, serde::Deserialize))]
pub enum Rename {
    /// rename(2).
    Plain,
    /// RENAME_NOREPLACE.
    NoReplace,
    /// RENAME_EXCHANGE.
    Exchange,
}

/// The alignment that direct I/O requires on a file, and whether it is honoured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Direct {
    /// Alignment of memory addresses.
    pub memory: u32,
    /// Alignment of offsets and lengths.
    pub offset: u32,
    /// False if the file system accepts O_DIRECT but still uses the page cache.
    pub honoured: bool,
}

/// The system calls. Relative paths start at the descriptor `dir`; None stands for the current directory.
pub trait Sys: Send + Sync + Debug {
    /// openat(2), always with O_CLOEXEC and, for the last component, O_NOFOLLOW (a root directory given by
    /// the user is opened with `follow`).
    fn open(&self, dir: Option<RawFd>, path: &Path, how: Open, follow: bool) -> io::Result<RawFd>;
    /// close(2).
    fn close(&self, fd: RawFd);
    /// mkdirat(2).
    fn mkdir(&self, dir: Option<RawFd>, path: &Path) -> io::Result<()>;
    /// pwrite(2): may write less than requested.
    fn pwrite(&self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize>;
    /// pread(2): may read less than requested; 0 at the end.
    fn pread(&self, fd: RawFd, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// fsync(2), of a file or of a directory.
    fn fsync(&self, fd: RawFd) -> io::Result<()>;
    /// fallocate(2) of `0..len`, which also sets the file length. Never the emulation that writes zeros.
    fn fallocate(&self, fd: RawFd, len: u64) -> io::Result<()>;
    /// ftruncate(2).
    fn ftruncate(&self, fd: RawFd, len: u64) -> io::Result<()>;
    /// renameat2(2) within one directory.
    fn rename(&self, dir: RawFd, from: &Path, to: &Path, how: Rename) -> io::Result<()>;
    /// linkat(2): another name for the open `file`. ENOENT after its last name was removed; EOPNOTSUPP if a
    /// link may copy the file.
    fn link(&self, file: RawFd, dir: RawFd, name: &Path) -> io::Result<()>;
    /// ioctl(2) FICLONE: the empty file `to` gets the length of `from`, and shares its blocks.
    fn clone_file(&self, from: RawFd, to: RawFd) -> io::Result<()>;
    /// fchmod(2): removes the permissions to write, and adds none.
    fn protect(&self, fd: RawFd) -> io::Result<()>;
    /// unlinkat(2), with AT_REMOVEDIR for directories.
    fn unlink(&self, dir: RawFd, name: &Path, kind: Kind) -> io::Result<()>;
    /// fstat(2).
    fn stat(&self, fd: RawFd) -> io::Result<Stat>;
    /// fstatat(2) without following links.
    fn stat_at(&self, dir: RawFd, name: &Path) -> io::Result<Stat>;
    /// utimensat(2) with UTIME_NOW: the time is the file system's, not one that this process read.
    fn touch(&self, fd: RawFd) -> io::Result<()>;
    /// The present path of the directory, which may differ from the path that opened it; None if unknown.
    fn path_of(&self, _dir: RawFd) -> Option<PathBuf> {
        None
    }
    /// getdents(2), without `.` and `..`.
    fn list(&self, dir: RawFd) -> io::Result<Vec<OsString>>;
    /// flock(2), exclusive and non-blocking; false when another descriptor has the lock.
    fn try_lock(&self, fd: RawFd) -> io::Result<bool>;
    /// statx(2) DIOALIGN and statfs(2).
    fn direct(&self, fd: RawFd) -> io::Result<Direct>;
    /// posix_fadvise(2) with POSIX_FADV_DONTNEED on a whole file. The default, for systems without a page
    /// cache, does nothing.
    fn drop_cached(&self, _fd: RawFd) {}
    /// fcntl(2): removes O_DIRECT from an open file. The default, for systems that never refuse a direct
    /// transfer, does nothing.
    fn buffered(&self, _fd: RawFd) -> io::Result<()> {
        Ok(())
    }
    /// Registers memory that files will be written from, until the returned value is dropped: before the
    /// memory is unmapped, and while nothing is written from it. The default does nothing.
    fn register(&self, _pages: Pages<'_>) -> Box<dyn Any + Send + Sync> {
        Box::new(())
    }
    /// The name of the engine that writes, for reports.
    fn engine(&self) -> &'static str {
        "pwrite"
    }
}

/// A descriptor that closes on drop, except in a forked child, where it belongs to the parent.
#[derive(Debug)]
pub struct Fd {
    sys: Arc<dyn Sys>,
    raw: RawFd,
    origin: ForkGuard,
    spent: AtomicBool,
}

impl Fd {
    /// Opens `path` relative to `dir`.
    pub fn open(sys: &Arc<dyn Sys>, dir: Option<&Fd>, path: &Path, how: Open, follow: bool) -> io::Result<Self> {
        let raw = uninterrupted(|| sys.open(dir.map(Fd::raw), path, how, follow))?;
        Ok(Self { sys: sys.clone(), raw, origin: ForkGuard::new(), spent: AtomicBool::new(false) })
    }

    /// The descriptor.
    pub fn raw(&self) -> RawFd {
        self.raw
    }

    /// The system calls that the descriptor belongs to.
    pub fn sys(&self) -> &Arc<dyn Sys> {
        &self.sys
    }

    /// Returns true if this process opened the descriptor. In a forked child the number may belong to another
    /// file, or to none.
    pub(super) fn is_ours(&self) -> bool {
        self.origin.is_ours()
    }

    /// fsync(2), which fails forever after its first failure: the kernel reports an error once and drops the
    /// data, so a later `Ok` would mean nothing. Only `durable` calls it.
    pub(super) fn fsync(&self) -> io::Result<()> {
        if self.spent.load(Ordering::Acquire) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.sys.fsync(self.raw).inspect_err(|_| self.spent.store(true, Ordering::Release))
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        if self.is_ours() {
            self.sys.close(self.raw);
        }
    }
}

/// Repeats a call that a signal interrupted. Not for fsync, and not for a rename, which must happen only
/// once.
pub(super) fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
