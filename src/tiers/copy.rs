//! Copies one published step from a storage to another.
//!
//! **Protocol.** The copy is an attempt of the destination with the identity that the step has in the source.
//! First every file is copied and compared with its digest on the way, then the manifest, then the
//! destination publishes the attempt.
//! **Completion.** `Ok` means durable in the destination. If the destination has the attempt already, it is
//! only made durable.
//! **Crash.** The destination has the whole step or none of it. A killed copy leaves an attempt, which a
//! sweep or the next session's take-over removes.
//! **Memory.** One buffer, of 8 MiB for files of up to 80 GB.

use crate::checkpoint::{Checkpoint, Failure, replaceable};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::columns::FileRow;
use crate::format::entries::MANIFEST;
use crate::format::manifest::Sealed;
use crate::guard;
use crate::id::Attempt;
use crate::memory::{ALIGNMENT, AlignedBuffer};
use crate::storage::shared::{Shared, SharedAttempt, SharedWriting};
use crate::storage::{FileReading, FileWriting, Storage, Sweep, Writing};
use std::path::PathBuf;
use std::sync::Arc;

/// The minimum number of bytes that are read, digested and written at once. Object stores take files in parts
/// of this length.
const PART: u64 = 8 << 20;

/// The maximum number of parts of one file in an object store.
const PARTS: u64 = 10_000;

/// The result of [`copy`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Copied {
    /// The step.
    pub step: u64,
    /// The attempt, the same in both storages.
    pub attempt: Attempt,
    /// The path of the copy.
    pub path: PathBuf,
    /// The total length of its files.
    pub bytes: u64,
    /// True if the destination had the attempt before this call. Nothing was copied then.
    pub already: bool,
}

/// Copies the open step `from` to the storage `to`, under the same name and as the same attempt, and makes it
/// durable there. `progress` is called with the bytes done and the total.
///
/// ```
/// use ashore::storage::{Memory, Storage};
/// use ashore::{Catalog, CheckpointExecutor, StateDict, tiers};
/// use std::{sync::Arc, time::Duration};
/// # let root = tempfile::tempdir().unwrap();
/// let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).build()?;
/// let mut state = StateDict::new();
/// state.tensor("weights", Arc::new(vec![1.0_f32; 4]))?;
/// executor.save(1, state)?.wait(Duration::from_secs(60))?;
///
/// let other: Arc<dyn Storage> = Arc::new(Memory::new());
/// let step = executor.latest()?.expect("step 1");
/// assert!(!tiers::copy(&step, &other, |_, _| {})?.already);
/// assert!(tiers::copy(&step, &other, |_, _| {})?.already);
/// assert_eq!(Catalog::over(other).latest()?.unwrap().attempt(), step.attempt());
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// # Errors
/// `Conflict` when the destination has another attempt at the step, or something that is no checkpoint, under
/// the name: nothing is replaced. `Corrupt`, naming file and path, when bytes of the source differ from what
/// was written: nothing is published. Otherwise errors of both storages.
pub fn copy(from: &Checkpoint, to: &Arc<dyn Storage>, progress: impl Fn(u64, u64)) -> Result<Copied> {
    let into = Into { to, owner: Owner::Caller, replaces: &|_| false };
    into.copy(from, &|done| {
        progress(done, from.bytes());
        Ok(())
    })
}

/// On whose behalf a copy is written.
pub(super) enum Owner<'a> {
    /// The caller's: the copy is an attempt that the storage itself begins.
    Caller,
    /// A session's that has taken the destination over: no copy of an older session can be published.
    Session { shared: &'a dyn Shared, generation: u64 },
}

/// The destination of copies.
pub(super) struct Into<'a> {
    pub to: &'a Arc<dyn Storage>,
    pub owner: Owner<'a>,
    /// Whether a copy replaces a step with this attempt, which the destination has under the same name.
    pub replaces: &'a dyn Fn(&Checkpoint) -> bool,
}

impl Into<'_> {
    /// See [`copy`]. `go_on` is called with the bytes done before each part. Its error ends the copy.
    pub fn copy(&self, from: &Checkpoint, go_on: &dyn Fn(u64) -> Result<()>) -> Result<Copied> {
        let (step, attempt, name) = (from.step(), from.attempt(), from.name());
        let path = self.to.describe(name);
        let copied = |already| Copied { step, attempt, path: path.clone(), bytes: from.bytes(), already };
        let overwrite = match self.present(from)? {
            Present::Same => {
                // The process that published the step may have been killed before the publish was durable.
                self.to.confirm(name)?;
                return Ok(copied(true));
            }
            Present::Nothing => false,
            Present::Replaceable => true,
        };
        go_on(0)?;
        let mut writing = self.begin(from, overwrite)?;
        let done = write(from, writing.files(), go_on).and_then(|()| writing.publish(overwrite));
        match done {
            Ok(()) => {
                guard::attempt("delete what a copy has replaced", || writing.files().settle());
                Ok(copied(false))
            }
            Err(error) => {
                if error.kind() != ErrorKind::Indeterminate {
                    guard::attempt("delete a failed copy", || writing.files().abandon());
                }
                Err(error.with_step(step))
            }
        }
    }

    /// Returns what the destination has under the name of the step.
    fn present(&self, from: &Checkpoint) -> Result<Present> {
        let conflict = |what: String| {
            let error = Error::new(ErrorKind::Conflict, what).with_step(from.step());
            error.with_path(self.to.describe(from.name()))
        };
        match Checkpoint::try_open(self.to, from.name()) {
            Err(Failure::Absent(_)) => Ok(Present::Nothing),
            Err(failure) if failure.is_damage() => {
                replaceable(self.to.as_ref(), from.name())?;
                Ok(Present::Replaceable)
            }
            Err(Failure::Foreign(_)) => Err(conflict("the directory at the destination is not a checkpoint".into())),
            Err(failure) => Err(failure.into_error().with_step(from.step())),
            Ok(there) if there.attempt() == from.attempt() => Ok(Present::Same),
            Ok(there) if (self.replaces)(&there) => Ok(Present::Replaceable),
            Ok(there) => {
                let (source, theirs) = (from.attempt(), there.attempt());
                let what = "the destination has another attempt at the step, which is not replaced";
                Err(conflict(format!("{what} attempt={source} there={theirs}")))
            }
        }
    }

    /// Begins the attempt. A dead process may have left an attempt of this identity: a sweep removes it.
    fn begin(&self, from: &Checkpoint, overwrite: bool) -> Result<Begun<'_>> {
        match self.try_begin(from, overwrite) {
            Err(error) if matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Invalid | ErrorKind::Unavailable) => {
                self.to.sweep(Sweep::default())?;
                self.try_begin(from, overwrite)
            }
            begun => begun,
        }
    }

    fn try_begin(&self, from: &Checkpoint, overwrite: bool) -> Result<Begun<'_>> {
        let (name, attempt) = (from.name(), from.attempt());
        match self.owner {
            Owner::Caller => self.to.begin(name, attempt, overwrite).map(Begun::Plain),
            Owner::Session { shared, generation } => {
                let writing = shared.begin(SharedAttempt { name, attempt, generation }, overwrite)?;
                Ok(Begun::Owned { writing, shared, generation })
            }
        }
    }
}

enum Present {
    Nothing,
    Same,
    /// Another attempt, or a damaged step, that the copy replaces.
    Replaceable,
}

/// An attempt of the destination.
enum Begun<'a> {
    Plain(Arc<dyn Writing>),
    Owned { writing: Arc<dyn SharedWriting>, shared: &'a dyn Shared, generation: u64 },
}

impl Begun<'_> {
    fn files(&self) -> &dyn Writing {
        match self {
            Self::Plain(writing) => writing.as_ref(),
            Self::Owned { writing, .. } => writing.as_ref(),
        }
    }

    fn publish(&mut self, overwrite: bool) -> Result<()> {
        if let Self::Owned { writing, shared, generation } = self {
            // From here on a newer session can forbid the publish only if it was recorded before this claim.
            writing.claim()?;
            check_newest(*shared, *generation)?;
        }
        self.files().publish(overwrite)
    }
}

/// Checks that the session of this generation is still the newest.
///
/// # Errors
/// `Conflict` if it is not.
pub(super) fn check_newest(shared: &dyn Shared, generation: u64) -> Result<()> {
    match shared.newest()? {
        Some((newest, record)) if newest > generation => {
            let who = record.map_or_else(String::new, |r| format!(" host={} pid={}", r.host, r.pid));
            let why = "a newer session has taken the tier over: does the job run elsewhere?";
            Err(Error::new(ErrorKind::Conflict, format!("{why} ours={generation} newest={newest}{who}")))
        }
        _ => Ok(()),
    }
}

/// Writes every file of the step, the manifest last.
fn write(from: &Checkpoint, to: &dyn Writing, go_on: &dyn Fn(u64) -> Result<()>) -> Result<()> {
    let mut pipe = Pipe { to, go_on, buffer: AlignedBuffer::new(0), done: 0 };
    let opened = &from.opened;
    let locate = |name: &str| {
        let path = from.path().join(name);
        move |error: Error| if error.path().is_some() { error } else { error.with_path(&path) }
    };
    let mut tables: Vec<(String, u64)> = Vec::new();
    for (number, row) in opened.index.all_files().map_err(|e| from.unlisted(e))?.into_iter().enumerate() {
        let entry = &row.entry;
        let file = opened.files.get(number)?;
        let copied = pipe.file(file, &entry.name, entry.length).map_err(locate(&entry.name))?;
        if copied != entry.digest {
            let what = format!("a file is not what was written expected={} found={copied}", entry.digest);
            return Err(from.located(Error::corrupt(what)).with_path(from.path().join(&entry.name)));
        }
        tables.extend(row.rows.map(|(length, _)| (FileRow::rows_name(&entry.name), length)));
    }
    tables.extend(from.manifest().tables.iter().map(|table| (table.name.clone(), table.length)));
    let mut copies = Vec::with_capacity(tables.len());
    for (name, length) in &tables {
        let file = opened.reading.open(name).map_err(locate(name))?;
        copies.push(pipe.file(file.as_ref(), name, *length).map_err(locate(name))?);
    }
    // A table's digests cover its pages, not the file. So the pages are checked first. Then every table is
    // read again and compared with its copy.
    if let Some((name, _)) = opened.index.damaged()?.first() {
        return Err(from.located(Error::corrupt("a table is not what was written")).with_path(from.path().join(name)));
    }
    for ((name, length), copied) in tables.iter().zip(copies) {
        let file = opened.reading.open(name).map_err(locate(name))?;
        if pipe.digest(file.as_ref(), *length).map_err(locate(name))? != copied {
            let what = "a table read twice was not the same";
            return Err(from.located(Error::corrupt(what)).with_path(from.path().join(name)));
        }
    }
    let manifest = manifest(from).map_err(locate(MANIFEST))?;
    go_on(pipe.done)?;
    to.put(MANIFEST, &manifest)
}

/// Returns the bytes of the manifest, which contains the digest of itself.
fn manifest(from: &Checkpoint) -> Result<AlignedBuffer> {
    let file = from.opened.reading.open(MANIFEST)?;
    let no_memory = || Error::new(ErrorKind::Busy, format!("no memory for a manifest bytes={}", file.len()));
    let length = usize::try_from(file.len()).map_err(|_| no_memory())?;
    let mut bytes = AlignedBuffer::try_new(length).ok_or_else(no_memory)?;
    file.read_at(0, &mut bytes)?;
    if Sealed::parse(&bytes)?.step() != from.step() {
        return Err(Error::corrupt("the manifest changed while the step was copied"));
    }
    Ok(bytes)
}

/// The buffer and the progress of a copy.
struct Pipe<'a> {
    to: &'a dyn Writing,
    go_on: &'a dyn Fn(u64) -> Result<()>,
    buffer: AlignedBuffer,
    /// Bytes copied so far.
    done: u64,
}

impl Pipe<'_> {
    /// Copies a file, and returns the digest of the bytes that were written.
    fn file(&mut self, from: &dyn FileReading, name: &str, length: u64) -> Result<Digest> {
        check_length(from, length)?;
        let to: Arc<dyn FileWriting> = self.to.create(name, length)?;
        let digest = self.read(from, length, |pipe, offset, bytes| {
            (pipe.go_on)(pipe.done + offset)?;
            to.write_at(offset, bytes)
        })?;
        to.seal()?;
        self.done += length;
        Ok(digest)
    }

    /// The digest of a file.
    fn digest(&mut self, from: &dyn FileReading, length: u64) -> Result<Digest> {
        check_length(from, length)?;
        self.read(from, length, |_, _, _| Ok(()))
    }

    /// Reads a file part by part, and returns its digest.
    fn read(
        &mut self,
        from: &dyn FileReading,
        length: u64,
        each: impl Fn(&Self, u64, &[u8]) -> Result<()>,
    ) -> Result<Digest> {
        let part = part(length);
        let room = usize::try_from(part.min(length)).unwrap_or(usize::MAX).next_multiple_of(ALIGNMENT);
        let mut buffer = std::mem::replace(&mut self.buffer, AlignedBuffer::new(0));
        if buffer.len() < room {
            buffer = AlignedBuffer::try_new(room)
                .ok_or_else(|| Error::new(ErrorKind::Busy, format!("no memory to copy a file bytes={room}")))?;
        }
        let (mut digest, mut offset) = (Digest::EMPTY, 0);
        while offset < length {
            let bytes = (length - offset).min(part);
            let bytes = &mut buffer[..usize::try_from(bytes).unwrap_or(usize::MAX)];
            from.read_at(offset, bytes)?;
            digest = digest.then(Digest::of(bytes), bytes.len() as u64);
            each(self, offset, bytes)?;
            offset += bytes.len() as u64;
        }
        self.buffer = buffer;
        Ok(digest)
    }
}

/// The number of bytes of a file of this length that are copied at once.
fn part(length: u64) -> u64 {
    PART.max(length.div_ceil(PARTS)).next_multiple_of(ALIGNMENT as u64)
}

fn check_length(file: &dyn FileReading, length: u64) -> Result<()> {
    if file.len() == length {
        return Ok(());
    }
    let found = file.len();
    Err(Error::corrupt(format!("a file has the wrong length expected_bytes={length} found_bytes={found}")))
}
