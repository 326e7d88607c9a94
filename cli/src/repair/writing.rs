//! Writes repaired steps: first the step itself, then those that share its damaged files.
//!
//! **Protocol.** An attempt beside the step gets every file of the step: a damaged file as a copy with the
//! flips undone, the others as links or clones if the file system supports them, else as copies. The program
//! reads the attempt from the medium, compares it with every digest, and exchanges it with the step. For a
//! step that shares a damaged file, it makes an attempt from the step's own files and the repaired file in
//! the same way.
//! **Crash.** Each step is either the old step or the repaired step, both whole.

use super::{Change, Repair, Shared};
use crate::out;
use ashore::internal::storage::is_url;
use ashore::memory::AlignedBuffer;
use ashore::storage::local::{Local, Resumable};
use ashore::storage::{Adopted, FileReading, Reading, Storage};
use ashore::{ALIGNMENT, Attempt, Checkpoint, Error, ErrorKind, Result};
use std::fs::File;
use std::path::Path;

/// The number of bytes that are copied at once.
const WINDOW: usize = 4 << 20;

/// Shorter files are written whole.
const SMALL: u64 = 64 << 10;

/// Returns the storage in which the step is, and its name.
pub(super) fn home(path: &Path) -> Result<(Local, String)> {
    let none = || Error::new(ErrorKind::Invalid, "only a step in a directory can be repaired").with_path(path);
    if is_url(path) {
        let what = "repair writes into a directory, and this is a store: a sound copy of the step in another root \
                    replaces this one by `ashore copy ROOT STORE --step N`";
        return Err(Error::new(ErrorKind::Invalid, what).with_path(path));
    }
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(none)?;
    Ok((Local::at(path.parent().ok_or_else(none)?)?, name.to_owned()))
}

/// Writes a repaired copy beside the step, verifies it, and gives it the step's name. `saved` is the attempt
/// that the step must have, if its manifest could be read.
pub(super) fn write(repair: &Repair, bytes: u64, saved: Option<Attempt>) -> Result<()> {
    let (local, name) = home(&repair.path)?;
    let bar = out::progress(2 * bytes);
    bar.set_message("bytes of the repaired copy");
    replace(&local, &name, |from, attempt| {
        let mut buffer = AlignedBuffer::new(WINDOW);
        for file in from.list()? {
            let source = from.open(&file)?;
            let of_file: Vec<_> = repair.changes.iter().filter(|change| change.file == file).collect();
            place(source.as_ref(), &file, attempt, &mut buffer, &of_file)?;
            bar.inc(source.len());
        }
        let repaired = Checkpoint::from_reading(attempt.as_step()?, &name, &attempt.path())?;
        let report = repaired.verify_with(|done, _| bar.set_position(bytes + done))?;
        bar.finish_and_clear();
        let is_same = repaired.step() == repair.step && saved.is_none_or(|saved| repaired.attempt() == saved);
        if is_same && report.is_intact() {
            return Ok(());
        }
        let what = "the repaired copy is not what was saved, or the step was replaced meanwhile; the step is as it was";
        Err(Error::new(ErrorKind::Corrupt, what).with_step(repair.step).with_path(&repair.path))
    })
}

/// Gives the repaired files of the step at `repaired` to a step that shares its damaged files.
pub(super) fn give(repaired: &Path, shared: &Shared) -> Result<()> {
    let (local, name) = home(repaired)?;
    let good = local.open(&name)?;
    let (_, other) = home(&shared.path)?;
    replace(&local, &other, |from, attempt| {
        let mut buffer = AlignedBuffer::new(WINDOW);
        for file in from.list()? {
            let pair = shared.pairs.iter().find(|pair| pair.file == file);
            let source = pair.map_or_else(|| from.open(&file), |pair| good.open(&pair.repaired))?;
            place(source.as_ref(), &file, attempt, &mut buffer, &[])?;
        }
        if Checkpoint::from_reading(attempt.as_step()?, &other, &attempt.path())?.verify()?.is_intact() {
            return Ok(());
        }
        let what = "the step has other damage, too; it is as it was";
        Err(Error::new(ErrorKind::Corrupt, what).with_step(shared.step).with_path(&shared.path))
    })
}

/// Replaces the step `name` by an attempt that `fill` makes from it.
fn replace(local: &Local, name: &str, fill: impl FnOnce(&dyn Reading, &Resumable) -> Result<()>) -> Result<()> {
    // Make the step durable first, because its files are linked and another process may have published it not
    // durably.
    local.confirm(name)?;
    // The step stays open until the publish, which compares identities.
    let from = local.open(name)?;
    let attempt = local.begin_replacement(name, Attempt::new())?;
    match fill(from.as_ref(), &attempt).and_then(|()| attempt.replace(from.as_ref())) {
        Ok(()) => attempt.writing().settle(),
        Err(error) => {
            let _ = attempt.writing().abandon();
            Err(error)
        }
    }
}

/// Gives the attempt the file `source`: a link or a clone if the file needs no changes, else a copy.
fn place(
    source: &dyn FileReading,
    file: &str,
    attempt: &Resumable,
    buffer: &mut AlignedBuffer,
    changes: &[&Change],
) -> Result<()> {
    match adopt(source, file, attempt, changes)? {
        Adopted::Linked => return Ok(()),
        Adopted::Cloned => {}
        _ => copy_file(source, file, attempt, buffer, changes)?,
    }
    // Keep the times: retention treats the step that was written last as the head of the run, and a repair is
    // not a new save.
    let Some(modified) = source.modified() else { return Ok(()) };
    let path = attempt.path().join(file);
    let set = File::options().write(true).open(&path).and_then(|file| file.set_modified(modified));
    set.map_err(|e| Error::io("cannot set the time of a file", e).with_path(path))
}

fn adopt(source: &dyn FileReading, file: &str, attempt: &Resumable, changes: &[&Change]) -> Result<Adopted> {
    if !changes.is_empty() || source.len() < ALIGNMENT as u64 {
        return Ok(Adopted::Refused("it is written".to_owned()));
    }
    let mut head = AlignedBuffer::new(ALIGNMENT);
    source.read_at(0, &mut head)?;
    attempt.writing().adopt(file, source, &head)
}

/// Copies a file, with its changes.
fn copy_file(
    source: &dyn FileReading,
    file: &str,
    attempt: &Resumable,
    buffer: &mut AlignedBuffer,
    changes: &[&Change],
) -> Result<()> {
    let length = source.len();
    let to = if length > SMALL { Some(attempt.writing().create(file, length)?) } else { None };
    let mut at = 0;
    loop {
        let count = (length - at).min(WINDOW as u64) as usize;
        let padded = count.next_multiple_of(ALIGNMENT);
        let bytes = &mut buffer[..padded];
        bytes[count..].fill(0);
        source.read_at(at, &mut bytes[..count])?;
        for change in changes {
            let place = change.offset.checked_sub(at).and_then(|place| usize::try_from(place).ok());
            if let Some(byte) = place.and_then(|place| bytes[..count].get_mut(place)) {
                if *byte != change.read {
                    let what = "the step was changed while it was repaired";
                    return Err(Error::new(ErrorKind::Conflict, what));
                }
                *byte = change.written;
            }
        }
        match &to {
            Some(to) => to.write_at(at, bytes)?,
            None => return attempt.writing().put(file, &bytes[..count]),
        }
        at += count as u64;
        if at >= length {
            break;
        }
    }
    to.map_or(Ok(()), |to| to.seal())
}
