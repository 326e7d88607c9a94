//! Direct I/O: a file system may refuse a request, or accept it without honouring it. The reported mode is
//! the mode that the file system honours.

use super::dir::Dir;
use super::sys::{Fd, Kind, Open, uninterrupted};
use crate::memory::ALIGNMENT;
use crate::storage::IoMode;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};

/// True if the transfers of a file bypass the page cache. Turns off permanently when the medium refuses a
/// transfer.
#[derive(Debug)]
pub(super) struct Bypass(AtomicBool);

impl Bypass {
    /// Decides for a file that was opened with O_DIRECT. Keeps direct I/O if the file system honours it and
    /// our alignment is enough.
    fn settle(fd: &Fd) -> io::Result<Self> {
        let enough = |alignment: u32| alignment as usize <= ALIGNMENT;
        let usable = uninterrupted(|| fd.sys().direct(fd.raw()))
            .is_ok_and(|direct| direct.honoured && enough(direct.memory) && enough(direct.offset));
        let bypass = Self(AtomicBool::new(true));
        if !usable {
            bypass.turn_off(fd)?;
        }
        Ok(bypass)
    }

    /// The state of a file that is open through the page cache.
    pub(super) fn off() -> Self {
        Self(AtomicBool::new(false))
    }

    pub(super) fn is_on(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// Switches the file to the page cache. Transfers of other threads may still be direct; the kernel keeps
    /// both coherent.
    pub(super) fn turn_off(&self, fd: &Fd) -> io::Result<()> {
        fd.sys().buffered(fd.raw())?;
        self.0.store(false, Ordering::Release);
        Ok(())
    }

    pub(super) fn mode(&self) -> IoMode {
        if self.is_on() { IoMode::Direct } else { IoMode::Buffered }
    }
}

/// Opens a file to read, direct when `wanted` and possible.
pub(super) fn open(dir: &Dir, file: &str, wanted: bool) -> io::Result<(Fd, Bypass)> {
    settled(wanted, |direct| dir.open(file, Open::Read { direct }), || Ok(()))
}

/// Opens a file for reading and writing, through the page cache, or only for reading if writing is not
/// allowed. In the second case, file systems that lock byte ranges instead of files, such as NFS, refuse a
/// lock on it.
pub(super) fn update(dir: &Dir, file: &str) -> io::Result<(Fd, Bypass)> {
    let fd = match dir.open(file, Open::Update) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
            dir.open(file, Open::Read { direct: false })
        }
        opened => opened,
    };
    Ok((fd?, Bypass::off()))
}

/// Creates a file, direct when `wanted` and possible.
pub(super) fn create(dir: &Dir, file: &str, wanted: bool) -> io::Result<(Fd, Bypass)> {
    // The file system can refuse O_DIRECT after it created the file.
    settled(wanted, |direct| dir.open(file, Open::Create { direct }), || dir.unlink(file, Kind::File))
}

fn settled(
    wanted: bool,
    open: impl Fn(bool) -> io::Result<Fd>,
    undo: impl FnOnce() -> io::Result<()>,
) -> io::Result<(Fd, Bypass)> {
    if wanted {
        match open(true) {
            Ok(fd) => return Bypass::settle(&fd).map(|bypass| (fd, bypass)),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => undo()?,
            Err(error) => return Err(error),
        }
    }
    Ok((open(false)?, Bypass::off()))
}
