//! Deleting: old steps by a retention, dead attempts by the storage. Always after a commit, never on its path.

use super::{Catalog, Entry, Problem, Retention};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::{Sweep, Swept};
use std::collections::{BTreeSet, HashSet};
use std::sync::PoisonError;
use std::time::Duration;

/// How long a publish waits for a prune to let go of its name.
const ANNOUNCE: Duration = Duration::from_secs(60);

/// What a prune did, or would do.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Pruned {
    /// What was removed, oldest first.
    pub removed: Vec<Entry>,
    /// What was kept, oldest first.
    pub kept: Vec<Entry>,
    /// Steps among the kept that could not be made durable, and therefore replace no older one.
    pub doubtful: Vec<Problem>,
}

impl Catalog {
    /// Says that `attempt` is durable because this process published it and saw every fsync succeed. Other steps are made
    /// durable before they are counted.
    pub fn acknowledge(&self, attempt: Attempt) {
        let mut known = self.known();
        known.pending.remove(&attempt);
        if known.durable.insert(attempt) {
            known.own.push(attempt);
        }
    }

    /// Says that `attempt` is about to be published as `name`: until its outcome is known it neither counts nor goes, and
    /// neither does what it may replace.
    ///
    /// # Errors
    /// `Busy` when a prune has been deleting that step for too long.
    pub(crate) fn announce(&self, name: &str, attempt: Attempt) -> Result<()> {
        let known = self.known();
        let (mut known, waited) = self
            .gone
            .wait_timeout_while(known, ANNOUNCE, |known| known.going.contains(name))
            .unwrap_or_else(PoisonError::into_inner);
        if waited.timed_out() {
            return Err(
                Error::new(ErrorKind::Busy, "the step is still being deleted").with_path(self.storage.describe(name))
            );
        }
        known.pending.insert(attempt, name.into());
        Ok(())
    }

    /// Says that `attempt` was not published.
    pub(crate) fn withdraw(&self, attempt: Attempt) {
        self.known().pending.remove(&attempt);
    }

    /// Says that the publish of `attempt` ended as `Indeterminate`: it never counts in this process. A later fsync would
    /// prove nothing, for the kernel reports a lost write once.
    pub fn doubt(&self, attempt: Attempt) {
        let mut known = self.known();
        known.pending.remove(&attempt);
        known.durable.remove(&attempt);
        known.own.retain(|own| *own != attempt);
        known.doubtful.insert(attempt);
    }

    /// Deletes what `retention` does not keep, oldest first. Foreign directories, attempts and steps that cannot be
    /// opened are left alone. With `dry_run` nothing is deleted.
    ///
    /// Steps that this process did not publish itself are made durable before they are counted; those where that fails do
    /// not count, so more is kept. The `keep_last` steps that were last acknowledged are kept whatever their numbers: a run
    /// that went back to an early step must not lose what it saves to higher steps of the run before.
    ///
    /// # Errors
    /// `Invalid` for a retention that keeps nothing. When a step cannot be deleted the others still are, and the first
    /// error is returned.
    pub fn prune(&self, retention: &Retention, dry_run: bool) -> Result<Pruned> {
        retention.check()?;
        let mut entries = self.list()?;
        let mut pruned = Pruned::default();
        let durable = self.durable(&mut entries, retention.keep_last.unwrap_or(0), &mut pruned.doubtful);
        let gone: BTreeSet<u64> =
            retention.plan(entries.iter().map(|entry| entry.step), durable)?.into_iter().collect();
        let own = self.own(&entries, retention.keep_last.unwrap_or(0));
        self.take(entries, &gone, &own, dry_run, pruned)
    }

    /// Deletes of the steps that `choose` returns those that are older than the newest durable one, oldest first. As
    /// [`Catalog::prune`] in everything else.
    ///
    /// # Errors
    /// As there.
    pub(crate) fn prune_chosen(&self, choose: impl FnOnce(&[Entry]) -> BTreeSet<u64>) -> Result<Pruned> {
        let mut entries = self.list()?;
        let mut pruned = Pruned::default();
        let mut gone = choose(&entries);
        if gone.is_empty() {
            pruned.kept = entries;
            return Ok(pruned);
        }
        let durable = self.durable(&mut entries, 1, &mut pruned.doubtful).last().copied();
        gone.retain(|step| durable.is_some_and(|durable| *step < durable));
        self.take(entries, &gone, &HashSet::new(), false, pruned)
    }

    /// Removes those of `entries` whose step is among `gone` and whose attempt is not among `own`.
    fn take(
        &self,
        entries: Vec<Entry>,
        gone: &BTreeSet<u64>,
        own: &HashSet<Attempt>,
        dry_run: bool,
        mut pruned: Pruned,
    ) -> Result<Pruned> {
        let mut failed = None;
        for entry in entries {
            if !gone.contains(&entry.step) || own.contains(&entry.attempt) || !self.claim(&entry) {
                pruned.kept.push(entry);
                continue;
            }
            let removed = if dry_run { Ok(()) } else { self.remove(&entry) };
            self.unclaim(&entry);
            match removed {
                Ok(()) => {
                    if !dry_run {
                        self.forget(entry.attempt);
                    }
                    pruned.removed.push(entry);
                }
                Err(error) if error.kind() == crate::ErrorKind::NotFound => {}
                Err(error) => {
                    failed.get_or_insert(error.with_step(entry.step).with_path(&entry.path));
                    pruned.kept.push(entry);
                }
            }
        }
        failed.map_or(Ok(pruned), Err)
    }

    /// Removes attempts and trash whose owner is dead, and only those; says what it left alone, and why.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.storage.sweep(how)
    }

    /// Claims the name of `entry` for its removal; false while an attempt may be published under it.
    fn claim(&self, entry: &Entry) -> bool {
        let mut known = self.known();
        !known.pending.values().any(|name| *name == entry.name) && known.going.insert(entry.name.clone())
    }

    fn unclaim(&self, entry: &Entry) {
        self.known().going.remove(&entry.name);
        self.gone.notify_all();
    }

    /// Removes `entry`, unless the name has come to stand for another attempt since it was listed.
    fn remove(&self, entry: &Entry) -> Result<()> {
        // Opened before it is compared: what is removed is what was compared, or nothing.
        let opened = self.storage.open(&entry.name)?;
        let there = Checkpoint::from_storage(self.storage.clone(), &entry.name)?;
        if there.attempt() != entry.attempt {
            return Err(Error::new(ErrorKind::Conflict, "the step was replaced meanwhile; it was not removed"));
        }
        self.storage.remove_opened(&entry.name, opened.as_ref())
    }

    /// Forgets an attempt that was removed, so that a long run does not remember all of its saves.
    fn forget(&self, attempt: Attempt) {
        let mut known = self.known();
        known.durable.remove(&attempt);
        known.own.retain(|own| *own != attempt);
    }

    /// The last attempts that this process published and that are still there, as many as are `wanted`.
    fn own(&self, entries: &[Entry], wanted: usize) -> HashSet<Attempt> {
        let there: HashSet<Attempt> = entries.iter().map(|entry| entry.attempt).collect();
        self.known().own.iter().rev().filter(|attempt| there.contains(attempt)).take(wanted).copied().collect()
    }

    /// The newest steps that are durable, as many as are `wanted`; older ones are not asked about. An entry that another prune has
    /// removed meanwhile is taken out.
    fn durable(&self, entries: &mut Vec<Entry>, wanted: usize, doubtful: &mut Vec<Problem>) -> BTreeSet<u64> {
        let (mut durable, mut gone) = (BTreeSet::new(), HashSet::new());
        for entry in entries.iter().rev() {
            if durable.len() >= wanted {
                break;
            }
            if self.known().pending.contains_key(&entry.attempt) {
                continue;
            }
            match self.make_durable(entry) {
                Ok(()) => {
                    durable.insert(entry.step);
                }
                Err(error) if mutant::on(Mutant::RetentionCount) => {
                    drop(error);
                    durable.insert(entry.step);
                }
                Err(error) if error.kind() == ErrorKind::NotFound && self.is_gone(entry) => {
                    gone.insert(entry.name.clone());
                }
                Err(error) => {
                    tracing::warn!(
                        step = entry.step,
                        error = format_args!("{error:#}"),
                        "a step does not count for retention"
                    );
                    doubtful.push(Problem {
                        step: entry.step,
                        name: entry.name.clone(),
                        path: entry.path.clone(),
                        error,
                    });
                }
            }
        }
        doubtful.reverse();
        entries.retain(|entry| !gone.contains(&entry.name));
        durable
    }

    /// Whether there is no step of that name any more.
    fn is_gone(&self, entry: &Entry) -> bool {
        self.storage.open(&entry.name).is_err_and(|error| error.kind() == ErrorKind::NotFound)
    }

    fn make_durable(&self, entry: &Entry) -> Result<()> {
        let known = self.known();
        if known.doubtful.contains(&entry.attempt) {
            let what = "the publish of this step had no certain end";
            let error = crate::Error::new(crate::ErrorKind::Indeterminate, what);
            return Err(error.with_step(entry.step).with_path(&entry.path));
        }
        if known.durable.contains(&entry.attempt) {
            return Ok(());
        }
        drop(known);
        if !mutant::on(Mutant::ConfirmFsync) {
            self.storage.confirm(&entry.name)?;
        }
        self.known().durable.insert(entry.attempt);
        Ok(())
    }
}
