//! The only file that fsyncs: each function is one promise, and says what is lost without it.
//!
//! A failed fsync is final for its descriptor ([`Fd`] sees to it): the kernel reports an error once, drops the dirty pages, and
//! answers `Ok` from then on.

use super::dir::Dir;
use super::sys::{Fd, uninterrupted};
use crate::mutant::{self, Mutant};
use std::io;

fn promise(kept: Mutant, fd: &Fd) -> io::Result<()> {
    if mutant::on(kept) { Ok(()) } else { fd.fsync() }
}

/// Cuts a shard at its length and makes it durable, in this order: a cut that is not durable leaves the padding of the last
/// block behind the data.
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

/// Makes the names of an attempt's files durable: without it a published step can lack files.
pub(super) fn attempt(dir: &Dir) -> io::Result<()> {
    promise(Mutant::AttemptFsync, dir.fd())
}

/// Makes the publish durable: without it a step that was reported can be gone, or the one it replaced be back.
pub(super) fn published(root: &Dir) -> io::Result<()> {
    promise(Mutant::ParentFsync, root.fd())
}

/// Makes an owner record durable, name and bytes, before its attempt exists: without it a crash leaves an attempt that nobody
/// may sweep.
pub(super) fn owner(record: &Fd, root: &Dir) -> io::Result<()> {
    promise(Mutant::OwnerFsync, record)?;
    promise(Mutant::OwnerFsync, root.fd())
}

/// Makes the name that something has in the trash durable: without it a crash can bring back, under the name of a step, a
/// directory whose files are half deleted.
pub(super) fn trash(root: &Dir) -> io::Result<()> {
    promise(Mutant::TrashFsync, root.fd())
}

/// Makes it durable that an attempt is gone, before its owner record goes: without it a crash can bring back the attempt alone,
/// and nobody may sweep it.
pub(super) fn deleted(root: &Dir) -> io::Result<()> {
    promise(Mutant::OwnerFsync, root.fd())
}

/// Makes durable whatever a dead process did to names in the root before it died: its publish may be visible and not durable.
pub(super) fn inherited(root: &Dir) -> io::Result<()> {
    root.fd().fsync()
}

/// Makes a part of a step that somebody else published durable: without it we count a step that a crash takes away.
pub(super) fn confirmed(fd: &Fd) -> io::Result<()> {
    promise(Mutant::ConfirmFsync, fd)
}

/// Makes a directory that we created durable, by its parent: without it the whole root can be gone.
pub(super) fn made(parent: &Dir) -> io::Result<()> {
    parent.fd().fsync()
}
