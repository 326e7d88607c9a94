//! The publish: one atomic rename, on file systems with and without renameat2(2). For an attempt of several
//! ranks, also the claim before the publish, and the veto, which a claim makes impossible.

use super::dir::Dir;
use super::sys::Rename;
use super::{durable, names};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::shared::Vetoed;

/// Renames the attempt `temp`, known by its `identity`, to `step`. An empty directory of that name is
/// replaced. With `overwrite` the attempt is exchanged with an existing step, which then has the name `temp`.
///
/// # Errors
/// `Conflict` when another step has the name. `Indeterminate` when the result is unknown. With any other
/// kind, nothing changed.
pub(super) fn rename(root: &Dir, temp: &str, step: &str, identity: (u64, u64), overwrite: bool) -> Result<()> {
    let replace = overwrite || mutant::on(Mutant::NoReplace);
    let mut how = if replace { Rename::Exchange } else { Rename::NoReplace };
    loop {
        let Err(error) = root.rename(temp, step, how) else { return Ok(()) };
        // The call's result is not reliable: a network file system can repeat a rename that had succeeded.
        match look(root, temp, step, identity) {
            Seen::Published => return Ok(()),
            Seen::Unclear => return Err(unclear(root, step, error)),
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

/// Exchanges the attempt `temp` with the step that has the identity `displaced`, and with no other step. The
/// step may have been replaced or pruned since it was read.
///
/// # Errors
/// `Conflict` when another step or no step has the name. `Indeterminate` when the result is unknown. With any
/// other kind, nothing changed.
pub(super) fn exchange(root: &Dir, temp: &str, step: &str, identity: (u64, u64), displaced: (u64, u64)) -> Result<()> {
    let there = root.look(step).map_err(root.error("cannot look at the step", step))?;
    if there.is_none_or(|stat| stat.identity != displaced) {
        return Err(root.conflict(REPLACED, step));
    }
    exchange_checked(root, temp, step, identity, displaced)
}

const REPLACED: &str = "the step was replaced or removed meanwhile; it is as it was";

/// Exchanges the names, checks which step was displaced, and exchanges them back if it was the wrong step.
fn exchange_checked(root: &Dir, temp: &str, step: &str, identity: (u64, u64), displaced: (u64, u64)) -> Result<()> {
    if let Err(error) = root.rename(temp, step, Rename::Exchange) {
        match (look(root, temp, step, identity), error.raw_os_error()) {
            (Seen::Published, _) => {}
            (Seen::Unchanged, Some(libc::ENOENT)) => return Err(root.conflict(REPLACED, step)),
            (Seen::Unchanged, _) => return Err(root.error("cannot publish", step)(error)),
            (Seen::Unclear, _) => return Err(unclear(root, step, error)),
        }
    }
    let is_meant = |stat: super::sys::Stat| stat.identity == displaced;
    if root.look(temp).map_err(|error| unclear(root, step, error))?.is_some_and(is_meant) {
        return Ok(());
    }
    root.rename(temp, step, Rename::Exchange).map_err(|error| unclear(root, step, error))?;
    Err(root.conflict(REPLACED, step))
}

fn unclear(root: &Dir, step: &str, error: std::io::Error) -> Error {
    Error::io("the publish failed, and whether the step has its name is unknown", error)
        .with_kind(ErrorKind::Indeterminate)
        .with_path(root.path().join(step))
}

/// Renames an attempt from the name that a veto would take away to the name from which its publish starts.
///
/// # Errors
/// `Cancelled` when the attempt is gone.
pub(super) fn claim(root: &Dir, step: &str, attempt: Attempt, identity: (u64, u64)) -> Result<()> {
    let (temp, claimed) = (names::temp(step, attempt), names::claimed(step, attempt));
    let renamed = match root.rename(&temp, &claimed, Rename::NoReplace) {
        // Only this attempt uses the name, so a plain rename cannot replace anything.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::local::linux::Linux;
    use crate::storage::local::root;
    use crate::storage::local::sys::Sys;
    use std::fs;
    use std::sync::Arc;

    #[test]
    fn only_the_step_that_was_read_is_exchanged() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            fs::create_dir(dir.path().join(name)).unwrap();
            fs::write(dir.path().join(name).join("is"), name).unwrap();
        };
        let is = |name: &str| fs::read_to_string(dir.path().join(name).join("is")).ok();
        ["temp", "step"].into_iter().for_each(make);
        let sys: Arc<dyn Sys> = Arc::new(Linux);
        let root = root::find(&sys, dir.path()).unwrap();
        let identity = |name: &str| root.look(name).unwrap().unwrap().identity;
        let (temp, read) = (identity("temp"), identity("step"));
        fs::rename(dir.path().join("step"), dir.path().join("read")).unwrap();

        let pruned = exchange(&root, "temp", "step", temp, read).unwrap_err();
        assert_eq!((pruned.kind(), is("step")), (ErrorKind::Conflict, None));
        let pruned = exchange_checked(&root, "temp", "step", temp, read).unwrap_err();
        assert_eq!((pruned.kind(), is("step")), (ErrorKind::Conflict, None), "between the look and the rename");

        make("step");
        for newer in [exchange(&root, "temp", "step", temp, read), exchange_checked(&root, "temp", "step", temp, read)]
        {
            assert_eq!(newer.unwrap_err().kind(), ErrorKind::Conflict);
            assert_eq!((is("step").as_deref(), is("temp").as_deref()), (Some("step"), Some("temp")));
        }
        exchange(&root, "temp", "step", temp, identity("step")).unwrap();
        assert_eq!((is("step").as_deref(), is("temp").as_deref()), (Some("temp"), Some("step")));
    }
}
