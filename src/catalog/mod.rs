//! The catalog of the steps of a directory: which steps exist, which is the newest, and which may be deleted.
//!
//! **Consistency.** A step is listed only when its manifest parses, its tables have the right length and
//! digest, every file has its length (checked for steps of up to 1000 files), and every shard belongs to this
//! step and attempt. So nothing incomplete is ever listed. Directories that this library did not make are
//! foreign: they are never listed and never touched. **Names.** Steps are compared as numbers and listed
//! once. If a step has several names (`step-00000100` and `ckpt-100`), the name that this library would give
//! comes first, then the others in lexicographic order. The first name that can be opened is the step. The
//! others are problems of the kind `Conflict`, and so is a directory whose name gives another step than its
//! manifest. **Damage.** A step is damaged when this library made it and its bytes are not what was written.
//! Listing, overwriting, replacing and pruning all use the same function to decide that. **Crash.** Nothing
//! is deleted before enough of the remaining steps are durable and one of them is sound. Each step is deleted
//! atomically. **Marks.** A step that is [marked](Mark) bad is neither the newest nor counted. A step that is
//! marked keep is never deleted. **Sharing.** Steps may share files. The deletion of a step removes only one
//! name of a shared file.

mod branch;
mod marks;
#[cfg(all(test, loom))]
mod models;
mod policy;
mod prune;
mod retention;
mod sharing;
mod sweep;

pub(crate) use branch::{Hold, Keeping};
pub use marks::{Mark, Marked};
pub(crate) use policy::ranking;
pub use policy::{Best, Candidate, PreservationPolicy};
pub use prune::{PruneOptions, Pruned, Verify};
pub use retention::Retention;
pub use sharing::Sharing;

use crate::checkpoint::{Checkpoint, Failure};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Attempt, parse_step_name, step_name};
use crate::storage::{self, Storage};
use crate::sync::{Condvar, Mutex, MutexGuard, lock};
use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

/// The catalog of the steps of a storage. Clones share what they know about durability.
///
/// ```
/// use ashore::{Catalog, CheckpointExecutor, PruneOptions, Retention, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # let root = tempfile::tempdir().unwrap();
/// let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).build()?;
/// for step in [100, 200, 300] {
///     let mut state = StateDict::new();
///     state.tensor("weights", Arc::new(vec![step as f32; 4]))?;
///     executor.save(step, state)?.wait(Duration::from_secs(60))?;
///     executor.fence()?;
/// }
/// executor.shutdown(Duration::from_secs(60))?;
///
/// let catalog = Catalog::open(root.path())?; // without an executor
/// assert_eq!(catalog.latest()?.unwrap().step(), 300);
/// let pruned = catalog.prune(&Retention::last(2), PruneOptions::new())?;
/// assert_eq!(pruned.removed[0].step, 100);
/// assert_eq!(catalog.list()?.len(), 2);
/// let found = catalog.latest_valid()?.unwrap();
/// assert_eq!((found.checkpoint.step(), found.skipped.len()), (300, 0));
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Catalog {
    storage: Arc<dyn Storage>,
    known: Arc<Mutex<Known>>,
    /// Signals that a name was removed from `Known::going`.
    gone: Arc<Condvar>,
}

/// What this process knows about attempts without reading the storage.
#[derive(Debug, Default)]
struct Known {
    durable: HashSet<Attempt>,
    /// Attempts that this process published, in that order.
    own: Vec<Attempt>,
    doubtful: HashSet<Attempt>,
    /// Attempts that this process published, or read in full and found undamaged.
    sound: HashSet<Attempt>,
    /// Attempts that this process read and found damaged, with the damage of each.
    damaged: HashMap<Attempt, Error>,
    /// Names of steps that differ from the names that this library gives, by step. None: not searched yet.
    aliases: Option<HashMap<u64, Vec<String>>>,
    /// Attempts that may become visible at any moment, with their names.
    pending: HashMap<Attempt, String>,
    /// Names that a prune is removing.
    going: HashSet<String>,
}

/// A step that exists.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Entry {
    /// The step.
    pub step: u64,
    /// The name of its directory.
    pub name: String,
    /// Its path.
    #[serde(serialize_with = "as_text")]
    pub path: PathBuf,
    /// The total length of its files in bytes.
    pub bytes: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// When it was written, by the clock of the storage; None if unknown.
    #[serde(skip)]
    pub modified: Option<SystemTime>,
}

/// A directory that this library made and that has the name of a step, but is not listed. It cannot be opened
/// (`Corrupt` when it is damaged), or it conflicts with another directory (`Conflict`).
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Problem {
    /// The step in its name.
    pub step: u64,
    /// The name of its directory.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
    /// Why the directory is not listed.
    pub error: Error,
}

/// The newest sound step, and the newer steps that were skipped.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Found {
    /// The step; all of its bytes were just checked.
    pub checkpoint: Checkpoint,
    /// The newer steps that were skipped, newest first, and the reason for each.
    pub skipped: Vec<Problem>,
}

impl Catalog {
    /// The steps in `root`: a directory, or a URL such as `s3://bucket/prefix`.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory, or nothing was saved under the URL; `Invalid` for a URL
    /// that cannot be used.
    pub fn open(root: impl AsRef<Path>) -> Result<Self> {
        Ok(Self::over(storage::at(root)?))
    }

    /// The steps of `storage`.
    pub fn over(storage: Arc<dyn Storage>) -> Self {
        Self { storage, known: Arc::default(), gone: Arc::default() }
    }

    /// Lists every step, oldest first. The [module](self) docs define what counts as a step.
    ///
    /// # Errors
    /// When the directory cannot be read. A step that cannot be opened is not an error: see
    /// [`Catalog::problems`].
    pub fn list(&self) -> Result<Vec<Entry>> {
        Ok(self.survey()?.0)
    }

    /// Returns the directories that look like a step of this library but are not listed, oldest first, with
    /// the reason.
    ///
    /// # Errors
    /// As [`Catalog::list`].
    pub fn problems(&self) -> Result<Vec<Problem>> {
        Ok(self.survey()?.1)
    }

    /// Returns [`Catalog::list`] and [`Catalog::problems`] in one pass.
    ///
    /// # Errors
    /// As [`Catalog::list`].
    pub fn survey(&self) -> Result<(Vec<Entry>, Vec<Problem>)> {
        let (mut entries, mut problems) = (Vec::<Entry>::new(), Vec::new());
        let (all, broken) = self.everything()?;
        for entry in all {
            match entries.last() {
                Some(first) if first.step == entry.step => {
                    let what = format!("the step also exists under another name name={:?}", first.name);
                    let error = Error::new(ErrorKind::Conflict, what).with_step(entry.step).with_path(&entry.path);
                    problems.push(self.problem(entry.step, entry.name, error));
                }
                _ => entries.push(entry),
            }
        }
        problems.extend(broken);
        problems.sort_by_key(|problem| problem.step);
        Ok((entries, problems))
    }

    /// Returns every name under which a step can be opened, ordered by step and preference, and the names
    /// that cannot be opened.
    fn everything(&self) -> Result<(Vec<Entry>, Vec<Problem>)> {
        let (mut entries, mut problems) = (Vec::new(), Vec::new());
        for (step, name) in self.names()? {
            match self.try_open(step, &name) {
                Ok(Some(checkpoint)) => entries.push(Entry {
                    step,
                    path: checkpoint.path().into(),
                    bytes: checkpoint.bytes(),
                    attempt: checkpoint.attempt(),
                    modified: checkpoint.modified(),
                    name,
                }),
                Ok(None) => {}
                Err(error) => problems.push(self.problem(step, name, error)),
            }
        }
        Ok((entries, problems))
    }

    /// Opens the newest listed step that is not [marked](Mark) bad. None when there is no such step. Tensor
    /// data is checked when it is read.
    ///
    /// # Errors
    /// When the directory cannot be read, or a newer step cannot be read at present (an I/O error, missing
    /// permission): the caller decides whether to start from an older one.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        let marks = self.marks_or_none();
        for (step, name) in newest_first(self.names()?) {
            match self.try_open(step, &name) {
                Ok(None) => {}
                Ok(Some(checkpoint)) if marks.of(checkpoint.attempt()) == Some(Mark::Bad) => {
                    tracing::warn!(step, %name, "a newer step is skipped: it is marked bad");
                }
                Ok(Some(checkpoint)) => return Ok(Some(checkpoint)),
                Err(error) if matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Conflict) => {
                    tracing::warn!(step, %name, error = format_args!("{error:#}"), "a newer step is skipped");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Opens the step `step`, never another step.
    ///
    /// # Errors
    /// `NotFound` when it does not exist; otherwise as [`Checkpoint::open`].
    pub fn checkpoint(&self, step: u64) -> Result<Checkpoint> {
        let mut first = None;
        for (_, name) in self.names()?.into_iter().filter(|(there, _)| *there == step) {
            match self.try_open(step, &name) {
                Ok(Some(checkpoint)) => return Ok(checkpoint),
                Ok(None) => {}
                Err(error) => {
                    first.get_or_insert(error);
                }
            }
        }
        Err(first.unwrap_or_else(|| {
            let missing = Error::new(ErrorKind::NotFound, "no such step");
            missing.with_step(step).with_path(self.storage.describe(&step_name(step)))
        }))
    }

    /// Finds the newest step whose bytes are all as written and that is not [marked](Mark) bad, and reports
    /// the skipped steps. None when there is no step. Reads every byte of the steps that it examines.
    ///
    /// # Errors
    /// When the directory cannot be read. When there are steps but none is sound: the damage of the newest
    /// step.
    pub fn latest_valid(&self) -> Result<Option<Found>> {
        let (mut skipped, marks) = (Vec::new(), self.marks_or_none());
        for (step, name) in newest_first(self.names()?) {
            let found = self.try_open(step, &name);
            if let Ok(Some(checkpoint)) = &found
                && marks.of(checkpoint.attempt()) == Some(Mark::Bad)
            {
                tracing::warn!(step, %name, "a step is skipped: it is marked bad");
                skipped.push(self.marked_bad(step, &name));
                continue;
            }
            match found.and_then(|found| self.read_whole(found)) {
                Ok(Some(checkpoint)) => return Ok(Some(Found { checkpoint, skipped })),
                Ok(None) => {}
                Err(error) => {
                    tracing::warn!(step, %name, error = format_args!("{error:#}"), "a step is skipped");
                    skipped.push(self.problem(step, name, error));
                }
            }
        }
        skipped.into_iter().next().map_or(Ok(None), |problem| Err(problem.error))
    }

    /// Returns the names of steps, ordered by step, then by preference.
    pub(crate) fn names(&self) -> Result<Vec<(u64, String)>> {
        let mut names: Vec<_> =
            self.storage.list()?.into_iter().filter_map(|name| Some((parse_step_name(&name)?, name))).collect();
        names.sort_by_cached_key(|(step, name)| (*step, *name != step_name(*step), name.clone()));
        Ok(names)
    }

    /// Returns the checkpoint if every byte of it is as written, and records the result.
    pub(crate) fn read_whole(&self, checkpoint: Option<Checkpoint>) -> Result<Option<Checkpoint>> {
        let Some(checkpoint) = checkpoint else { return Ok(None) };
        let found = checkpoint.damaged(&checkpoint.verify()?);
        let mut known = self.known();
        let Some(error) = found else {
            known.sound.insert(checkpoint.attempt());
            return Ok(Some(checkpoint));
        };
        if error.kind() == ErrorKind::Corrupt {
            known.sound.remove(&checkpoint.attempt());
            known.damaged.insert(checkpoint.attempt(), error.clone());
        }
        Err(error)
    }

    /// Returns None when the directory is foreign or no longer exists.
    fn try_open(&self, step: u64, name: &str) -> Result<Option<Checkpoint>> {
        match Checkpoint::try_open(&self.storage, name) {
            Ok(checkpoint) if checkpoint.step() == step => Ok(Some(checkpoint)),
            Ok(checkpoint) => {
                let what =
                    format!("the directory name and the manifest name different steps manifest={}", checkpoint.step());
                Err(Error::new(ErrorKind::Conflict, what).with_step(step).with_path(checkpoint.path()))
            }
            Err(Failure::Absent(_) | Failure::Foreign(_)) => Ok(None),
            Err(failure) => Err(failure.into_error().with_step(step)),
        }
    }

    fn problem(&self, step: u64, name: String, error: Error) -> Problem {
        let path = self.storage.describe(&name);
        Problem { step, name, path, error }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        lock(&self.known)
    }
}

fn newest_first(mut names: Vec<(u64, String)>) -> Vec<(u64, String)> {
    names.sort_by_key(|(step, _)| Reverse(*step));
    names
}

/// Serializes a path as text. Bytes that are not UTF-8 are replaced, because JSON cannot hold them.
fn as_text<S: serde::Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}
