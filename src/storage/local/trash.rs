//! Removes steps and attempts so that no crash brings them back half deleted. They are first hidden, durably,
//! and then deleted.
//!
//! The name of an attempt is hidden already, so the attempt is deleted without a rename, because a full disk
//! can refuse a new name.

use super::dir::Dir;
use super::sys::{Kind, Rename};
use super::{durable, names};
use crate::error::{Error, Result};
use crate::id::Attempt;

/// Moves the step or attempt `name`, known by its `identity`, to the trash and deletes it.
///
/// Another process may exchange the directory under the name just before the rename. So `discard` checks the
/// moved directory before it deletes it, and renames it back if it is another directory.
pub(super) fn discard(root: &Dir, name: &str, trash: &str, identity: (u64, u64)) -> Result<()> {
    root.rename(name, trash, Rename::Plain).map_err(root.error("cannot move to the trash", name))?;
    let moved = root.look(trash).map_err(root.error("cannot look at what was moved to the trash", trash));
    match moved {
        // None: a sweep removed it first.
        Ok(moved) if moved.as_ref().is_none_or(|stat| stat.identity == identity) => {}
        moved => {
            put_back(root, name, trash)?;
            moved?;
            return Err(root.conflict("another directory has this name meanwhile; it was not removed", name));
        }
    }
    durable::trash(root).map_err(root.error("cannot make the removal durable", name))?;
    delete(root, trash)
}

/// Renames a step or attempt back, durably, because it may have been acknowledged.
fn put_back(root: &Dir, name: &str, trash: &str) -> Result<()> {
    let back = match root.rename(trash, name, Rename::NoReplace) {
        // rename(2) replaces only an empty directory, and no step is empty.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
            root.rename(trash, name, Rename::Plain)
        }
        back => back,
    };
    back.map_err(root.error("cannot rename a directory back from the trash, which must not be removed", trash))?;
    durable::published(root).map_err(root.error("cannot make a rename back from the trash durable", name))
}

/// Deletes the attempt `temp` durably. After that its owner record may be deleted.
pub(super) fn delete_attempt(root: &Dir, temp: &str) -> Result<()> {
    delete(root, temp)?;
    durable::deleted(root).map_err(root.error("cannot make it durable that the attempt is gone", temp))
}

/// Deletes trash that another process left. If several machines share the storage, the rename of that process
/// may be durable only on its own machine, or not at all. The rename of this process is durable before
/// anything is deleted.
pub(super) fn delete_found(root: &Dir, name: &str) -> Result<()> {
    let own = names::trash(Attempt::new());
    match root.rename(name, &own, Rename::Plain) {
        // Another sweep renamed it first.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
        renamed => renamed.map_err(root.error("cannot move trash", name))?,
    }
    durable::trash(root).map_err(root.error("cannot make a removal durable", name))?;
    delete(root, &own).inspect_err(|_| {
        // Trash that cannot be deleted keeps its name from sweep to sweep.
        let _ = root.rename(&own, name, Rename::NoReplace);
    })
}

/// Deletes the hidden directory `name`, if it exists. The hidden name must be durable already.
///
/// Deletes only files in one directory, because this library writes nothing else. A link is removed, never
/// followed. A directory inside is an error and stays.
pub(super) fn delete(root: &Dir, name: &str) -> Result<()> {
    match root.look(name).map_err(root.error("cannot look at", name))? {
        None => return Ok(()),
        Some(stat) if stat.kind != Kind::Dir => {
            return root.unlink(name, stat.kind).map_err(root.error("cannot delete", name));
        }
        Some(_) => {}
    }
    let dir = match root.enter(name) {
        // Another process deleted it.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
        opened => opened.map_err(root.error("cannot open what is to be deleted", name))?,
    };
    for file in dir.list().map_err(dir.own_error("cannot list"))? {
        match dir.look(&file).map_err(dir.error("cannot look at", &file))? {
            None => {}
            Some(stat) if stat.kind == Kind::Dir => {
                return Err(Error::invalid("a checkpoint contains no directories; this one was not removed")
                    .with_path(dir.path().join(file)));
            }
            Some(stat) => dir.unlink(&file, stat.kind).map_err(dir.error("cannot delete", &file))?,
        }
    }
    root.unlink(name, Kind::Dir).map_err(root.error("cannot remove directory", name))
}
