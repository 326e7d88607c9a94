//! The publish: one atomic rename, on file systems with and without renameat2(2). For an attempt of several
//! ranks: the claim before it, and the veto that a claim forestalls.

use super::dir::Dir;
use super::sys::Rename;
use super::{durable, names};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::shared::Vetoed;

/// Renames the attempt `temp`, known by its `identity`, to `step`. An empty directory of that name is
/// replaced. With `overwrite` an existing step is exchanged, and then has the name `temp`.
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
            (Rename::NoReplace, Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::EEXIST)) => Rename::Plain,
            (_, Some(libc::EEXIST | libc::ENOTEMPTY | libc::ENOTDIR)) => {
                return Err(root.conflict("another attempt at the step won", step));
            }
            _ => return Err(root.error("cannot publish", step)(error)),
        };
    }
}

/// Renames an attempt from the name that a veto takes away to the one that its publish starts from.
///
/// # Errors
/// `Cancelled` when the attempt is gone.
pub(super) fn claim(root: &Dir, step: &str, attempt: Attempt, identity: (u64, u64)) -> Result<()> {
    let (temp, claimed) = (names::temp(step, attempt), names::claimed(step, attempt));
    let renamed = match root.rename(&temp, &claimed, Rename::NoReplace) {
        // The name is this attempt's own, so nothing is there that a plain rename could replace.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP)) => {
            root.rename(&temp, &claimed, Rename::Plain)
        }
        renamed => renamed,
    };
    let Err(error) = renamed else { return Ok(()) };
    // A network file system can repeat a rename that had succeeded.
    match root.look(&claimed) {
        Ok(Some(stat)) if stat.identity == identity => Ok(()),
        Ok(None) if error.raw_os_error() == Some(libc::ENOENT) => {
            let why = "the attempt is gone: a rank has withdrawn it, or another session has taken the root over";
            Err(Error::new(ErrorKind::Cancelled, why).with_path(root.path().join(step)))
        }
        _ => Err(root.error("cannot claim the attempt", &temp)(error)),
    }
}

/// Takes the attempt's first name away, durably: see
/// [`SharedWriting::veto`](crate::storage::shared::SharedWriting::veto).
pub(super) fn veto(root: &Dir, step: &str, attempt: Attempt) -> Result<Vetoed> {
    let temp = names::temp(step, attempt);
    match root.rename(&temp, &names::trash(Attempt::new()), Rename::Plain) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(Vetoed::TooLate),
        renamed => renamed.map_err(root.error("cannot veto the attempt", &temp))?,
    }
    durable::vetoed(root).map_err(root.error("cannot make a veto durable", &temp))?;
    Ok(Vetoed::Done)
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
