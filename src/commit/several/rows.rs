//! The rows of a rank's files, and the table and manifest that rank 0 makes of the rows of all ranks.

use crate::commit::single::{fill_table, manifest};
use crate::error::{Error, Result};
use crate::format::index::Index;
use crate::format::template::TableTemplate;
use crate::memory::AlignedBuffer;
use crate::plan::{Receipts, Request};
use std::collections::BTreeMap;

/// Writes the rows of the files that this rank has written, as the table of a step that has no others.
pub(super) fn fill(request: &Request, receipts: &Receipts, out: &mut AlignedBuffer) -> Result<()> {
    fill_table(request, receipts, out).map(drop)
}

/// The table and the manifest of the step; `parts` are the rows of all ranks, in their order.
///
/// # Errors
/// `Invalid`, naming the tensor and the ranks, when the parts do not make whole tensors.
pub(super) fn step(request: &Request, world: u32, parts: &[Vec<u8>]) -> Result<(AlignedBuffer, Vec<u8>)> {
    let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
    for (rank, part) in (0..).zip(parts) {
        let part = Index::of_table(part.clone()).map_err(|error| error.with_rank(rank))?;
        let first = files.len();
        let known = part.all_files().and_then(|files| Ok((files, part.some(0..part.tensors())?)));
        let (listed, entries) = known.map_err(|error| error.with_rank(rank))?;
        files.extend(listed.into_iter().map(|file| file.entry.clone()));
        for mut tensor in entries.into_iter().cloned() {
            tensor.slices.iter_mut().for_each(|slice| slice.file += first);
            let name = tensor.name.clone();
            if let Some((earlier, _)) = tensors.insert(name.clone(), (rank, tensor)) {
                let why = format!("two ranks save the same tensor tensor={name:?}");
                return Err(Error::invalid(why).with_ranks([earlier, rank]));
            }
        }
    }
    let tensors: Vec<_> = tensors.into_values().map(|(_, tensor)| tensor).collect();
    let digests = files.iter().map(|file| (file.header, file.digest));
    let slices = tensors.iter().flat_map(|tensor| &tensor.slices).map(|slice| (slice.digest, &slice.blocks[..]));
    let origin = (request.ticket.step, request.ticket.attempt());
    let mut table = AlignedBuffer::new(0);
    let entry = TableTemplate::new(&files, &tensors)?.fill(origin, digests, slices, &mut table)?;
    let length = files.iter().map(|file| file.length).sum();
    let manifest = manifest(request, world, length, entry).to_bytes()?;
    Ok((table, manifest))
}
