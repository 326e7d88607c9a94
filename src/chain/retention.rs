//! Which versions no reader needs any more.

use super::listing::{Cache, Item, Listing};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::Storage;
use std::sync::Arc;

/// Removes, oldest first, what is older than the durable full of number `full`, and that number's own delta
/// where a full stands beside it. Versions stay until `grace` newer ones are there.
///
/// # Errors
/// Those of the storage. A version that is gone already is none.
pub(super) fn prune(storage: &Arc<dyn Storage>, newest: u64, full: Option<u64>, grace: u64) -> Result<Vec<String>> {
    let listing = Listing::read(storage, &mut Cache::default())?;
    let visible = || listing.fulls().last_key_value().map(|(number, _)| *number);
    let Some(full) = (if mutant::on(Mutant::ChainPruneVisible) { visible() } else { full }) else {
        return Ok(Vec::new());
    };
    let beside = |item: &Item| item.base.is_some() && listing.fulls().contains_key(&item.number);
    let old = |item: &Item| item.number < full || item.number == full && beside(item);
    let mut removed = Vec::new();
    for item in listing.items.iter().filter(|item| old(item) && item.number.saturating_add(grace) < newest) {
        match storage.remove(&item.name) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.with_step(item.number)),
            _ => removed.push(item.name.clone()),
        }
    }
    Ok(removed)
}

/// Removes a version of a follower's own copy, for another one of its number.
///
/// # Errors
/// Those of the storage.
pub(super) fn replace(storage: &dyn Storage, name: &str) -> Result<()> {
    let gone = |error: &Error| error.kind() == ErrorKind::NotFound;
    storage.remove(name).or_else(|error| if gone(&error) { Ok(()) } else { Err(error) })
}
