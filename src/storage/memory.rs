//! Storage in host memory, for tests and for programs that keep checkpoints in RAM.
//!
//! [`Memory`] keeps all promises of the local storage, except that its steps do not survive the process. It
//! is stricter: it refuses faults that a disk might accept (a misaligned or repeated write, a hole, a file
//! that was never sealed). So a program that works with it breaks no rule of [`Storage`].

use super::name::{check_file, check_step};
use super::{FileReading, FileWriting, IoMode, Reading, Remnant, State, Storage, Sweep, Swept, Writing};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::memory::ALIGNMENT;
use crate::sync::{Mutex, lock};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

pub(crate) type Files = BTreeMap<String, Arc<Vec<u8>>>;

/// Steps in host memory. Clones share them.
///
/// ```
/// use ashore::storage::Memory;
/// use ashore::{Catalog, CheckpointExecutor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// let storage = Memory::new();
/// let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(storage.clone()));
/// let executor = builder.arena(16 << 20).chunk(1 << 20).build()?;
/// let mut state = StateDict::new();
/// state.value("epoch", &3)?;
/// executor.save(1, state)?.wait(Duration::from_secs(60))?;
/// let newest = Catalog::over(Arc::new(storage)).latest()?.expect("step 1");
/// assert_eq!(newest.value::<u32>("epoch")?, 3);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<Root>>);

#[derive(Default)]
struct Root {
    steps: BTreeMap<String, Arc<Files>>,
    attempts: Vec<(String, Attempt, Weak<MemoryWriting>)>,
    latest: Option<String>,
    marks: Option<Vec<u8>>,
}

impl Root {
    /// Removes an attempt that has ended from the list that sweeps read.
    fn forget(&mut self, attempt: Attempt) {
        self.attempts.retain(|(_, known, _)| *known != attempt);
    }
}

impl Memory {
    /// An empty storage.
    pub fn new() -> Self {
        Self::default()
    }

    /// A storage with one step, `name`, that consists of these files.
    pub(crate) fn over(name: &str, files: Arc<Files>) -> Self {
        let storage = Self::new();
        lock(&storage.0).steps.insert(name.into(), files);
        storage
    }

    /// The files of a step.
    pub(crate) fn files(&self, name: &str) -> Option<Arc<Files>> {
        lock(&self.0).steps.get(name).cloned()
    }

    /// The step that [`Storage::hint`] last wrote.
    pub fn latest(&self) -> Option<String> {
        lock(&self.0).latest.clone()
    }
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(lock(&self.0).steps.keys()).finish()
    }
}

impl Storage for Memory {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        check_step(name)?;
        let mut root = lock(&self.0);
        if !overwrite && root.steps.contains_key(name) {
            return Err(conflict("the step exists", name));
        }
        root.attempts.retain(|(.., writing)| writing.strong_count() > 0);
        if root.attempts.iter().any(|(_, known, _)| *known == attempt) {
            return Err(conflict("the attempt was begun before", name));
        }
        let writing = Arc::new(MemoryWriting {
            root: self.0.clone(),
            name: name.into(),
            attempt,
            stage: Mutex::new(Stage::Open(BTreeMap::new())),
        });
        root.attempts.push((name.into(), attempt, Arc::downgrade(&writing)));
        Ok(writing)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        check_step(name)?;
        match lock(&self.0).steps.get(name) {
            Some(step) => Ok(Arc::new(MemoryReading { path: self.describe(name), files: step.clone() })),
            None => Err(missing(name)),
        }
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(lock(&self.0).steps.keys().cloned().collect())
    }

    fn confirm(&self, name: &str) -> Result<()> {
        check_step(name)?;
        if lock(&self.0).steps.contains_key(name) { Ok(()) } else { Err(missing(name)) }
    }

    fn remove(&self, name: &str) -> Result<()> {
        check_step(name)?;
        lock(&self.0).steps.remove(name).map(drop).ok_or_else(|| missing(name))
    }

    fn remove_opened(&self, name: &str, opened: &dyn Reading) -> Result<()> {
        check_step(name)?;
        let mut root = lock(&self.0);
        let there = root.steps.get(name).ok_or_else(|| missing(name))?;
        if opened.identity() != Some(identity(there)) {
            return Err(conflict("the step was replaced meanwhile; it was not removed", name));
        }
        root.steps.remove(name);
        Ok(())
    }

    fn sweep(&self, how: Sweep) -> Result<Swept> {
        let mut swept = Swept::default();
        lock(&self.0).attempts.retain(|(name, attempt, writing)| {
            let alive = writing.strong_count() > 0;
            let (state, why) = if alive { (State::Live, "live") } else { (State::Dead, "it was dropped") };
            let name = format!(".{name}.{attempt}.tmp");
            let remnant = Remnant { name, state, why: why.into(), age: None, bytes: 0 };
            if alive { &mut swept.left } else { &mut swept.removed }.push(remnant);
            alive || how.dry_run
        });
        Ok(swept)
    }

    fn hint(&self, name: &str) -> Result<()> {
        check_step(name)?;
        lock(&self.0).latest = Some(name.into());
        Ok(())
    }

    fn read_marks(&self) -> Result<Option<Vec<u8>>> {
        Ok(lock(&self.0).marks.clone())
    }

    fn write_marks(&self, marks: &[u8]) -> Result<()> {
        lock(&self.0).marks = Some(marks.into());
        Ok(())
    }

    fn describe(&self, name: &str) -> PathBuf {
        Path::new("memory:").join(name)
    }
}

struct MemoryWriting {
    root: Arc<Mutex<Root>>,
    name: String,
    attempt: Attempt,
    stage: Mutex<Stage>,
}

enum Stage {
    Open(BTreeMap<String, Arc<MemoryFile>>),
    Published,
    Settled,
    Abandoned,
}

impl fmt::Debug for MemoryWriting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.name, self.attempt)
    }
}

impl MemoryWriting {
    fn add(&self, file: &str, new: MemoryFile) -> Result<Arc<MemoryFile>> {
        check_file(file).map_err(|e| e.with_kind(ErrorKind::Invalid))?;
        match &mut *lock(&self.stage) {
            Stage::Open(files) if files.contains_key(file) => Err(conflict("the file was made before", file)),
            Stage::Open(files) => Ok(files.entry(file.into()).or_insert(Arc::new(new)).clone()),
            _ => Err(refused("a file was added to an attempt that is over", file)),
        }
    }
}

impl Writing for MemoryWriting {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        let no_room = || Error::new(ErrorKind::NoSpace, format!("no memory for a file len={len}")).with_path(file);
        let len = usize::try_from(len).map_err(|_| no_room())?;
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(len).map_err(|_| no_room())?;
        bytes.resize(len, 0);
        let contents = Contents::Open { bytes, written: vec![false; len.div_ceil(ALIGNMENT)] };
        Ok(self.add(file, MemoryFile { name: file.into(), contents: Mutex::new(contents) })?)
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let contents = Mutex::new(Contents::Sealed(Arc::new(bytes.to_vec())));
        self.add(file, MemoryFile { name: file.into(), contents }).map(drop)
    }

    fn publish(&self, overwrite: bool) -> Result<()> {
        let mut stage = lock(&self.stage);
        let Stage::Open(open) = &*stage else {
            return Err(refused("an attempt was published that is over", &self.name));
        };
        if open.is_empty() {
            return Err(refused("an attempt without files was published", &self.name));
        }
        let mut files = Files::new();
        for (name, file) in open {
            match &*lock(&file.contents) {
                Contents::Sealed(bytes) => files.insert(name.clone(), bytes.clone()),
                _ => return Err(refused("an attempt was published before a file was sealed", name)),
            };
        }
        let mut root = lock(&self.root);
        if !overwrite && root.steps.contains_key(&self.name) {
            return Err(conflict("the step exists", &self.name));
        }
        root.steps.insert(self.name.clone(), Arc::new(files));
        root.forget(self.attempt);
        *stage = Stage::Published;
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        let mut stage = lock(&self.stage);
        if !matches!(*stage, Stage::Published) {
            return Err(refused("an attempt was settled that was not just published", &self.name));
        }
        *stage = Stage::Settled;
        Ok(())
    }

    fn abandon(&self) -> Result<()> {
        let mut stage = lock(&self.stage);
        if matches!(*stage, Stage::Published | Stage::Settled) {
            return Err(refused("a published attempt was abandoned", &self.name));
        }
        *stage = Stage::Abandoned;
        lock(&self.root).forget(self.attempt);
        Ok(())
    }
}

struct MemoryFile {
    name: String,
    contents: Mutex<Contents>,
}

enum Contents {
    /// `written` has an entry for each run of [`ALIGNMENT`] bytes.
    Open {
        bytes: Vec<u8>,
        written: Vec<bool>,
    },
    Sealed(Arc<Vec<u8>>),
    /// A seal failed; the attempt is lost.
    Lost,
}

impl fmt::Debug for MemoryFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl FileWriting for MemoryFile {
    fn write_at(&self, offset: u64, from: &[u8]) -> Result<()> {
        let refuse = |what: &str| {
            let place = format!("{what} offset={offset} len={}", from.len());
            Err(refused(&place, &self.name))
        };
        let mut contents = lock(&self.contents);
        let Contents::Open { bytes, written } = &mut *contents else {
            return refuse("a file was written after it was sealed");
        };
        let room = bytes.len().next_multiple_of(ALIGNMENT);
        let Some((start, end)) = usize::try_from(offset).ok().and_then(|at| Some((at, at.checked_add(from.len())?)))
        else {
            return refuse("a write ends beyond any file");
        };
        if !start.is_multiple_of(ALIGNMENT) || !from.as_ptr().addr().is_multiple_of(ALIGNMENT) {
            return refuse("a write is not aligned");
        }
        if from.is_empty() || end > room {
            return refuse("a write is empty or ends beyond the file");
        }
        if !end.is_multiple_of(ALIGNMENT) && end != bytes.len() {
            return refuse("a write within the file has an odd length");
        }
        let Some(pages) = written.get_mut(start / ALIGNMENT..end.div_ceil(ALIGNMENT)) else {
            return refuse("a write ends beyond the file");
        };
        if pages.contains(&true) {
            return refuse("bytes were written twice");
        }
        let kept = end.min(bytes.len());
        if let (Some(to), Some(from)) = (bytes.get_mut(start..kept), from.get(..kept - start)) {
            to.copy_from_slice(from);
        }
        pages.fill(true);
        Ok(())
    }

    fn seal(&self) -> Result<()> {
        let mut contents = lock(&self.contents);
        match std::mem::replace(&mut *contents, Contents::Lost) {
            Contents::Open { bytes, written } if written.iter().all(|&page| page) => {
                *contents = Contents::Sealed(Arc::new(bytes));
                Ok(())
            }
            Contents::Open { .. } => Err(refused("a file was sealed before all of it was written", &self.name)),
            over => {
                *contents = over;
                Err(refused("a file was sealed twice", &self.name))
            }
        }
    }

    fn mode(&self) -> IoMode {
        IoMode::Buffered
    }
}

#[derive(Debug)]
struct MemoryReading {
    path: PathBuf,
    files: Arc<Files>,
}

impl Reading for MemoryReading {
    fn open(&self, file: &str) -> Result<Arc<dyn FileReading>> {
        check_file(file)?;
        let path = self.path.join(file);
        match self.files.get(file) {
            Some(bytes) => Ok(Arc::new(Bytes { path, bytes: bytes.clone() })),
            None => Err(Error::new(ErrorKind::NotFound, "no such file").with_path(path)),
        }
    }

    fn identity(&self) -> Option<(u64, u64)> {
        Some(identity(&self.files))
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(self.files.keys().cloned().collect())
    }
}

/// The address of the files: unique among steps that exist or are open.
fn identity(files: &Arc<Files>) -> (u64, u64) {
    (0, Arc::as_ptr(files).addr() as u64)
}

struct Bytes {
    path: PathBuf,
    bytes: Arc<Vec<u8>>,
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.path, f)
    }
}

impl FileReading for Bytes {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        match self.bytes.get(start..start.saturating_add(buffer.len())) {
            Some(bytes) => buffer.copy_from_slice(bytes),
            None => {
                let (len, wanted) = (self.bytes.len(), buffer.len());
                let what = format!("a file ends too early offset={offset} wanted={wanted} len={len}");
                return Err(Error::corrupt(what).with_path(&self.path));
            }
        }
        Ok(())
    }
}

fn refused(what: &str, path: &str) -> Error {
    Error::invalid(what).with_path(path)
}

fn conflict(what: &str, path: &str) -> Error {
    Error::new(ErrorKind::Conflict, what).with_path(path)
}

fn missing(name: &str) -> Error {
    Error::new(ErrorKind::NotFound, "no such step").with_path(Path::new("memory:").join(name))
}

#[cfg(test)]
mod tests;
