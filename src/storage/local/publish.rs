//! The publish: one atomic rename, on file systems with and without renameat2(2).

use super::dir::Dir;
use super::sys::Rename;
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};

/// Renames the attempt `temp`, known by its `identity`, to `step`. With `overwrite` an existing step is
/// exchanged, and then has the name `temp`.
///
/// # Errors
/// `Conflict` when another step has the name; `Indeterminate` when the result is unknown; with any other kind
/// nothing changed.
pub(super) fn rename(root: &Dir, temp: &str, step: &str, identity: (u64, u64), overwrite: bool) -> Result<()> {
    let replace = overwrite || mutant::on(Mutant::NoReplace);
    let mut how = if replace { Rename::Exchange } else { Rename::NoReplace };
    loop {
        let Err(error) = root.rename(temp, step, how) else { return Ok(()) };
        // The call's result is not reliable: a network file system can repeat a rename that had succeeded.
        match look(root, temp, step, identity) {
            Seen::Published => return Ok(()),
            Seen::Unclear => {
                return Err(Error::io("the publish failed, and whether the step has its name is unknown", error)
                    .with_kind(ErrorKind::Indeterminate)
                    .with_path(root.path().join(step)));
            }
            Seen::Unchanged => {}
        }
        how = match (how, error.raw_os_error()) {
            (Rename::Exchange, Some(libc::ENOENT)) => Rename::NoReplace,
            (Rename::Exchange, Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
                return Err(Error::invalid(
                    "this file system cannot exchange directories, so a step cannot be overwritten",
                )
                .with_source(error)
                .with_path(root.path().join(step)));
            }
            // rename(2) replaces only an empty directory, and no step is empty.
            (Rename::NoReplace, Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => Rename::Plain,
            (_, Some(libc::EEXIST | libc::ENOTEMPTY | libc::ENOTDIR)) => {
                return Err(root.conflict("another attempt at the step won", step));
            }
            _ => return Err(root.error("cannot publish", step)(error)),
        };
    }
}

enum Seen {
    Published,
    Unchanged,
    Unclear,
}

fn look(root: &Dir, temp: &str, step: &str, identity: (u64, u64)) -> Seen {
    let is_ours = |name| root.look(name).map(|stat| stat.is_some_and(|stat| stat.identity == identity));
    match (is_ours(step), is_ours(temp)) {
        (Ok(true), _) => Seen::Published,
        (Ok(false), Ok(true)) => Seen::Unchanged,
        _ => Seen::Unclear,
    }
}
