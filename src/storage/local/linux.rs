//! The system calls of Linux.
//!
//! # Safety argument
//! Every [`RawFd`] passed to this file comes from its [`Sys::open`] and is owned by one
//! [`Fd`](super::sys::Fd), which calls [`Sys::close`] once, when nothing can use it any more. So borrowing
//! the descriptor for the length of a call is sound.
#![expect(unsafe_code, reason = "raw descriptors are borrowed for one call each")]

use super::sys::{Direct, Kind, Open, RawFd, Rename, Stat, Sys};
use crate::fork;
use crate::memory::ALIGNMENT;
use rustix::fs::{
    AtFlags, FallocateFlags, FileType, FlockOperation, IFlags, Mode, OFlags, RenameFlags, StatxFlags, Timespec,
    Timestamps, UTIME_NOW,
};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{BorrowedFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Magic numbers of file systems that accept O_DIRECT and still use the page cache.
const BTRFS: u64 = 0x9123_683e;
const TMPFS: u64 = 0x0102_1994;

/// The magic number of overlayfs.
const OVERLAY: u64 = 0x794c_7630;

/// The system calls of the running kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Linux;

fn borrow<'fd>(fd: RawFd) -> BorrowedFd<'fd> {
    // SAFETY: the descriptor stays open during the call that borrows it (see the safety argument).
    unsafe { BorrowedFd::borrow_raw(fd) }
}

fn at<'fd>(dir: Option<RawFd>) -> BorrowedFd<'fd> {
    dir.map_or(rustix::fs::CWD, borrow)
}

fn stat_of(stat: &rustix::fs::Stat) -> Stat {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Dir,
        _ => Kind::Other,
    };
    #[allow(clippy::useless_conversion, reason = "the widths differ between architectures")]
    Stat {
        kind,
        len: u64::try_from(stat.st_size).unwrap_or(0),
        identity: (stat.st_dev.into(), stat.st_ino.into()),
        links: stat.st_nlink.into(),
        // A time before 1970 counts as 1970.
        modified: u64::try_from(stat.st_mtime)
            .map_or(Duration::ZERO, |seconds| Duration::new(seconds, u32::try_from(stat.st_mtime_nsec).unwrap_or(0))),
    }
}

impl Sys for Linux {
    fn open(&self, dir: Option<RawFd>, path: &Path, how: Open, follow: bool) -> io::Result<RawFd> {
        let direct = |on: bool| if on { OFlags::DIRECT } else { OFlags::empty() };
        let mut flags = OFlags::CLOEXEC
            | match how {
                Open::Dir => OFlags::RDONLY | OFlags::DIRECTORY,
                // NONBLOCK: if a pipe is in the place of the file, opening it must not wait for its writer.
                Open::Read { direct: on } => OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | direct(on),
                Open::Update => OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY,
                Open::Create { direct: on } => OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | direct(on),
            };
        flags.set(OFlags::NOFOLLOW, !follow);
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
        Ok(rustix::fs::openat(at(dir), path, flags, mode)?.into_raw_fd())
    }

    fn close(&self, fd: RawFd) {
        if fork::is_registered(fd) {
            // A child that was forked meanwhile has a copy of the descriptor. Unlocking, unlike closing,
            // releases the lock of all copies.
            let _ = rustix::fs::flock(borrow(fd), FlockOperation::Unlock);
            fork::unregister(fd);
        }
        // SAFETY: the owner gives up the descriptor with this call.
        unsafe { rustix::io::close(fd) };
    }

    fn mkdir(&self, dir: Option<RawFd>, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(at(dir), path, Mode::RWXU | Mode::RWXG | Mode::RWXO)?)
    }

    fn pwrite(&self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pwrite(borrow(fd), bytes, offset)?)
    }

    fn pread(&self, fd: RawFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        Ok(rustix::io::pread(borrow(fd), buffer, offset)?)
    }

    fn fsync(&self, fd: RawFd) -> io::Result<()> {
        Ok(rustix::fs::fsync(borrow(fd))?)
    }

    fn fallocate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(borrow(fd), FallocateFlags::empty(), 0, len)?)
    }

    fn ftruncate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        Ok(rustix::fs::ftruncate(borrow(fd), len)?)
    }

    fn rename(&self, dir: RawFd, from: &Path, to: &Path, how: Rename) -> io::Result<()> {
        let dir = borrow(dir);
        let flags = match how {
            // renameat(2), for kernels and file systems that have no flags.
            Rename::Plain => return Ok(rustix::fs::renameat(dir, from, dir, to)?),
            Rename::NoReplace => RenameFlags::NOREPLACE,
            Rename::Exchange => RenameFlags::EXCHANGE,
        };
        Ok(rustix::fs::renameat_with(dir, from, dir, to, flags)?)
    }

    fn link(&self, file: RawFd, dir: RawFd, name: &Path) -> io::Result<()> {
        // A link to a file of a lower layer copies the file to the upper layer, and no call tells which files
        // are in a lower layer.
        if rustix::fs::fstatfs(borrow(dir))?.f_type as u64 & 0xffff_ffff == OVERLAY {
            return Err(Errno::OPNOTSUPP.into());
        }
        let path = format!("/proc/self/fd/{file}");
        match rustix::fs::linkat(rustix::fs::CWD, path, borrow(dir), name, AtFlags::SYMLINK_FOLLOW) {
            // The way without /proc, which needs a privilege on older kernels.
            Err(Errno::NOENT) => Ok(rustix::fs::linkat(borrow(file), "", borrow(dir), name, AtFlags::EMPTY_PATH)?),
            linked => Ok(linked?),
        }
    }

    fn clone_file(&self, from: RawFd, to: RawFd) -> io::Result<()> {
        Ok(rustix::fs::ioctl_ficlone(borrow(to), borrow(from))?)
    }

    fn protect(&self, fd: RawFd) -> io::Result<()> {
        let mode = Mode::from_raw_mode(rustix::fs::fstat(borrow(fd))?.st_mode);
        let kept = mode - (Mode::WUSR | Mode::WGRP | Mode::WOTH);
        if kept == mode { Ok(()) } else { Ok(rustix::fs::fchmod(borrow(fd), kept)?) }
    }

    fn unlink(&self, dir: RawFd, name: &Path, kind: Kind) -> io::Result<()> {
        let flags = if kind == Kind::Dir { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        Ok(rustix::fs::unlinkat(borrow(dir), name, flags)?)
    }

    fn stat(&self, fd: RawFd) -> io::Result<Stat> {
        Ok(stat_of(&rustix::fs::fstat(borrow(fd))?))
    }

    fn stat_at(&self, dir: RawFd, name: &Path) -> io::Result<Stat> {
        Ok(stat_of(&rustix::fs::statat(borrow(dir), name, AtFlags::SYMLINK_NOFOLLOW)?))
    }

    fn touch(&self, fd: RawFd) -> io::Result<()> {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        Ok(rustix::fs::futimens(borrow(fd), &Timestamps { last_access: now, last_modification: now })?)
    }

    fn path_of(&self, dir: RawFd) -> Option<PathBuf> {
        std::fs::read_link(format!("/proc/self/fd/{dir}")).ok()
    }

    fn list(&self, dir: RawFd) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(borrow(dir))? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(OsStr::from_bytes(name).to_owned());
            }
        }
        Ok(names)
    }

    fn try_lock(&self, fd: RawFd) -> io::Result<bool> {
        // Register the descriptor first, so that no fork happens between lock and registration.
        if !fork::register(fd) {
            return Err(io::Error::from_raw_os_error(libc::EMFILE));
        }
        let locked = match rustix::fs::flock(borrow(fd), FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        };
        if !matches!(locked, Ok(true)) {
            fork::unregister(fd);
        }
        locked
    }

    fn direct(&self, fd: RawFd) -> io::Result<Direct> {
        let fd = borrow(fd);
        let magic = rustix::fs::fstatfs(fd)?.f_type as u64 & 0xffff_ffff;
        let unhonoured = match magic {
            TMPFS => true,
            // Data checksums need a stable copy, so btrfs writes directly only without them (chattr +C).
            BTRFS => !rustix::fs::ioctl_getflags(fd).is_ok_and(|flags| flags.contains(IFlags::NOCOW)),
            _ => false,
        };
        let usual = Direct { memory: ALIGNMENT as u32, offset: ALIGNMENT as u32, honoured: !unhonoured };
        // Kernels before 6.1 and many file systems do not report the alignment. The usual alignment works
        // there.
        let Ok(stat) = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) else { return Ok(usual) };
        if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
            return Ok(usual);
        }
        let (memory, offset) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        Ok(Direct { memory, offset, honoured: usual.honoured && offset > 0 })
    }

    fn drop_cached(&self, fd: RawFd) {
        _ = rustix::fs::fadvise(borrow(fd), 0, None, rustix::fs::Advice::DontNeed);
    }

    fn buffered(&self, fd: RawFd) -> io::Result<()> {
        let flags = rustix::fs::fcntl_getfl(borrow(fd))?;
        Ok(rustix::fs::fcntl_setfl(borrow(fd), flags - OFlags::DIRECT)?)
    }
}
