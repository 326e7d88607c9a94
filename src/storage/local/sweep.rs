//! Removes the remains of dead owners, and nothing of live owners.

use super::clock::Clock;
use super::dir::Dir;
use super::judge::{Dead, Extent, Finding, judge};
use super::{durable, names, trash};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::storage::{Remnant, State, Sweep, Swept};
use std::collections::HashSet;

/// Number of dead attempts whose removals share one set of fsyncs. Each attempt keeps a descriptor open until
/// these fsyncs.
const BATCH: usize = 64;

/// Removes attempts of dead owners, and all trash. A failure to remove one does not stop the others.
pub(super) fn sweep(root: &Dir, how: Sweep) -> Result<Swept> {
    let listed = root.list().map_err(root.own_error("cannot list"))?;
    let listed: Vec<&str> = listed.iter().filter_map(|name| name.to_str()).collect();
    let known: HashSet<&str> = listed.iter().copied().collect();
    let clock = Clock::of(root);
    let (mut swept, mut dead) = (Swept::default(), Vec::new());
    for name in &listed {
        let Some((step, attempt)) = names::parse_owner(name) else { continue };
        let claimed = names::claimed(step, attempt);
        let temp = if known.contains(claimed.as_str()) { claimed } else { names::temp(step, attempt) };
        match judge(root, &clock, name, &temp, how.older_than) {
            Ok(Finding::Dead(found)) if how.dry_run => swept.removed.push(found.remnant),
            Ok(Finding::Dead(found)) => dead.push(found),
            Ok(Finding::Left(remnant)) => swept.left.push(remnant),
            Ok(Finding::Gone) => {}
            Err(error) => swept.left.push(stuck(&temp, &error)),
        }
        if dead.len() >= BATCH {
            bury(root, std::mem::take(&mut dead), &mut swept);
        }
    }
    bury(root, dead, &mut swept);
    orphans(root, &clock, &listed, how, &mut swept)?;
    empty_trash(root, &listed, how, &mut swept)?;
    Ok(swept)
}

fn stuck(name: &str, error: &Error) -> Remnant {
    Remnant { name: name.to_owned(), state: State::Stuck, why: format!("{error:#}"), age: None, bytes: 0 }
}

/// Removes attempts, then their records: a record is deleted only after the removal of its attempt is
/// durable.
fn bury(root: &Dir, dead: Vec<Dead>, swept: &mut Swept) {
    if dead.is_empty() {
        return;
    }
    let inherited = durable::inherited(root).map_err(root.own_error("cannot make changes of a dead process durable"));
    let mut cleared = Vec::new();
    let mut deleted = false;
    for found in dead {
        let gone = inherited.clone().and_then(|()| clear(root, &found));
        match gone {
            Ok(there) => {
                deleted |= there;
                cleared.push(found);
            }
            Err(error) => swept.left.push(stuck(&found.remnant.name, &error)),
        }
    }
    let durable = if deleted { durable::deleted(root) } else { Ok(()) };
    let durable = durable.map_err(root.own_error("cannot make it durable that attempts are gone"));
    for found in cleared {
        match durable.clone().and_then(|()| found.owner.erase(root)) {
            Ok(()) => swept.removed.push(found.remnant),
            Err(error) => swept.left.push(stuck(&found.remnant.name, &error)),
        }
    }
}

/// Deletes a dead attempt. Returns false if it does not exist.
fn clear(root: &Dir, found: &Dead) -> Result<bool> {
    let temp = &found.remnant.name;
    if root.look(temp).map_err(root.error("cannot look for the attempt", temp))?.is_none() {
        return Ok(false);
    }
    match found.identity {
        // An attempt that appeared after the judgement has a live owner.
        None if found.by_age => {
            return Err(Error::new(ErrorKind::Conflict, "the attempt appeared while it was swept")
                .with_path(root.path().join(temp)));
        }
        Some(identity) if found.by_age => set_aside(root, temp, identity)?,
        _ => trash::delete(root, temp)?,
    }
    Ok(true)
}

/// Deletes an attempt whose owner might still be about to publish it. The attempt first loses its name,
/// durably. So the publish fails, and cannot show a step that is being deleted, even if the power fails in
/// between.
fn set_aside(root: &Dir, temp: &str, identity: (u64, u64)) -> Result<()> {
    trash::discard(root, temp, &names::trash(Attempt::new()), identity)
}

/// Sweeps attempts without a record. Only their age decides.
fn orphans(root: &Dir, clock: &Clock<'_>, listed: &[&str], how: Sweep, swept: &mut Swept) -> Result<()> {
    let owned: HashSet<_> = listed.iter().filter_map(|name| names::parse_owner(name)).collect();
    for name in listed {
        let Some((step, attempt)) = names::parse_temp(name).filter(|attempt| !owned.contains(attempt)) else {
            continue;
        };
        let extent = match Extent::of(root, name) {
            Ok(extent) => extent,
            Err(error) => {
                swept.left.push(stuck(name, &error));
                continue;
            }
        };
        // The listing is not atomic: the record may have been made since, or record and attempt may be gone.
        let owner = names::owner(step, attempt);
        let Some(identity) = extent.identity else { continue };
        if root.look(&owner).map_err(root.error("cannot look for the record", &owner))?.is_some() {
            continue;
        }
        let age = clock.age(extent.modified);
        let old = age.is_some_and(|age| age >= how.older_than);
        let state = if old { State::Dead } else { State::Undecided };
        let why = "has no owner record".to_owned();
        let remnant = Remnant { name: (*name).to_owned(), state, why, age, bytes: extent.bytes };
        match if old && !how.dry_run { set_aside(root, name, identity) } else { Ok(()) } {
            Err(error) => swept.left.push(stuck(name, &error)),
            Ok(()) if old => swept.removed.push(remnant),
            Ok(()) => swept.left.push(remnant),
        }
    }
    Ok(())
}

fn empty_trash(root: &Dir, listed: &[&str], how: Sweep, swept: &mut Swept) -> Result<()> {
    let trash: Vec<_> = listed.iter().filter(|name| names::is_trash(name)).collect();
    if trash.is_empty() {
        return Ok(());
    }
    if !how.dry_run {
        durable::trash(root).map_err(root.own_error("cannot make removals durable"))?;
    }
    for name in trash {
        let name = (*name).to_string();
        let delete = |extent| if how.dry_run { Ok(extent) } else { trash::delete_found(root, &name).map(|()| extent) };
        match Extent::of(root, &name).and_then(delete) {
            Ok(Extent { bytes, .. }) => {
                let why = "was being deleted".to_owned();
                swept.removed.push(Remnant { name, state: State::Dead, why, age: None, bytes });
            }
            Err(error) => swept.left.push(stuck(&name, &error)),
        }
    }
    Ok(())
}
