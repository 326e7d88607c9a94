//! Marks: judgements of people about steps, kept beside the steps.
//!
//! A step never changes, so its mark is not stored in the step: `.marks.json` in the root has the marks of
//! all steps. A mark belongs to an attempt, so a step that is saved again has no mark. **Concurrency.** Each
//! change reads all marks and replaces the file by a rename. Of two concurrent changes, one may be lost.

use super::{Catalog, Problem};
use crate::error::{Error, ErrorKind, Result};
use crate::id::{Attempt, parse_step_name};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;

/// The version of the file.
const VERSION: u32 = 1;

/// A judgement of people about a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Mark {
    /// The contents of the step are not usable, for example because the loss diverged. [`Catalog::latest`]
    /// and [`Catalog::latest_valid`] skip the step, and it does not count for retention.
    Bad,
    /// The step is never pruned, by any retention or policy.
    Keep,
}

/// A marked step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Marked {
    /// The step, for people. Only `attempt` decides which step is marked.
    pub step: u64,
    /// The attempt that has the mark.
    pub attempt: Attempt,
    /// The mark.
    pub mark: Mark,
}

/// All marks of a root.
#[derive(Clone, Debug, Default)]
pub(super) struct Marks(Vec<Marked>);

#[derive(Serialize, Deserialize)]
struct File {
    version: u32,
    marks: Vec<Marked>,
}

impl Marks {
    /// Returns the mark of an attempt.
    pub fn of(&self, attempt: Attempt) -> Option<Mark> {
        self.0.iter().find(|marked| marked.attempt == attempt).map(|marked| marked.mark)
    }
}

impl Marks {
    /// True when a step of this number is marked keep. For steps that cannot be opened, whose attempt is not
    /// known.
    pub fn keep_number(&self, step: u64) -> bool {
        self.0.iter().any(|marked| marked.step == step && marked.mark == Mark::Keep)
    }
}

impl Catalog {
    /// Returns the marked steps, in order. Deleted steps may be among them.
    ///
    /// # Errors
    /// `Corrupt`, with the path, when `.marks.json` cannot be read as marks; an I/O error.
    pub fn marks(&self) -> Result<Vec<Marked>> {
        Ok(self.read_marks()?.0)
    }

    /// Marks `step`; None removes the mark. The change is durable when this call returns, and running
    /// executors respect it. Marks of deleted steps are removed.
    ///
    /// ```
    /// use ashore::{Catalog, CheckpointExecutor, StateDict, catalog::Mark};
    /// # use std::time::Duration;
    /// # let root = tempfile::tempdir().unwrap();
    /// let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).build()?;
    /// for step in [100, 200] {
    ///     let mut state = StateDict::new();
    ///     state.tensor("weights", vec![step as f32; 4])?;
    ///     executor.save(step, state)?.wait(Duration::from_secs(60))?;
    ///     executor.fence()?;
    /// }
    /// Catalog::open(root.path())?.mark(200, Some(Mark::Bad))?;
    /// assert_eq!(executor.latest()?.unwrap().step(), 100);
    /// # executor.shutdown(Duration::from_secs(60))?;
    /// # Ok::<(), ashore::Error>(())
    /// ```
    ///
    /// # Errors
    /// `NotFound` when the step does not exist, otherwise as [`Checkpoint::open`](crate::Checkpoint::open);
    /// `Invalid` when the storage keeps no marks; an I/O error.
    pub fn mark(&self, step: u64, mark: Option<Mark>) -> Result<()> {
        let attempt = self.checkpoint(step)?.attempt();
        let listed = self.list()?;
        let known: HashSet<Attempt> = listed.iter().map(|entry| entry.attempt).collect();
        // The attempt of a step that cannot be read at present is not known. Its mark stays as long as its
        // name exists.
        let readable: HashSet<&str> = listed.iter().map(|entry| entry.name.as_str()).collect();
        let names = self.storage.list()?;
        let unread = names.iter().filter(|name| !readable.contains(name.as_str()));
        let unread: HashSet<u64> = unread.filter_map(|name| parse_step_name(name)).collect();
        let mut marks = self.read_marks()?.0;
        marks.retain(|marked| {
            let there = known.contains(&marked.attempt) || unread.contains(&marked.step);
            marked.attempt != attempt && there
        });
        marks.extend(mark.map(|mark| Marked { step, attempt, mark }));
        marks.sort_by_key(|marked| marked.step);
        let mut text = serde_json::to_vec(&File { version: VERSION, marks })
            .map_err(|e| Error::internal("cannot write json").with_source(e))?;
        text.push(b'\n');
        self.storage.write_marks(&text)
    }

    pub(super) fn read_marks(&self) -> Result<Marks> {
        let Some(text) = self.storage.read_marks()? else { return Ok(Marks::default()) };
        let path = || self.storage.describe("").join(".marks.json");
        let file: File = serde_json::from_slice(&text).map_err(|e| {
            let what = "the marks of steps cannot be read; delete the file to go on without marks";
            Error::corrupt(what).with_source(e).with_path(path())
        })?;
        if file.version > VERSION {
            let what =
                format!("the marks of steps have a version that this library does not read version={}", file.version);
            return Err(Error::invalid(what).with_path(path()));
        }
        Ok(Marks(file.marks))
    }

    /// Returns the marks, for choosing a step. If they cannot be read, it returns none, so that a run can
    /// start nevertheless.
    pub(super) fn marks_or_none(&self) -> Marks {
        self.read_marks().unwrap_or_else(|error| {
            tracing::warn!(error = format_args!("{error:#}"), "marks of steps are ignored");
            Marks::default()
        })
    }

    /// The attempts that are marked bad.
    pub(crate) fn bad(&self) -> HashSet<Attempt> {
        let marks = self.marks_or_none();
        marks.0.iter().filter(|marked| marked.mark == Mark::Bad).map(|marked| marked.attempt).collect()
    }

    /// Returns the reason why a step that is marked bad is skipped.
    pub(super) fn marked_bad(&self, step: u64, name: &str) -> Problem {
        let error = Error::new(ErrorKind::Conflict, "the step is marked bad").with_step(step);
        self.problem(step, name.into(), error.with_path(self.storage.describe(name)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CheckpointExecutor, StateDict};
    use std::time::Duration;

    #[test]
    fn a_mark_of_a_damaged_step_outlives_the_marking_of_another_one() -> Result<()> {
        let root = tempfile::tempdir().unwrap();
        let executor = CheckpointExecutor::builder(root.path()).arena(4 << 20).chunk(1 << 20).build()?;
        for step in [10, 20] {
            executor.save(step, StateDict::new())?.wait(Duration::from_secs(60))?;
        }
        executor.shutdown(Duration::from_secs(60))?;
        let catalog = Catalog::open(root.path())?;
        catalog.mark(10, Some(Mark::Keep))?;
        let kept = catalog.marks()?;
        std::fs::write(catalog.checkpoint(10)?.path().join("manifest.json"), b"damaged").unwrap();
        catalog.mark(20, Some(Mark::Bad))?;
        assert_eq!(catalog.marks()?[..1], kept[..]);
        assert!(catalog.read_marks()?.keep_number(10));
        Ok(())
    }
}
