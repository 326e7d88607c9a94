//! Every fsync of the local storage. Each function keeps one promise, and its doc says what is lost without
//! the fsync.
//!
//! A failed fsync is final for its descriptor ([`Fd`] sees to it): the kernel reports an error once, drops
//! the dirty pages, and answers `Ok` from then on.

use super::dir::Dir;
use super::sys::{Fd, uninterrupted};
use crate::mutant::{self, Mutant};
use std::io;

fn promise(kept: Mutant, fd: &Fd) -> io::Result<()> {
    if mutant::on(kept) { Ok(()) } else { fd.fsync() }
}

/// Cuts a shard at its length and then makes it durable. The order matters: a cut that is not durable leaves
/// the last block's padding after the data.
pub(super) fn shard(fd: &Fd, cut: Option<u64>) -> io::Result<()> {
    let trim = || cut.map_or(Ok(()), |len| uninterrupted(|| fd.sys().ftruncate(fd.raw(), len)));
    if mutant::on(Mutant::TruncateLate) {
        promise(Mutant::ShardFsync, fd)?;
        return trim();
    }
    trim()?;
    promise(Mutant::ShardFsync, fd)
}

/// Makes a small file durable: without it a published step can have an empty manifest.
pub(super) fn file(fd: &Fd) -> io::Result<()> {
    promise(Mutant::FileFsync, fd)
}

/// Makes the blocks and the own head of a clone durable: without it a published step can have a file that is
/// empty, or that names the step of its source.
pub(super) fn clone(fd: &Fd) -> io::Result<()> {
    promise(Mutant::CloneFsync, fd)
}

/// Makes the names of an attempt's files durable: without it a published step can lack files.
pub(super) fn attempt(dir: &Dir) -> io::Result<()> {
    promise(Mutant::AttemptFsync, dir.fd())
}

/// Makes the publish durable: without it a crash can lose a reported step, or bring back the replaced one.
pub(super) fn published(root: &Dir) -> io::Result<()> {
    promise(Mutant::ParentFsync, root.fd())
}

/// Makes an owner record durable, name and bytes, before its attempt exists: without it a crash leaves an
/// attempt that no process may sweep.
pub(super) fn owner(record: &Fd, root: &Dir) -> io::Result<()> {
    promise(Mutant::OwnerFsync, record)?;
    promise(Mutant::OwnerFsync, root.fd())
}

/// Makes a rename to the trash durable: without it a crash can bring back, under the name of a step, a
/// directory whose files are half deleted.
pub(super) fn trash(root: &Dir) -> io::Result<()> {
    promise(Mutant::TrashFsync, root.fd())
}

/// Makes the deletion of an attempt durable, before its owner record is deleted: without it a crash can bring
/// back the attempt alone, and no process may sweep it.
pub(super) fn deleted(root: &Dir) -> io::Result<()> {
    promise(Mutant::OwnerFsync, root.fd())
}

/// Makes a veto durable: without it a crash brings the attempt back, and a reported failure can still become
/// a step.
pub(super) fn vetoed(root: &Dir) -> io::Result<()> {
    promise(Mutant::VetoFsync, root.fd())
}

/// Makes the record of a session durable, and the names that lead to it: without it a crash lets an older
/// session publish after this one has listed the steps.
pub(super) fn session(dir: &Dir) -> io::Result<()> {
    promise(Mutant::SessionFsync, dir.fd())
}

/// Makes it durable that the attempts of older sessions are gone: without it a crash brings one back, and it
/// is published after this session has listed the steps.
pub(super) fn taken_over(root: &Dir) -> io::Result<()> {
    promise(Mutant::SessionFsync, root.fd())
}

/// Makes a dead process's changes to names in the root durable: without it, its publish may be visible and
/// not durable.
pub(super) fn inherited(root: &Dir) -> io::Result<()> {
    root.fd().fsync()
}

/// Makes marks of steps durable under their name: without it a crash loses a mark that was reported.
pub(super) fn marked(root: &Dir) -> io::Result<()> {
    root.fd().fsync()
}

/// Makes a part of another process's step durable: without it retention counts a step that a crash removes.
pub(super) fn confirmed(fd: &Fd) -> io::Result<()> {
    promise(Mutant::ConfirmFsync, fd)
}

/// Makes a created directory durable through its parent: without it a crash can lose the whole root.
pub(super) fn made(parent: &Dir) -> io::Result<()> {
    parent.fd().fsync()
}
