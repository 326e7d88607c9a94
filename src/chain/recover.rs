//! The state of a publisher after a start: it builds only on versions that it has read and made durable
//! itself.

use super::encoding::Held;
use super::inventory::Inventory;
use super::listing::{Cache, Listing, Way};
use super::reading::Delta;
use super::shared::State;
use super::weights::Weights;
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::mutant::{self, Mutant};
use crate::storage::Storage;
use std::sync::Arc;

/// Reads the chain in `storage` and returns the publisher's state. If the newest version cannot be built or
/// made durable, and with `from_full`, the next version is a full.
///
/// # Errors
/// When the versions cannot be listed, or a version cannot be read at present.
pub(super) fn recover(storage: &Arc<dyn Storage>, from_full: bool) -> Result<State> {
    let listing = Listing::read(storage, &mut Cache::default())?;
    let mut state = State { newest: listing.highest.unwrap_or(0), ..State::default() };
    if mutant::on(Mutant::ChainOldNumber) && from_full {
        state.newest = listing.fulls().last_key_value().map_or(0, |(number, _)| *number);
    }
    let Some((_, way)) = listing.ahead(None).filter(|_| !from_full) else { return Ok(state) };
    match read(storage, &way) {
        Ok((weights, full_bytes)) => {
            let holding = weights.holding();
            state.full = way.full.as_ref().map(|full| full.number);
            state.full_bytes = full_bytes;
            state.deltas = way.deltas.iter().map(|delta| (delta.number, delta.bytes)).collect();
            state.held = holding.map(|holding| Arc::new(Held::read(weights, holding, full_bytes)));
        }
        Err(error) => {
            let what = "the newest version cannot be read and made durable; the next one is a full";
            tracing::warn!(error = format_args!("{error:#}"), "{what}");
        }
    }
    Ok(state)
}

/// Makes every version on a way durable, and reads the last one.
fn read(storage: &Arc<dyn Storage>, way: &Way) -> Result<(Weights<'static>, u64)> {
    let (mut weights, mut bytes) = (Weights::new(), 0);
    if let Some(full) = &way.full {
        storage.confirm(&full.name)?;
        let full = Checkpoint::from_storage(storage.clone(), &full.name)?;
        let (inventory, _) = Inventory::of(&full)?;
        weights.load(&full, inventory)?;
        bytes = full.bytes();
    }
    for item in &way.deltas {
        storage.confirm(&item.name)?;
        let delta =
            Delta::read(storage.open(&item.name)?.as_ref(), &storage.describe(&item.name), weights.inventory())?;
        let after = weights.check(&delta)?;
        weights.apply(&delta, after)?;
    }
    Ok((weights, bytes))
}
