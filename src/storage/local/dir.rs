//! An open directory, and operations on the names in it.

use super::sys::{Fd, Kind, Open, Rename, Stat, Sys, uninterrupted};
use crate::error::{Error, ErrorKind};
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An open directory and its path. Only messages use the path; everything else uses the descriptor.
#[derive(Debug)]
pub(super) struct Dir {
    fd: Fd,
    path: PathBuf,
}

impl Dir {
    /// Opens a path that the user gave. Links are followed.
    pub(super) fn at(sys: &Arc<dyn Sys>, path: &Path) -> io::Result<Self> {
        let named = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Ok(Self { fd: Fd::open(sys, None, named, Open::Dir, true)?, path: path.to_owned() })
    }

    /// Opens the same directory again, so that a failed fsync spoils only the new descriptor.
    pub(super) fn afresh(&self) -> Result<Self, Error> {
        let fd = Fd::open(self.fd.sys(), Some(&self.fd), Path::new("."), Open::Dir, false)
            .map_err(|error| Error::io("cannot open directory", error).with_path(&self.path))?;
        Ok(Self { fd, path: self.path.clone() })
    }

    /// Opens a directory in it. Links are not followed.
    pub(super) fn enter(&self, name: &str) -> io::Result<Self> {
        Ok(Self { fd: self.open(name, Open::Dir)?, path: self.path.join(name) })
    }

    /// Opens the entry `name`. Links are not followed.
    pub(super) fn open(&self, name: &str, how: Open) -> io::Result<Fd> {
        Fd::open(self.fd.sys(), Some(&self.fd), Path::new(name), how, false)
    }

    pub(super) fn mkdir(&self, name: impl AsRef<Path>) -> io::Result<()> {
        uninterrupted(|| self.fd.sys().mkdir(Some(self.fd.raw()), name.as_ref()))
    }

    /// Renames within the directory. An interrupted rename is not repeated, because it may have happened.
    pub(super) fn rename(&self, from: &str, to: &str, how: Rename) -> io::Result<()> {
        self.fd.sys().rename(self.fd.raw(), Path::new(from), Path::new(to), how)
    }

    /// Removes a name. Ok if it does not exist.
    pub(super) fn unlink(&self, name: impl AsRef<Path>, kind: Kind) -> io::Result<()> {
        match uninterrupted(|| self.fd.sys().unlink(self.fd.raw(), name.as_ref(), kind)) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            done => done,
        }
    }

    /// Stats `name`; None if it does not exist.
    pub(super) fn look(&self, name: impl AsRef<Path>) -> io::Result<Option<Stat>> {
        match uninterrupted(|| self.fd.sys().stat_at(self.fd.raw(), name.as_ref())) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            stat => stat.map(Some),
        }
    }

    pub(super) fn stat(&self) -> io::Result<Stat> {
        uninterrupted(|| self.fd.sys().stat(self.fd.raw()))
    }

    /// Every name in it.
    pub(super) fn list(&self) -> io::Result<Vec<OsString>> {
        uninterrupted(|| self.fd.sys().list(self.fd.raw()))
    }

    pub(super) fn fd(&self) -> &Fd {
        &self.fd
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The path that opened the directory, if it still leads here, otherwise the present path. The directory
    /// may have been renamed, or the program may have changed its working directory.
    pub(super) fn present_path(&self) -> PathBuf {
        let identity = |dir: &Self| dir.stat().map(|stat| stat.identity);
        let leads_here =
            |path: &Path| match (Self::at(self.fd.sys(), path).and_then(|dir| identity(&dir)), identity(self)) {
                (Ok(there), Ok(here)) => there == here,
                _ => false,
            };
        let moved = || self.fd.sys().path_of(self.fd.raw()).filter(|path| leads_here(path));
        if leads_here(&self.path) { None } else { moved() }.unwrap_or_else(|| self.path.clone())
    }

    /// Wraps the error of a call on `name` with what was attempted and the path.
    pub(super) fn error(&self, attempted: &str, name: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Error {
        let path = self.path.join(name);
        move |source| Error::io(attempted, source).with_path(path)
    }

    /// Wraps the error of a call on the directory itself.
    pub(super) fn own_error(&self, attempted: &str) -> impl FnOnce(io::Error) -> Error {
        let path = self.path.clone();
        move |source| Error::io(attempted, source).with_path(path)
    }

    /// The error of an operation that fails because `name` exists.
    pub(super) fn conflict(&self, message: &str, name: &str) -> Error {
        Error::new(ErrorKind::Conflict, message).with_path(self.path.join(name))
    }
}
