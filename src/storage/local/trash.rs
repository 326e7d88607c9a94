//! Taking things away so that no crash brings them back half deleted: out of sight first, durably, and only then the bytes.
//!
//! An attempt is out of sight by its name: it is deleted where it is. On a disk that is full, a new name can be refused.

use super::attempt::conflict;
use super::dir::Dir;
use super::durable;
use super::sys::{Kind, Rename};
use crate::error::{Error, Result};

/// Moves the step or attempt `name`, known by its `identity`, to the trash and deletes it.
///
/// A rename moves whatever has the name by then, and another process may just have exchanged it: what was
/// moved is looked at before it is deleted, and goes back if it is another.
pub(super) fn discard(root: &Dir, name: &str, trash: &str, identity: (u64, u64)) -> Result<()> {
    root.rename(name, trash, Rename::Plain).map_err(root.error("cannot move to the trash", name))?;
    let moved = root.look(trash).map_err(root.error("cannot look at what was moved to the trash", trash));
    match moved {
        // Where it is gone already, a sweep was faster.
        Ok(moved) if moved.as_ref().is_none_or(|stat| stat.identity == identity) => {}
        moved => {
            put_back(root, name, trash)?;
            moved?;
            return Err(conflict("another directory has this name meanwhile; it was not removed", root, name));
        }
    }
    durable::trash(root).map_err(root.error("cannot make the removal durable", name))?;
    delete(root, trash)
}

/// Gives a step or attempt its name back, durably: it may have been acknowledged.
fn put_back(root: &Dir, name: &str, trash: &str) -> Result<()> {
    let back = match root.rename(trash, name, Rename::NoReplace) {
        // rename(2) replaces nothing but an empty directory, and no step is one.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
            root.rename(trash, name, Rename::Plain)
        }
        back => back,
    };
    back.map_err(root.error("what was not to be removed is in the trash, and does not get its name back", trash))?;
    durable::published(root).map_err(root.error("cannot make durable that this has its name back", name))
}

/// Deletes the attempt `temp`, durably: its owner record may go then.
pub(super) fn delete_attempt(root: &Dir, temp: &str) -> Result<()> {
    delete(root, temp)?;
    durable::deleted(root).map_err(root.error("cannot make it durable that the attempt is gone", temp))
}

/// Deletes the hidden directory `name`, if it is there. That it is hidden must be durable.
///
/// Only what we write is deleted: files in one directory. A link is removed, never followed. A directory inside is an error
/// and stays.
pub(super) fn delete(root: &Dir, name: &str) -> Result<()> {
    match root.look(name).map_err(root.error("cannot look at", name))? {
        None => return Ok(()),
        Some(stat) if stat.kind != Kind::Dir => {
            return root.unlink(name, stat.kind).map_err(root.error("cannot delete", name));
        }
        Some(_) => {}
    }
    let dir = match root.enter(name) {
        // Somebody else finished the job.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
        opened => opened.map_err(root.error("cannot open what is to be deleted", name))?,
    };
    for file in dir.list().map_err(dir.own_error("cannot list"))? {
        match dir.look(&file).map_err(dir.error("cannot look at", &file))? {
            None => {}
            Some(stat) if stat.kind == Kind::Dir => {
                return Err(Error::invalid("a directory that no checkpoint has; left where it is")
                    .with_path(dir.path().join(file)));
            }
            Some(stat) => dir.unlink(&file, stat.kind).map_err(dir.error("cannot delete", &file))?,
        }
    }
    root.unlink(name, Kind::Dir).map_err(root.error("cannot remove directory", name))
}
