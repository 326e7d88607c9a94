//! Opens the root directory, or creates it durably.

use super::dir::Dir;
use super::durable;
use super::sys::Sys;
use crate::error::{Error, Result};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// Opens an existing root.
pub(super) fn find(sys: &Arc<dyn Sys>, path: &Path) -> Result<Dir> {
    Dir::at(sys, path).map_err(|error| Error::io("cannot open the root directory", error).with_path(path))
}

/// Opens the root, and creates it and its missing ancestors.
///
/// It makes every directory on the path durable by an fsync of its parent. That includes existing
/// directories, because a process that died before its own fsync may have created them. If this process may
/// not fsync the parent (no permission, a read-only mount), no process of ours created the directory.
pub(super) fn make(sys: &Arc<dyn Sys>, path: &Path) -> Result<Dir> {
    let failed = |attempted: &'static str| move |error: io::Error| Error::io(attempted, error).with_path(path);
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Dir::at(sys, path).map_err(failed("cannot open directory"));
    };
    let above = make(sys, parent);
    let found = match Dir::at(sys, path) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => None,
        found => Some(found.map_err(failed("cannot open directory"))?),
    };
    if let Some(dir) = found {
        if let Err(error) = above.and_then(|above| durable::made(&above).map_err(failed("cannot fsync the parent"))) {
            tracing::debug!(error = format_args!("{error:#}"), "a directory that was there could not be made durable");
        }
        return Ok(dir);
    }
    let above = above?;
    match above.mkdir(name) {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
        made => made.map_err(failed("cannot create directory"))?,
    }
    let dir = Dir::at(sys, path).map_err(failed("cannot open directory"))?;
    durable::made(&above).map_err(failed("cannot make a new directory durable"))?;
    Ok(dir)
}
