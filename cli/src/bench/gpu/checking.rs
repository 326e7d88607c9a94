//! Checks that every save has the state of its step, by the digests in its table.

use super::state::State;
use super::training::Saved;
use crate::bench::null::Sink;
use crate::gpu::{Pinned, Stream};
use ashore::internal::digest::Digest;
use ashore::internal::format::index::Index;
use ashore::internal::format::manifest::Sealed;
use ashore::internal::format::table::InMemory;
use ashore::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

/// The expected digests after some steps of a block, and how many saves matched.
pub struct Checking<'a> {
    state: &'a State,
    sink: &'a Sink,
    expected: BTreeMap<u64, Vec<Digest>>,
    pub checked: u64,
}

impl<'a> Checking<'a> {
    /// Runs the steps of a block once without the library, and digests the state where saves will be: after
    /// each number of steps in `points`, in rising order.
    pub fn new(
        state: &'a State,
        sink: &'a Sink,
        stream: &Stream,
        pinned: &mut Pinned,
        points: impl IntoIterator<Item = u64>,
    ) -> Result<Self> {
        let (mut expected, mut taken) = (BTreeMap::new(), 0);
        state.reset(stream)?;
        for after in points {
            while taken < after {
                state.feed(stream, taken)?;
                state.update(stream)?;
                taken += 1;
            }
            stream.wait()?;
            expected.insert(after, state.digests(pinned)?);
        }
        Ok(Self { state, sink, expected, checked: 0 })
    }

    /// Compares the new tables with the digests expected of these saves.
    ///
    /// # Errors
    /// `Corrupt`, naming a tensor that differs from its state at the save.
    pub fn check(&mut self, saves: &[Saved]) -> Result<()> {
        let indexes = self.sink.taken().chunks_exact(2).map(index).collect::<Result<Vec<_>>>()?;
        for save in saves {
            let found = indexes.iter().find(|index| index.manifest().step == save.number);
            let (Some(found), Some(expected)) = (found, self.expected.get(&save.after)) else {
                return Err(Error::new(ErrorKind::Internal, "a save without a manifest").with_step(save.number));
            };
            for (name, expected) in self.state.names().zip(expected) {
                let slice = found.find(name)?.and_then(|tensor| tensor.slices.first());
                if slice.is_none_or(|slice| slice.digest != *expected) {
                    let why = format!("saved bytes differ from the saved state tensor={name} after={}", save.after);
                    return Err(Error::new(ErrorKind::Corrupt, why).with_step(save.number));
                }
            }
            self.checked += 1;
        }
        Ok(())
    }
}

/// Opens the table and the manifest that a sink has kept of a save.
fn index(kept: &[Vec<u8>]) -> Result<Index> {
    let (table, manifest) = (kept.first().cloned().unwrap_or_default(), kept.last().map_or(&[][..], Vec::as_slice));
    Index::new(Sealed::parse(manifest)?, Box::new(Arc::new(InMemory::new("tensors.table", table))))
}
