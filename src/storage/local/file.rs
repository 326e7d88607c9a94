//! Writing a file of an attempt.

use super::dir::Dir;
use super::direct::{self, Bypass};
use super::progress::Progress;
use super::sys::{Fd, uninterrupted};
use super::{durable, transfer};
use crate::error::{Error, Result};
use crate::memory::{ALIGNMENT, AlignedBuffer};
use crate::storage::{FileWriting, IoMode};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A file of an attempt, written through one descriptor.
#[derive(Debug)]
pub(super) struct LocalFile {
    fd: Fd,
    bypass: Bypass,
    len: u64,
    path: PathBuf,
    sealed: AtomicBool,
    progress: Arc<Progress>,
}

impl LocalFile {
    /// Creates the file and allocates its space.
    pub(super) fn create(dir: &Dir, file: &str, len: u64, direct: bool, progress: &Arc<Progress>) -> Result<Self> {
        let (fd, bypass) = direct::create(dir, file, direct).map_err(dir.error("cannot create file", file))?;
        if len > 0 {
            match uninterrupted(|| fd.sys().fallocate(fd.raw(), padded(len))) {
                // The file system has no preallocation: writes allocate the space.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL)) => {}
                done => done.map_err(dir.error(&format!("cannot take space for a file len={len}"), file))?,
            }
        }
        let path = dir.path().join(file);
        progress.begin_file();
        Ok(Self { fd, bypass, len, path, sealed: AtomicBool::new(false), progress: progress.clone() })
    }

    fn check(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let unit = ALIGNMENT as u64;
        let len = bytes.len() as u64;
        let fits = offset
            .checked_add(len)
            .is_some_and(|end| end <= padded(self.len) && (len.is_multiple_of(unit) || end == self.len));
        if fits && offset.is_multiple_of(unit) && bytes.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a write must be aligned and within the file offset={offset} len={len} file_len={} address={:p}",
            self.len,
            bytes.as_ptr()
        ))
        .with_path(&self.path))
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (whole, tail) = bytes.split_at(bytes.len() / ALIGNMENT * ALIGNMENT);
        transfer::write_all(&self.fd, &self.bypass, whole, offset)?;
        if tail.is_empty() {
            return Ok(());
        }
        // The last bytes of the file, which the caller passed without padding.
        let mut block = AlignedBuffer::new(ALIGNMENT);
        block[..tail.len()].copy_from_slice(tail);
        transfer::write_all(&self.fd, &self.bypass, &block, offset + whole.len() as u64)
    }

    fn finish(&self) -> Result<()> {
        let cut = (!self.len.is_multiple_of(ALIGNMENT as u64)).then_some(self.len);
        let failed = |error| Error::io("cannot make file durable", error).with_path(&self.path);
        durable::shard(&self.fd, cut).map_err(failed)?;
        let len = uninterrupted(|| self.fd.sys().stat(self.fd.raw())).map_err(failed)?.len;
        if len == self.len {
            return Ok(());
        }
        let what = "a file was sealed before all of it was written";
        Err(Error::internal(format!("{what} expected_bytes={} found_bytes={len}", self.len)).with_path(&self.path))
    }
}

impl FileWriting for LocalFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check(offset, bytes)?;
        self.write(offset, bytes).map_err(|error| {
            self.progress.lose();
            let message = format!("cannot write offset={offset} len={}", bytes.len());
            Error::io(message, error).with_path(&self.path)
        })
    }

    fn seal(&self) -> Result<()> {
        if self.sealed.swap(true, Ordering::AcqRel) {
            return Err(Error::invalid("a file is sealed once").with_path(&self.path));
        }
        self.finish().inspect_err(|_| self.progress.lose())?;
        self.progress.end_file();
        Ok(())
    }

    fn mode(&self) -> IoMode {
        self.bypass.mode()
    }
}

fn padded(len: u64) -> u64 {
    len.checked_next_multiple_of(ALIGNMENT as u64).unwrap_or(u64::MAX)
}
