//! A published step, kept open: one descriptor for its directory, one for each file. So all bytes belong to
//! one attempt, even if the name changes.

use super::dir::Dir;
use super::direct::{self, Bypass};
use super::sys::{Fd, Kind, uninterrupted};
use super::transfer;
use crate::error::{Error, Result};
use crate::memory::{ALIGNMENT, AlignedBuffer};
use crate::storage::{FileReading, Inode, Reading, name};
use std::any::Any;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

/// Maximum size of the bounce buffer for unaligned requests.
const BOUNCE: usize = 1 << 20;

/// A published step.
#[derive(Debug)]
pub(super) struct LocalReading {
    dir: Dir,
    direct: bool,
}

impl LocalReading {
    pub(super) fn open(root: &Dir, step: &str, direct: bool) -> Result<Self> {
        name::check_step(step)?;
        Ok(Self::of(root.enter(step).map_err(root.error("cannot open the step", step))?, direct))
    }

    pub(super) fn of(dir: Dir, direct: bool) -> Self {
        Self { dir, direct }
    }
}

impl Reading for LocalReading {
    fn open(&self, file: &str) -> Result<Arc<dyn FileReading>> {
        name::check_file(file).map_err(|error| error.with_path(self.dir.path()))?;
        let (fd, bypass) = match direct::open(&self.dir, file, self.direct) {
            Err(error) if error.raw_os_error() == Some(libc::ELOOP) => return Err(not_a_file(&self.dir, file)),
            opened => opened.map_err(self.dir.error("cannot open file", file))?,
        };
        let stat = uninterrupted(|| fd.sys().stat(fd.raw())).map_err(self.dir.error("cannot stat file", file))?;
        if stat.kind != Kind::File {
            return Err(not_a_file(&self.dir, file));
        }
        let path = self.dir.path().join(file);
        let modified = SystemTime::UNIX_EPOCH.checked_add(stat.modified);
        Ok(Arc::new(LocalFileReading { fd, bypass, len: stat.len, modified, path }))
    }

    fn list(&self) -> Result<Vec<String>> {
        let names = self.dir.list().map_err(self.dir.own_error("cannot list the step"))?;
        Ok(names.into_iter().map(|name| name.to_string_lossy().into_owned()).collect())
    }

    fn inode(&self, file: &str) -> Result<Option<Inode>> {
        name::check_file(file).map_err(|error| error.with_path(self.dir.path()))?;
        let stat = self.dir.look(file).map_err(self.dir.error("cannot stat file", file))?;
        let stat = stat.filter(|stat| stat.kind == Kind::File);
        Ok(stat.map(|stat| Inode { identity: stat.identity, len: stat.len, names: stat.links }))
    }

    fn identity(&self) -> Option<(u64, u64)> {
        // The inode number of a directory is not reused while a descriptor is open.
        self.dir.stat().ok().map(|stat| stat.identity)
    }
}

fn not_a_file(dir: &Dir, file: &str) -> Error {
    Error::corrupt("a link or a device where a file should be").with_path(dir.path().join(file))
}

/// A file of a published step.
#[derive(Debug)]
pub(super) struct LocalFileReading {
    fd: Fd,
    bypass: Bypass,
    len: u64,
    modified: Option<SystemTime>,
    path: PathBuf,
}

impl LocalFileReading {
    pub(super) fn fd(&self) -> &Fd {
        &self.fd
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        if !self.bypass.is_on() {
            return self.fill(offset, buffer);
        }
        let aligned = buffer.as_ptr().addr().is_multiple_of(ALIGNMENT) && offset.is_multiple_of(ALIGNMENT as u64);
        let straight = if aligned { buffer.len() / ALIGNMENT * ALIGNMENT } else { 0 };
        let (straight, rest) = buffer.split_at_mut(straight);
        self.fill(offset, straight)?;
        self.bounce(offset + straight.len() as u64, rest)
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let read = transfer::read_full(&self.fd, &self.bypass, buffer, offset)?;
        if read < buffer.len() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn bounce(&self, mut offset: u64, mut rest: &mut [u8]) -> io::Result<()> {
        if rest.is_empty() {
            return Ok(());
        }
        let mut block = AlignedBuffer::new(BOUNCE.min((rest.len() + ALIGNMENT).next_multiple_of(ALIGNMENT)));
        while !rest.is_empty() {
            let skip = (offset % ALIGNMENT as u64) as usize;
            let wanted = rest.len().min(block.len() - skip);
            let window = &mut block[..(skip + wanted).next_multiple_of(ALIGNMENT)];
            let read = transfer::read_full(&self.fd, &self.bypass, window, offset - skip as u64)?;
            if read < skip + wanted {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let (now, later) = rest.split_at_mut(wanted);
            now.copy_from_slice(&window[skip..][..wanted]);
            rest = later;
            offset += wanted as u64;
        }
        Ok(())
    }
}

impl FileReading for LocalFileReading {
    fn len(&self) -> u64 {
        self.len
    }

    fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    fn as_any(&self) -> Option<&dyn Any> {
        Some(self)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let len = buffer.len();
        let short = || {
            Error::corrupt(format!("the file ends too early offset={offset} len={len} file_len={}", self.len))
                .with_path(&self.path)
        };
        if offset.checked_add(len as u64).is_none_or(|end| end > self.len) {
            return Err(short());
        }
        self.read(offset, buffer).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => short(),
            _ => Error::io(format!("cannot read offset={offset} len={len}"), error).with_path(&self.path),
        })
    }

    fn drop_cached(&self) {
        self.fd.sys().drop_cached(self.fd.raw());
    }
}
