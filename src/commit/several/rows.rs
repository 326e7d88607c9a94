//! The rows of a rank's files, and the manifest that rank 0 makes of the rows of all ranks.

use crate::commit::single::fill_manifest;
use crate::error::{Error, Result};
use crate::format::manifest::Manifest;
use crate::memory::AlignedBuffer;
use crate::plan::{Receipts, Request};
use std::collections::BTreeMap;

/// Writes the rows of the files that this rank has written.
pub(super) fn fill(request: &Request, receipts: &Receipts, out: &mut AlignedBuffer) -> Result<()> {
    fill_manifest(request, receipts, out)
}

/// The manifest of the step; `parts` are the rows of all ranks, in their order.
///
/// # Errors
/// `Invalid`, naming the tensor and the ranks, when the parts do not make whole tensors.
pub(super) fn manifest(request: &Request, world: u32, parts: &[Vec<u8>]) -> Result<Vec<u8>> {
    let (mut files, mut tensors) = (Vec::new(), BTreeMap::new());
    for (rank, part) in (0..).zip(parts) {
        let part = Manifest::parse(part).map_err(|error| error.with_rank(rank))?;
        let first = files.len();
        files.extend(part.files);
        for mut tensor in part.tensors {
            tensor.slices.iter_mut().for_each(|slice| slice.file += first);
            let name = tensor.name.clone();
            if let Some((earlier, _)) = tensors.insert(name.clone(), (rank, tensor)) {
                let why = format!("two ranks save the same tensor tensor={name:?}");
                return Err(Error::invalid(why).with_ranks([earlier, rank]));
            }
        }
    }
    let ticket = &request.ticket;
    let manifest = Manifest {
        format: "ashore".into(),
        version: crate::format::seal::VERSION,
        step: ticket.step,
        attempt: ticket.attempt(),
        world,
        metadata: request.metadata.clone(),
        values: request.values.clone(),
        files,
        tensors: tensors.into_values().map(|(_, tensor)| tensor).collect(),
    };
    let bytes = manifest.to_bytes()?;
    Manifest::parse(&bytes)?;
    Ok(bytes)
}
