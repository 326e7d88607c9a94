//! The system calls. Each may have a fault; without one, it does its work on the [`State`].

use super::SimFs;
use super::disk::SECTOR;
use super::fault::Call;
use super::state::{State, error};
use crate::storage::local::sys::{Direct, Kind, Open, RawFd, Rename, Stat, Sys};
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Component, Path};

impl SimFs {
    fn call<T>(&self, call: Call, run: impl FnOnce(&mut State) -> io::Result<T>) -> io::Result<T> {
        let mut state = self.lock();
        state.enter()?;
        match state.fault(call) {
            None => run(&mut state),
            Some((error, done)) => {
                if done {
                    run(&mut state)?;
                }
                Err(error)
            }
        }
    }
}

impl Sys for SimFs {
    fn open(&self, dir: Option<RawFd>, path: &Path, how: Open, _follow: bool) -> io::Result<RawFd> {
        self.call(Call::Open, |state| state.open(dir, path, how))
    }

    fn close(&self, fd: RawFd) {
        self.lock().close(fd);
    }

    fn mkdir(&self, dir: Option<RawFd>, path: &Path) -> io::Result<()> {
        self.call(Call::Mkdir, |state| state.mkdir(dir, path))
    }

    fn pwrite(&self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.call(Call::Pwrite, |state| state.pwrite(fd, bytes, offset))
    }

    fn pread(&self, fd: RawFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.call(Call::Pread, |state| state.pread(fd, buffer, offset))
    }

    fn fsync(&self, fd: RawFd) -> io::Result<()> {
        let mut state = self.lock();
        state.enter()?;
        let fault = state.fault(Call::Fsync).map(|(error, _)| error);
        state.fsync(fd, fault)
    }

    fn fallocate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        self.call(Call::Fallocate, |state| state.resize(fd, len, false))
    }

    fn ftruncate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        self.call(Call::Ftruncate, |state| state.resize(fd, len, true))
    }

    fn rename(&self, dir: RawFd, from: &Path, to: &Path, how: Rename) -> io::Result<()> {
        self.call(Call::Rename, |state| state.rename(dir, component(from)?, component(to)?, how))
    }

    fn link(&self, file: RawFd, dir: RawFd, name: &Path) -> io::Result<()> {
        self.call(Call::Link, |state| state.link(file, dir, component(name)?))
    }

    fn clone_file(&self, from: RawFd, to: RawFd) -> io::Result<()> {
        self.call(Call::Clone, |state| state.clone_file(from, to))
    }

    fn protect(&self, fd: RawFd) -> io::Result<()> {
        self.call(Call::Protect, |state| state.protect(fd))
    }

    fn unlink(&self, dir: RawFd, name: &Path, kind: Kind) -> io::Result<()> {
        self.call(Call::Unlink, |state| state.unlink(dir, component(name)?, kind))
    }

    fn stat(&self, fd: RawFd) -> io::Result<Stat> {
        self.call(Call::Stat, |state| state.stat(state.descriptor(fd)?.ino))
    }

    fn stat_at(&self, dir: RawFd, name: &Path) -> io::Result<Stat> {
        self.call(Call::Stat, |state| {
            let (parent, name) = state.walk(Some(dir), name)?;
            state.stat(name.map_or(Ok(parent), |name| state.lookup(parent, name))?)
        })
    }

    fn touch(&self, fd: RawFd) -> io::Result<()> {
        self.call(Call::Touch, |state| state.descriptor(fd).map(drop))
    }

    fn list(&self, dir: RawFd) -> io::Result<Vec<OsString>> {
        // Reversed, because no file system promises an order.
        self.call(Call::List, |state| Ok(state.entries(state.descriptor(dir)?.ino)?.keys().rev().cloned().collect()))
    }

    fn try_lock(&self, fd: RawFd) -> io::Result<bool> {
        self.call(Call::Lock, |state| state.try_lock(fd))
    }

    fn direct(&self, fd: RawFd) -> io::Result<Direct> {
        self.call(Call::Direct, |state| {
            state.descriptor(fd)?;
            Ok(Direct { memory: SECTOR as u32, offset: SECTOR as u32, honoured: true })
        })
    }

    fn buffered(&self, fd: RawFd) -> io::Result<()> {
        self.call(Call::Direct, |state| state.buffered(fd))
    }
}

/// Calls within a directory take names, not paths.
fn component(path: &Path) -> io::Result<&OsStr> {
    let mut components = path.components();
    match (components.next(), components.next()) {
        (Some(Component::Normal(name)), None) => Ok(name),
        _ => Err(error(libc::EINVAL)),
    }
}
