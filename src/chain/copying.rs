//! Copies the files of a version from one storage to another, and makes the copy a version there.

use super::reading::aligned;
use crate::error::{ErrorKind, Result};
use crate::id::Attempt;
use crate::memory::ALIGNMENT;
use crate::storage::{Reading, Storage, Writing};
use std::sync::Arc;

/// The number of bytes that are copied at once.
const PIECE: usize = 8 << 20;

/// Writes the version `name` to `storage` and makes it durable. `fill` writes its files.
///
/// # Errors
/// `Conflict` when the version exists; `Indeterminate` when it is unknown whether the version exists. After
/// any other error nothing of the version is left.
pub(super) fn commit(
    storage: &dyn Storage,
    name: &str,
    attempt: Attempt,
    fill: impl FnOnce(&dyn Writing) -> Result<()>,
) -> Result<Arc<dyn Writing>> {
    let writing = storage.begin(name, attempt, false)?;
    match fill(writing.as_ref()).and_then(|()| writing.publish(false)) {
        Ok(()) => Ok(writing),
        Err(error) => {
            if error.kind() != ErrorKind::Indeterminate {
                crate::guard::attempt("delete a failed version", || writing.abandon());
            }
            Err(error)
        }
    }
}

/// Copies every file of `from` to `to` and returns their total length. The length is short when files went
/// away meanwhile.
///
/// # Errors
/// Errors of both storages, with the name of the file.
pub(super) fn copy(from: &dyn Reading, to: &dyn Writing) -> Result<u64> {
    let (mut piece, mut copied) = (aligned(PIECE as u64)?, 0);
    for name in from.list()? {
        let file = from.open(&name)?;
        let length = file.len();
        copied += length;
        if length <= PIECE as u64 {
            let mut bytes = aligned(length)?;
            file.read_at(0, &mut bytes)?;
            to.put(&name, &bytes)?;
            continue;
        }
        let made = to.create(&name, length)?;
        let mut at = 0;
        while at < length {
            let wanted = (length - at).min(PIECE as u64) as usize;
            // The last piece is padded. Sealing the file cuts the padding off.
            let written = wanted.next_multiple_of(ALIGNMENT);
            file.read_at(at, &mut piece[..wanted])?;
            made.write_at(at, &piece[..written])?;
            at += wanted as u64;
        }
        made.seal()?;
    }
    Ok(copied)
}
