//! Pruning: selects the steps to delete, checks the remaining steps, deletes, and reports the result.

use super::marks::Marks;
use super::sharing::SharedFiles;
use super::{Catalog, Entry, Mark, PreservationPolicy, Problem, Retention};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::telemetry::meters;
use std::collections::{BTreeSet, HashSet};

/// How the remaining steps are checked before other steps are deleted.
///
/// Remaining steps must be complete and durable in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verify {
    /// No further check.
    No,
    /// At least one remaining step is sound: this process wrote it, or has read all of it (in this call, if
    /// not before).
    #[default]
    One,
    /// Every remaining step that counts is sound.
    All,
}

/// How steps are deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PruneOptions {
    /// Delete nothing; only report what would be deleted.
    pub dry_run: bool,
    /// How the remaining steps are checked.
    pub verify: Verify,
}

impl PruneOptions {
    /// Deletes, once one remaining step is known to be sound.
    pub fn new() -> Self {
        Self::default()
    }

    /// If true, nothing is deleted.
    #[must_use]
    pub fn dry_run(mut self, dry_run: bool) -> Self {
        self.dry_run = dry_run;
        self
    }

    /// Sets what is checked about the remaining steps.
    #[must_use]
    pub fn verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }
}

/// The steps that a prune deleted, or would delete. A step that cannot be deleted does not stop the deletion
/// of the others.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Pruned {
    /// Removed steps, oldest first.
    pub removed: Vec<Entry>,
    /// Damaged steps that were removed, and what was wrong with each.
    pub damaged: Vec<Problem>,
    /// Kept steps, oldest first.
    pub kept: Vec<Entry>,
    /// Kept steps that do not count because they are not durable or are damaged.
    pub doubtful: Vec<Problem>,
    /// Steps that could not be deleted, and why. A step that is also in `removed` is no longer listed; the
    /// rest of its bytes stays in a hidden directory for [`Catalog::sweep`].
    pub failed: Vec<Problem>,
    /// The bytes of the files of `removed`, without files that still have another name, such as files that
    /// remaining steps share. Blocks that clones share are counted although they stay, because file systems
    /// do not tell which blocks these are.
    pub freed: u64,
    /// The files with several names in `removed`.
    shared: SharedFiles,
    /// Names that another prune removed while this prune ran.
    vanished: HashSet<String>,
    /// The marks of steps when this prune began.
    marks: Marks,
}

impl Pruned {
    /// Returns `self` if everything that had to be deleted was deleted.
    ///
    /// # Errors
    /// Why the first step could not be deleted.
    pub fn complete(self) -> Result<Self> {
        match self.failed.first() {
            Some(problem) => Err(problem.error.clone().with_step(problem.step).with_path(&problem.path)),
            None => Ok(self),
        }
    }
}

impl Catalog {
    /// Deletes the steps that `retention` does not keep, oldest first. Leaves foreign directories, attempts,
    /// steps that cannot be opened and steps that are [marked](Mark) keep. Steps that are marked bad do not
    /// count.
    ///
    /// Steps of another process are made durable before they count. If that fails, or if a step is damaged,
    /// the step does not count, so more steps are kept. A run that went back to an early step does not lose
    /// its new saves because of higher steps of the earlier run. For that, prune also keeps the `keep_last`
    /// newest steps up to the step that this process published last, or up to the step written last if this
    /// process published none.
    ///
    /// # Errors
    /// `Invalid` for a retention that keeps nothing. An I/O error when the directory cannot be read. A step
    /// that cannot be deleted is not an error of this call: see [`Pruned::complete`].
    pub fn prune(&self, retention: &Retention, options: PruneOptions) -> Result<Pruned> {
        self.prune_sparing(retention, options, |_| Ok(BTreeSet::new()))
    }

    /// Like [`Catalog::prune`], but also keeps the steps that `policy` keeps, such as the
    /// [best](super::Best). With a retention that keeps all steps, only the newest durable step and the steps
    /// of the policy stay.
    ///
    /// # Errors
    /// As [`Catalog::prune`].
    pub fn prune_by(
        &self,
        retention: &Retention,
        policy: &dyn PreservationPolicy,
        options: PruneOptions,
    ) -> Result<Pruned> {
        let retention = Retention { keep_last: retention.keep_last.or(Some(1)), ..*retention };
        self.prune_sparing(&retention, options, |entries| self.spared(policy, entries))
    }

    pub(super) fn prune_sparing(
        &self,
        retention: &Retention,
        options: PruneOptions,
        spared: impl FnOnce(&[Entry]) -> Result<BTreeSet<u64>>,
    ) -> Result<Pruned> {
        retention.check()?;
        let entries = self.everything()?.0;
        let mut pruned = self.pruning()?;
        let gone = self.planned(&entries, retention, options.verify, &mut pruned)?;
        let spared = if gone.is_empty() { BTreeSet::new() } else { spared(&entries)? };
        let goes = |entry: &Entry| gone.contains(&entry.step) && !spared.contains(&entry.step);
        self.take(entries, goes, options.dry_run, &mut pruned);
        Ok(pruned)
    }

    /// Returns the steps that `retention` does not keep, by number or on the running branch.
    fn planned(
        &self,
        entries: &[Entry],
        retention: &Retention,
        verify: Verify,
        pruned: &mut Pruned,
    ) -> Result<BTreeSet<u64>> {
        let Some(wanted) = retention.keep_last else { return Ok(BTreeSet::new()) };
        let steps = |entries: &[Entry]| entries.iter().map(|entry| entry.step).collect::<Vec<_>>();
        let head = self.head(entries);
        let bad = |head: &Entry| pruned.marks.of(head.attempt) == Some(Mark::Bad);
        let mut sound = head.is_some_and(|head| !bad(head) && self.known().sound.contains(&head.attempt));
        let counted = self.counted(entries, wanted, verify, &mut sound, pruned);
        let mut gone: BTreeSet<u64> = retention.plan(steps(entries), counted)?.into_iter().collect();
        if let Some(head) = head.map(|head| head.step) {
            let branch = entries.split_at(entries.partition_point(|entry| entry.step <= head)).0;
            if branch.len() < entries.len() {
                let counted = self.counted(branch, wanted, verify, &mut sound, pruned);
                let of_branch: BTreeSet<u64> = retention.plan(steps(branch), counted)?.into_iter().collect();
                gone.retain(|step| *step > head || of_branch.contains(step));
            }
        }
        Ok(gone)
    }

    /// Deletes the steps that `choose` returns, oldest first, except steps that are not older than the newest
    /// durable step. Otherwise as [`Catalog::prune`].
    ///
    /// # Errors
    /// As [`Catalog::prune`], and an error when a step cannot be deleted.
    pub(crate) fn prune_chosen(&self, choose: impl FnOnce(&[Entry]) -> BTreeSet<u64>) -> Result<Pruned> {
        let entries = self.everything()?.0;
        let mut pruned = self.pruning()?;
        let mut gone = choose(&entries);
        if gone.is_empty() {
            pruned.kept = entries;
            return Ok(pruned);
        }
        let durable = self.counted(&entries, 1, Verify::No, &mut true, &mut pruned).last().copied();
        gone.retain(|step| durable.is_some_and(|durable| *step < durable));
        self.take(entries, |entry| gone.contains(&entry.step), false, &mut pruned);
        pruned.complete()
    }

    /// Deletes `step` under each of its names, even if it is damaged.
    ///
    /// # Errors
    /// `NotFound` when the step does not exist. `Invalid` when the step is [marked](Mark) keep, or when no
    /// other step is durable and, if the options require it, sound; nothing is deleted then. An I/O error
    /// when the directory cannot be read.
    pub fn delete(&self, step: u64, options: PruneOptions) -> Result<Pruned> {
        let (entries, problems) = self.everything()?;
        let problems: Vec<_> =
            problems.into_iter().filter(|problem| problem.step == step && is_damaged(problem)).collect();
        if problems.is_empty() && entries.iter().all(|entry| entry.step != step) {
            return Err(self
                .checkpoint(step)
                .err()
                .unwrap_or_else(|| Error::internal("a step appeared during the search")));
        }
        let mut pruned = self.pruning()?;
        let kept = |entry: &Entry| pruned.marks.of(entry.attempt) == Some(Mark::Keep);
        if let Some(entry) = entries.iter().find(|entry| entry.step == step && kept(entry)) {
            let what = "the step is marked keep; take the mark away to delete it";
            return Err(Error::invalid(what).with_step(step).with_path(&entry.path));
        }
        let others: Vec<_> = entries.iter().filter(|entry| entry.step != step).cloned().collect();
        self.demand(&others, options.verify, &mut pruned)?;
        self.take_damaged(problems, options.dry_run, &mut pruned);
        self.take(entries, |entry| entry.step == step, options.dry_run, &mut pruned);
        Ok(pruned)
    }

    /// Reads every step in full and deletes the damaged steps of this library. A step that cannot be read at
    /// present stays.
    ///
    /// # Errors
    /// `Invalid` when there are damaged steps but no step is sound and durable; nothing is deleted then. An
    /// I/O error when the directory cannot be read.
    pub fn delete_damaged(&self, options: PruneOptions) -> Result<Pruned> {
        let (entries, problems) = self.everything()?;
        let mut pruned = self.pruning()?;
        let mut damaged: Vec<_> = problems.into_iter().filter(is_damaged).collect();
        for entry in entries {
            match self.find_sound(&entry) {
                Ok(()) => pruned.kept.push(entry),
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    let problem = self.problem(entry.step, entry.name.clone(), error);
                    if is_damaged(&problem) && pruned.marks.of(entry.attempt) != Some(Mark::Keep) {
                        damaged.push(problem);
                    } else {
                        pruned.doubtful.push(problem);
                        pruned.kept.push(entry);
                    }
                }
            }
        }
        if !damaged.is_empty() {
            let kept = pruned.kept.clone();
            self.demand(&kept, options.verify, &mut pruned)?;
        }
        damaged.sort_by_key(|problem| problem.step);
        self.take_damaged(damaged, options.dry_run, &mut pruned);
        Ok(pruned)
    }

    /// Begins a prune: nothing is deleted if the marks of steps cannot be read.
    pub(super) fn pruning(&self) -> Result<Pruned> {
        Ok(Pruned { marks: self.read_marks()?, ..Pruned::default() })
    }

    /// Requires that one of the remaining `entries` is durable and, if `verify` requires it, sound.
    pub(super) fn demand(&self, entries: &[Entry], verify: Verify, pruned: &mut Pruned) -> Result<()> {
        if !self.counted(entries, 1, verify, &mut false, pruned).is_empty() {
            return Ok(());
        }
        let what = "no remaining step would be durable and sound; nothing was deleted";
        let refused = Error::invalid(what).with_path(self.storage.describe(""));
        Err(match pruned.doubtful.last() {
            Some(problem) => refused.with_source(problem.error.clone()),
            None => refused,
        })
    }

    /// Returns the newest `wanted` steps that count: durable and, if `verify` requires it, sound. Older steps
    /// are not checked. `sound` says whether a remaining step is known to be sound.
    fn counted(
        &self,
        entries: &[Entry],
        wanted: usize,
        verify: Verify,
        sound: &mut bool,
        pruned: &mut Pruned,
    ) -> BTreeSet<u64> {
        let mut counted = BTreeSet::new();
        for entry in entries.iter().rev() {
            if counted.len() >= wanted {
                break;
            }
            if self.known().pending.contains_key(&entry.attempt)
                || pruned.doubtful.iter().any(|seen| seen.name == entry.name)
            {
                continue;
            }
            if pruned.marks.of(entry.attempt) == Some(Mark::Bad) {
                pruned.doubtful.push(self.marked_bad(entry.step, &entry.name));
                continue;
            }
            let read = match verify {
                Verify::No => false,
                Verify::One => !*sound,
                Verify::All => true,
            } && !mutant::on(Mutant::PruneBlind);
            let found = self
                .make_durable(entry)
                .and_then(|()| if read { self.find_sound(entry) } else { self.unblemished(entry) });
            match found {
                Ok(()) => {
                    *sound |= read;
                    counted.insert(entry.step);
                }
                Err(error) if mutant::on(Mutant::RetentionCount) => {
                    drop(error);
                    counted.insert(entry.step);
                }
                // Another process deleted it meanwhile.
                Err(error) if error.kind() == ErrorKind::NotFound && self.is_free(&entry.name) => {
                    pruned.vanished.insert(entry.name.clone());
                }
                Err(error) => {
                    tracing::warn!(
                        step = entry.step,
                        error = format_args!("{error:#}"),
                        "a step does not count for retention"
                    );
                    pruned.doubtful.push(self.problem(entry.step, entry.name.clone(), error));
                }
            }
        }
        pruned.doubtful.sort_by_key(|problem| problem.step);
        counted
    }

    /// Reads a step in full, unless this process already knows that it is sound or damaged.
    fn find_sound(&self, entry: &Entry) -> Result<()> {
        self.unblemished(entry)?;
        if self.known().sound.contains(&entry.attempt) {
            return Ok(());
        }
        let missing = || Error::new(ErrorKind::NotFound, "no such step").with_step(entry.step).with_path(&entry.path);
        let checkpoint = self.try_open(entry.step, &entry.name)?.ok_or_else(missing)?;
        if checkpoint.attempt() != entry.attempt {
            let what = "the step was replaced meanwhile";
            return Err(Error::new(ErrorKind::Conflict, what).with_step(entry.step).with_path(&entry.path));
        }
        self.read_whole(Some(checkpoint)).map(drop)
    }

    /// Returns the known damage of a step as an error.
    fn unblemished(&self, entry: &Entry) -> Result<()> {
        self.known().damaged.get(&entry.attempt).map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Removes the `entries` for which `goes` is true, except names under which an attempt may be published.
    pub(super) fn take(&self, entries: Vec<Entry>, goes: impl Fn(&Entry) -> bool, dry_run: bool, pruned: &mut Pruned) {
        for entry in entries {
            if pruned.vanished.contains(&entry.name) {
                continue;
            }
            let kept = pruned.marks.of(entry.attempt) == Some(Mark::Keep);
            if kept || !goes(&entry) || !self.claim(&entry.name) {
                pruned.kept.push(entry);
                continue;
            }
            let shared = self.shared_files(&entry.name);
            let removed = if dry_run { Ok(()) } else { self.remove(&entry) };
            self.unclaim(&entry.name);
            let error = match removed {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                removed => removed.err(),
            };
            let gone = error.is_none() || self.is_free(&entry.name);
            pruned.failed.extend(error.map(|error| self.problem(entry.step, entry.name.clone(), error)));
            if gone {
                pruned.freed += entry.bytes.saturating_sub(pruned.shared.staying(&shared));
            }
            if gone && !dry_run {
                meters::pruned(1, entry.bytes);
                self.forget(entry.attempt);
                self.forget_alias(entry.step, &entry.name);
            }
            if gone { &mut pruned.removed } else { &mut pruned.kept }.push(entry);
        }
    }

    /// Removes damaged steps of this library, except steps marked keep. Checks each step again before.
    pub(super) fn take_damaged(&self, problems: Vec<Problem>, dry_run: bool, pruned: &mut Pruned) {
        let (kept, problems): (Vec<_>, Vec<_>) =
            problems.into_iter().partition(|problem| pruned.marks.keep_number(problem.step));
        pruned.doubtful.extend(kept);
        for problem in problems.into_iter().filter(|problem| self.claim(&problem.name)) {
            let removed = self.remove_damaged(&problem.name, dry_run);
            self.unclaim(&problem.name);
            match removed {
                Ok(()) => {
                    meters::pruned(usize::from(!dry_run), 0);
                    pruned.damaged.push(problem);
                }
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => {
                    pruned.failed.push(self.problem(problem.step, problem.name.clone(), error));
                    if self.is_free(&problem.name) {
                        pruned.damaged.push(problem);
                    }
                }
            }
        }
    }

    /// True when nothing is under `name`.
    fn is_free(&self, name: &str) -> bool {
        matches!(self.storage.open(name), Err(error) if error.kind() == ErrorKind::NotFound)
    }
}

/// True for a step of this library whose bytes are not those that were written.
pub(super) fn is_damaged(problem: &Problem) -> bool {
    problem.error.kind() == ErrorKind::Corrupt
}
