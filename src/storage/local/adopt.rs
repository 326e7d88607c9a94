//! Makes files of an attempt from files of published steps: as clones, or else as links.
//!
//! **Order.** A clone is a new file, and an fsync of its own makes its bytes and its length durable. A link
//! is another name of a file that is durable already. The fsync of the attempt's directory, before the
//! rename, makes the new name durable. **Refusals.** If a file system does not support the operation, or
//! refuses it at present, that is not an error: the caller writes the file. A refusal leaves no file behind.

use super::dir::Dir;
use super::reading::LocalFileReading;
use super::sys::{Fd, Kind, uninterrupted};
use super::{direct, durable, transfer};
use crate::error::{Error, Result};
use crate::memory::ALIGNMENT;
use crate::storage::{Adopted, FileReading};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Makes `file` in `dir` from `source`: see [`Writing::adopt`](crate::storage::Writing::adopt).
pub(super) fn adopt(dir: &Dir, file: &str, source: &LocalFileReading, head: &[u8]) -> Result<Adopted> {
    if head.len() as u64 > source.len() || !head.len().is_multiple_of(ALIGNMENT) {
        let why = format!("a head does not fit its file head_bytes={} file_len={}", head.len(), source.len());
        return Err(Error::invalid(why).with_path(dir.path().join(file)));
    }
    // In the other system, the number of this descriptor could belong to another file.
    if !Arc::ptr_eq(dir.fd().sys(), source.fd().sys()) {
        return Ok(Adopted::Refused("another storage has opened the source".into()));
    }
    let Err(no_clone) = clone(dir, file, source, head)? else { return Ok(Adopted::Cloned) };
    let Err(no_link) = link(dir, file, source)? else { return Ok(Adopted::Linked) };
    Ok(Adopted::Refused(format!("cannot clone: {no_clone}; cannot link: {no_link}")))
}

/// Creates a file that shares the blocks of `source`, except the blocks of its `head`. The inner error is a
/// refusal.
fn clone(dir: &Dir, file: &str, source: &LocalFileReading, head: &[u8]) -> Result<io::Result<()>> {
    let (fd, bypass) = match direct::create(dir, file, false) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
            return Err(dir.error("cannot create file", file)(error));
        }
        Err(error) => return Ok(Err(error)),
        Ok(created) => created,
    };
    let cloned = uninterrupted(|| fd.sys().clone_file(source.fd().raw(), fd.raw()))
        .and_then(|()| transfer::write_all(&fd, &bypass, head, 0))
        .and_then(|()| check_length(&fd, source));
    if cloned.is_err() {
        drop(fd);
        dir.unlink(file, Kind::File).map_err(dir.error("cannot remove a clone that was not made", file))?;
        return Ok(cloned);
    }
    durable::clone(&fd).map_err(dir.error("cannot make file durable", file))?;
    Ok(Ok(()))
}

/// Creates a hard link to `source`. The inner error is a refusal.
fn link(dir: &Dir, file: &str, source: &LocalFileReading) -> Result<io::Result<()>> {
    if let Err(changed) = check_length(source.fd(), source) {
        return Ok(Err(changed));
    }
    let sys = dir.fd().sys();
    let linked = uninterrupted(|| sys.link(source.fd().raw(), dir.fd().raw(), Path::new(file)));
    // The call's result is not reliable: a network file system can repeat a link that had succeeded.
    let there = dir.look(file).map_err(dir.error("cannot look at a link", file))?;
    let identity = uninterrupted(|| sys.stat(source.fd().raw())).map(|stat| stat.identity);
    let identity = identity.map_err(dir.error("cannot stat the source of a link", file))?;
    match there {
        None => return Ok(Err(linked.err().unwrap_or_else(|| io::Error::from_raw_os_error(libc::ENOENT)))),
        Some(stat) if stat.identity == identity => {}
        Some(_) => return Err(dir.conflict("the attempt has another file of this name", file)),
    }
    // Without this, a program that opens one of the names for writing would change every step that shares the
    // file.
    if let Err(error) = sys.protect(source.fd().raw()) {
        tracing::debug!(path = %dir.path().join(file).display(), error = format_args!("{error:#}"), "a linked file stays writable");
    }
    Ok(Ok(()))
}

/// Refuses a source, or a clone of it, whose length has changed since the source was opened.
fn check_length(fd: &Fd, source: &LocalFileReading) -> io::Result<()> {
    let len = uninterrupted(|| fd.sys().stat(fd.raw()))?.len;
    if len == source.len() {
        return Ok(());
    }
    Err(io::Error::other(format!("the source has another length now found_bytes={len} opened_bytes={}", source.len())))
}
