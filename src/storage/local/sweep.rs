//! Cleaning up after the dead of this host, and after nobody else.

use super::dir::Dir;
use super::owner::{Finding, Owner};
use super::{durable, names, owner, trash};
use crate::error::Result;
use crate::storage::Swept;

/// Removes what dead owners left, and whatever lies in the trash. One that cannot be removed does not keep the others.
pub(super) fn sweep(root: &Dir) -> Result<Swept> {
    let listed = root.list().map_err(root.own_error("cannot list"))?;
    let listed: Vec<&str> = listed.iter().filter_map(|name| name.to_str()).collect();
    let mut swept = Swept::default();
    for name in &listed {
        let Some((step, attempt)) = names::parse_owner(name) else { continue };
        let temp = names::temp(step, attempt);
        match owner::judge(root, name).and_then(|finding| act(root, finding, &temp)) {
            Ok(None) => swept.removed.push(temp),
            Ok(Some(Left::Because(reason))) => swept.left.push((temp, reason)),
            Ok(Some(Left::Gone)) => {}
            Err(error) => swept.left.push((temp, error.to_string())),
        }
    }
    let owned = |step, attempt| listed.contains(&names::owner(step, attempt).as_str());
    for name in &listed {
        if names::parse_temp(name).is_some_and(|(step, attempt)| !owned(step, attempt)) {
            swept.left.push(((*name).to_owned(), "has no owner record".into()));
        }
    }
    empty_trash(root, &listed, &mut swept)?;
    Ok(swept)
}

enum Left {
    Because(String),
    Gone,
}

fn act(root: &Dir, finding: Finding, temp: &str) -> Result<Option<Left>> {
    match finding {
        Finding::Dead(owner) => bury(root, &owner, temp).map(|()| None),
        Finding::Left(reason) => Ok(Some(Left::Because(reason))),
        Finding::Gone => Ok(Some(Left::Gone)),
    }
}

fn bury(root: &Dir, owner: &Owner, temp: &str) -> Result<()> {
    durable::inherited(root).map_err(root.own_error("cannot make durable what a dead process did"))?;
    if root.look(temp).map_err(root.error("cannot look for the attempt", temp))?.is_some() {
        trash::delete_attempt(root, temp)?;
    }
    owner.erase(root)
}

fn empty_trash(root: &Dir, listed: &[&str], swept: &mut Swept) -> Result<()> {
    let trash: Vec<_> = listed.iter().filter(|name| names::is_trash(name)).collect();
    if trash.is_empty() {
        return Ok(());
    }
    durable::trash(root).map_err(root.own_error("cannot make removals durable"))?;
    for name in trash {
        match trash::delete(root, name) {
            Ok(()) => swept.removed.push((*name).to_string()),
            Err(error) => swept.left.push(((*name).to_string(), error.to_string())),
        }
    }
    Ok(())
}
