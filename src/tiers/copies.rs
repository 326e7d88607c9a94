//! Reading over several tiers: which copy of a step counts, and which copy is nearest.
//!
//! The first tier is nearest. The others follow in the order in which they were given. Where two tiers have
//! different attempts at a step, the attempt of the farthest tier counts, unless this session may replace it
//! by its own.

use super::behind::Behind;
use super::line::{Line, Ours};
use crate::catalog::{Catalog, Found, Problem};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

/// A step as one tier has it.
struct Copy<'a> {
    /// None: the first tier.
    tier: Option<(&'a Line, Arc<Ours>)>,
    opened: Result<Checkpoint>,
}

impl Copy<'_> {
    fn place(&self) -> String {
        self.tier.as_ref().map_or_else(|| "the first tier".to_owned(), |(line, _)| format!("tier {:?}", line.name))
    }
}

impl Behind {
    /// The newest step that counts in any tier, from the nearest tier whose copy can be opened.
    ///
    /// # Errors
    /// Errors of the first tier, and of the others if no step is found. A damaged step of which no copy is
    /// left is skipped, as in [`Catalog::latest`].
    pub fn latest(&self, first: &Catalog) -> Result<Option<Checkpoint>> {
        self.refresh()?;
        let ((steps, away), bad) = (self.steps(first)?, self.bad(first));
        for &step in steps.keys().rev() {
            match self.nearest(first, step, |copy| copy.opened) {
                Ok(checkpoint) if bad.contains(&checkpoint.attempt()) => {
                    tracing::warn!(step, "a newer step is skipped: it is marked bad");
                }
                Ok(checkpoint) => return Ok(Some(checkpoint)),
                Err(error) if absent_or_bad(&error) => {
                    tracing::warn!(step, error = format_args!("{error:#}"), "a newer step is skipped");
                }
                Err(error) => return Err(error),
            }
        }
        away.map_or(Ok(None), Err)
    }

    /// The newest step of which some tier has a copy with all of its bytes: the nearest such copy, and the
    /// newer steps that were skipped.
    ///
    /// # Errors
    /// As [`Catalog::latest_valid`].
    pub fn latest_valid(&self, first: &Catalog) -> Result<Option<Found>> {
        self.refresh()?;
        let ((steps, away), bad) = (self.steps(first)?, self.bad(first));
        let mut skipped = Vec::new();
        for (&step, name) in steps.iter().rev() {
            let sound = |copy: Copy<'_>| {
                if copy.opened.as_ref().is_ok_and(|found| bad.contains(&found.attempt())) {
                    return Err(Error::new(ErrorKind::Conflict, "the step is marked bad").with_step(step));
                }
                let catalog = copy.tier.as_ref().map_or(first, |(_, ours)| &ours.catalog);
                let found = catalog.read_whole(Some(copy.opened?))?;
                found.ok_or_else(|| Error::internal("a step was lost while it was read"))
            };
            match self.nearest(first, step, sound) {
                Ok(checkpoint) => return Ok(Some(Found { checkpoint, skipped })),
                Err(error) => {
                    tracing::warn!(step, error = format_args!("{error:#}"), "a step is skipped");
                    let path = error.path().map(ToOwned::to_owned).unwrap_or_else(|| self.root.describe(name));
                    skipped.push(Problem { step, name: name.clone(), path, error });
                }
            }
        }
        match skipped.into_iter().next() {
            Some(problem) => Err(problem.error),
            None => away.map_or(Ok(None), Err),
        }
    }

    /// The step `step`, from the nearest tier whose copy can be opened.
    ///
    /// # Errors
    /// As [`Catalog::checkpoint`].
    pub fn checkpoint(&self, first: &Catalog, step: u64) -> Result<Checkpoint> {
        self.refresh()?;
        self.nearest(first, step, |copy| copy.opened)
    }

    /// The attempts that are marked bad in any tier.
    fn bad(&self, first: &Catalog) -> HashSet<Attempt> {
        let behind = self.reached().flat_map(|(_, ours)| ours.catalog.bad());
        first.bad().into_iter().chain(behind).collect()
    }

    /// The tiers that this session has reached. With several ranks, only those that rank 0 has noted.
    fn reached(&self) -> impl DoubleEndedIterator<Item = (&Line, Arc<Ours>)> {
        self.lines.iter().filter_map(|line| Some((line.as_ref(), line.ours().filter(|_| self.is_noted(line))?)))
    }

    /// The numbers and names of steps in any tier, and the error if a tier could not be listed.
    fn steps(&self, first: &Catalog) -> Result<(BTreeMap<u64, String>, Option<Error>)> {
        let mut steps: BTreeMap<u64, String> = first.names()?.into_iter().collect();
        let mut away = None;
        for line in &self.lines {
            let (ours, noted) = (line.ours(), self.is_noted(line));
            let everywhere = self.several() && (ours.is_some() || self.promotes()) && noted;
            let ours = ours.filter(|_| noted);
            let names = ours.ok_or_else(|| line.state_error()).and_then(|ours| ours.catalog.names());
            match names {
                Ok(names) => names.into_iter().for_each(|(step, name)| _ = steps.entry(step).or_insert(name)),
                Err(why) => {
                    let error = line.located("cannot list the steps of a tier", &why);
                    if everywhere {
                        self.away(line, &why);
                        // Another rank may reach the tier and find a newer step.
                        return Err(error);
                    }
                    tracing::warn!(error = format_args!("{error:#}"), "a tier is left out: it may have a newer step");
                    away.get_or_insert(error);
                }
            }
        }
        Ok((steps, away))
    }

    /// The nearest copy that `take` can use, of the attempt that counts.
    fn nearest(&self, first: &Catalog, step: u64, take: impl Fn(Copy<'_>) -> Result<Checkpoint>) -> Result<Checkpoint> {
        if self.several() && self.promotes() {
            let gone = self.lines.iter().find(|line| line.ours().is_none() && self.is_noted(line));
            if let Some(line) = gone {
                // The other ranks read the tiers that rank 0 has noted.
                return Err(line
                    .located("rank 0 cannot reach a tier that the other ranks read", &line.state_error())
                    .with_step(step));
            }
        }
        let mut copies = vec![Copy { tier: None, opened: first.checkpoint(step) }];
        for (line, ours) in self.reached() {
            let opened = ours.catalog.checkpoint(step);
            if let Err(error) = &opened
                && self.several()
                && !absent_or_bad(error)
            {
                // Another rank may reach the copy, and the copy may be another attempt.
                self.away(line, error);
                return Err(line.located("a step of a tier cannot be opened", error).with_step(step));
            }
            copies.push(Copy { tier: Some((line, ours)), opened });
        }
        let counts = self.counts(step, &copies)?;
        let mut why: Option<Error> = None;
        for copy in copies {
            match &copy.opened {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Ok(found) if counts.as_ref().is_some_and(|counts| *counts != found.attempt()) => continue,
                Ok(_) | Err(_) => {}
            }
            let (place, tier) = (copy.place(), copy.tier.as_ref().map(|(line, _)| line.name.clone()));
            match take(copy) {
                Ok(checkpoint) => {
                    if let Some(error) = why {
                        let (error, found) = (format_args!("{error:#}"), place);
                        tracing::warn!(step, error, found, "a nearer copy cannot be used: the one in `found` is read");
                    }
                    return Ok(Checkpoint { tier, ..checkpoint });
                }
                Err(error) => _ = why.get_or_insert(error),
            }
        }
        match why {
            Some(error) => Err(error),
            None => first.checkpoint(step),
        }
    }

    /// The attempt that counts, if any copy can be opened.
    ///
    /// # Errors
    /// `Conflict` for a step that only the first tier has, and whose session is not in this session's
    /// lineage: the job continued elsewhere.
    fn counts(&self, step: u64, copies: &[Copy<'_>]) -> Result<Option<Attempt>> {
        let descends = |line: &Line, found: &Checkpoint| line.state().lineage.allows(found.manifest().session);
        let mut near = None;
        let mut counts = None;
        for copy in copies {
            let Ok(found) = &copy.opened else { continue };
            match &copy.tier {
                None => near = Some(found),
                Some((line, _)) => {
                    let replaced = line.state().lineage.replaces(found.manifest().session);
                    let own = replaced && near.is_some_and(|near| descends(line, near));
                    if !own {
                        counts = Some(found.attempt());
                    }
                }
            }
        }
        let Some(near) = near else { return Ok(counts) };
        if let Some(counts) = counts {
            if counts != near.attempt() {
                tracing::error!(step, ours = %near.attempt(), theirs = %counts, "tiers have different attempts at a step");
            }
            return Ok(Some(counts));
        }
        let alone = copies.iter().all(|copy| {
            let absent = matches!(&copy.opened, Err(error) if error.kind() == ErrorKind::NotFound);
            copy.tier.is_none() || absent
        });
        let foreign = self.reached().find(|(line, _)| !descends(line, near));
        if let (true, Some((line, _))) = (alone, foreign) {
            let why = "the job continued elsewhere after it saved this step, and the tier lacks the step";
            let error = Error::new(ErrorKind::Conflict, format!("{why} tier={:?}", line.name));
            return Err(error.with_step(step).with_path(near.path()));
        }
        Ok(Some(near.attempt()))
    }
}

/// Whether every process that reads a step gets this error.
fn absent_or_bad(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Conflict | ErrorKind::NotFound)
}
