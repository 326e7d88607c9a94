//! Removes versions that no reader needs any more.

use super::listing::{Cache, Item, Listing};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::storage::Storage;
use std::collections::BTreeSet;
use std::sync::Arc;

/// Removes the versions older than the durable full of number `full`, oldest first, and that number's own
/// delta if a full stands beside the delta. A version stays until `grace` newer ones are there, and one more.
/// Numbers without a version, of publishes that failed, do not count.
///
/// # Errors
/// Errors of the storage. A version that is gone already is no error.
pub(super) fn prune(storage: &Arc<dyn Storage>, full: Option<u64>, grace: u64) -> Result<Vec<String>> {
    let listing = Listing::read(storage, &mut Cache::default())?;
    let visible = || listing.fulls().last_key_value().map(|(number, _)| *number);
    let Some(full) = (if mutant::on(Mutant::ChainPruneVisible) { visible() } else { full }) else {
        return Ok(Vec::new());
    };
    let beside = |item: &Item| item.base.is_some() && listing.fulls().contains_key(&item.number);
    let old = |item: &Item| item.number < full || item.number == full && beside(item);
    let numbers: BTreeSet<u64> = listing.items.iter().map(|item| item.number).collect();
    let newer = |item: &Item| numbers.iter().rev().take_while(|number| **number > item.number).count() as u64;
    let mut removed = Vec::new();
    for item in listing.items.iter().filter(|item| old(item) && newer(item) > grace) {
        match storage.remove(&item.name) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.with_step(item.number)),
            _ => removed.push(item.name.clone()),
        }
    }
    Ok(removed)
}

/// Removes a version of a follower's own copy, to make room for another version of its number.
///
/// # Errors
/// Errors of the storage.
pub(super) fn replace(storage: &dyn Storage, name: &str) -> Result<()> {
    let gone = |error: &Error| error.kind() == ErrorKind::NotFound;
    storage.remove(name).or_else(|error| if gone(&error) { Ok(()) } else { Err(error) })
}
