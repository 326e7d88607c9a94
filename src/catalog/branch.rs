//! Branches: a run that went back to an earlier step and continues below the steps of the earlier run.

use super::prune::is_damaged;
use super::{Catalog, Entry, PreservationPolicy, Problem, PruneOptions, Pruned, Retention, Verify};
use crate::error::{Error, ErrorKind, Result};
use crate::id::step_name;
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

/// Decides which steps an executor keeps when saves become durable.
pub(crate) struct Keeping {
    pub retention: Retention,
    pub policy: Option<Arc<dyn PreservationPolicy>>,
    pub verify: Verify,
    /// Keeps further steps: steps that are not yet in every tier that wants them.
    pub hold: Option<Arc<dyn Hold>>,
}

/// Keeps steps that a retention would delete.
pub(crate) trait Hold: Send + Sync {
    /// The steps that must stay for the present.
    fn held(&self, entries: &[Entry]) -> BTreeSet<u64>;

    /// Tells that these steps were deleted.
    fn removed(&self, entries: &[Entry]);
}

impl Keeping {
    /// Deletes the steps that are not kept.
    pub fn prune(&self, catalog: &Catalog) -> Result<()> {
        let options = PruneOptions::new().verify(self.verify);
        let held = |entries: &[Entry]| self.hold.as_ref().map_or_else(BTreeSet::new, |hold| hold.held(entries));
        let pruned = match &self.policy {
            None if self.retention.is_unlimited() => return Ok(()),
            None => catalog.prune_sparing(&self.retention, options, |entries| Ok(held(entries))),
            Some(policy) => {
                let retention = Retention { keep_last: self.retention.keep_last.or(Some(1)), ..self.retention };
                catalog.prune_sparing(&retention, options, |entries| {
                    let spared = catalog.spared(policy.as_ref(), entries)?;
                    Ok(spared.into_iter().chain(held(entries)).collect())
                })
            }
        }?;
        if let Some(hold) = &self.hold {
            hold.removed(&pruned.removed);
        }
        pruned.complete().map(drop)
    }
}

impl fmt::Debug for Keeping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Keeping");
        out.field("retention", &self.retention).field("policy", &self.policy.is_some()).finish_non_exhaustive()
    }
}

impl Catalog {
    /// Deletes every step after `step`, newest first, including damaged steps, except steps that are
    /// [marked](super::Mark) keep. For a run that goes back to `step` and continues from it, so that its
    /// saves are the newest again.
    ///
    /// # Errors
    /// `NotFound` when `step` does not exist. `Invalid` when `step` is not durable or, if the options require
    /// it, not sound; nothing is deleted then. An I/O error when the directory cannot be read.
    pub fn discard_after(&self, step: u64, options: PruneOptions) -> Result<Pruned> {
        let stays = self.checkpoint(step)?;
        let (mut entries, mut problems) = self.everything()?;
        let mut pruned = self.pruning()?;
        let there: Vec<_> = entries.iter().filter(|entry| entry.attempt == stays.attempt()).cloned().collect();
        self.demand(&there, options.verify, &mut pruned)?;
        problems.retain(|problem| problem.step > step && is_damaged(problem));
        problems.reverse();
        entries.reverse();
        self.take_damaged(problems, options.dry_run, &mut pruned);
        self.take(entries, |entry| entry.step > step, options.dry_run, &mut pruned);
        pruned.removed.reverse();
        pruned.damaged.reverse();
        pruned.kept.reverse();
        Ok(pruned)
    }

    /// Returns the last step of the running branch: the last step that this process published. If it
    /// published none, the step written last by the clock of the storage.
    pub(crate) fn head<'e>(&self, entries: &'e [Entry]) -> Option<&'e Entry> {
        let known = self.known();
        let own = known.own.iter().rev().find_map(|own| entries.iter().find(|entry| entry.attempt == *own));
        own.or_else(|| entries.iter().max_by_key(|entry| (entry.modified, entry.step)))
    }

    /// Returns the step written last and the step with the highest number, if they differ. Then a run went
    /// back, and [`Catalog::latest`] belongs to the earlier run. Times are from the storage's clock; a copy
    /// of a step may have another time.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn branched(&self) -> Result<Option<(Entry, Entry)>> {
        Ok(branch(&self.list()?).map(|(last, newest)| (last.clone(), newest.clone())))
    }

    /// Warns, when a run begins, of steps that are not listed, and of a newest step that is not the step
    /// written last.
    pub(crate) fn warn_of_oddities(&self) -> Result<()> {
        let (entries, problems) = self.survey()?;
        for Problem { step, name, error, .. } in problems {
            tracing::warn!(step, %name, error = format_args!("{error:#}"), "a step is not listed");
        }
        if let Some((last, newest)) = branch(&entries)
            && !overlapped(last, newest)
        {
            warn(last.step, newest.step);
        }
        Ok(())
    }

    /// Warns when `step`, which this process just published, is below existing steps.
    pub(crate) fn warn_if_below(&self, step: u64) -> Result<()> {
        let mut above = self.names()?.into_iter().rev().filter(|(there, _)| *there > step);
        if let Some((newest, _)) = above.find(|(there, name)| matches!(self.try_open(*there, name), Ok(Some(_)))) {
            warn(step, newest);
        }
        Ok(())
    }

    /// Refuses to save `step` as `name` while the step exists under another name, so that a step has only one
    /// directory.
    pub(crate) fn refuse_second_name(&self, step: u64, name: &str) -> Result<()> {
        let canonical = step_name(step);
        if self.known().aliases.is_none() {
            let mut aliases = HashMap::<u64, Vec<String>>::new();
            for (step, name) in self.names()?.into_iter().filter(|(step, name)| *name != step_name(*step)) {
                aliases.entry(step).or_default().push(name);
            }
            self.known().aliases.get_or_insert(aliases);
        }
        let mut others = match &mut self.known().aliases {
            Some(aliases) if name == canonical => aliases.get(&step).cloned().unwrap_or_default(),
            Some(aliases) => {
                let names = aliases.entry(step).or_default();
                if !names.iter().any(|known| known == name) {
                    names.push(name.into());
                }
                names.clone()
            }
            None => Vec::new(),
        };
        others.push(canonical);
        for other in others.iter().filter(|other| *other != name) {
            let there = match self.try_open(step, other) {
                Ok(found) => found.is_some(),
                Err(error) => error.kind() == ErrorKind::Corrupt,
            };
            if there {
                let what = format!("the step exists under another name other={other:?}");
                let path = self.storage.describe(name);
                return Err(Error::new(ErrorKind::Conflict, what).with_step(step).with_path(path));
            }
        }
        Ok(())
    }

    /// Forgets the name of a step that was removed.
    pub(super) fn forget_alias(&self, step: u64, name: &str) {
        if let Some(aliases) = &mut self.known().aliases
            && let Some(names) = aliases.get_mut(&step)
        {
            names.retain(|known| known != name);
            if names.is_empty() {
                aliases.remove(&step);
            }
        }
    }
}

/// Returns the step written last and the newest by number, if they differ.
fn branch(entries: &[Entry]) -> Option<(&Entry, &Entry)> {
    let last = entries.iter().max_by_key(|entry| (entry.modified, entry.step));
    last.zip(entries.last()).filter(|(last, newest)| last.step < newest.step)
}

/// True if the two steps may be saves of one run that overlapped and ended in the opposite order.
fn overlapped(last: &Entry, newest: &Entry) -> bool {
    let between = last.modified.zip(newest.modified).map(|(last, newest)| last.duration_since(newest));
    matches!(between, Some(Ok(between)) if between < Duration::from_secs(1))
}

fn warn(last: u64, newest: u64) {
    tracing::warn!(
        last,
        newest,
        "the newest step by number is not the one written last: the run went back; `latest` returns the higher number \
         until `Catalog::discard_after` deletes the later steps"
    );
}
