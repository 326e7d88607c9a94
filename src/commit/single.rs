//! The commit of a save made by one process.

use super::concluded::{Concluded, Ending, concluded};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::columns::TENSORS_TABLE;
use crate::format::entries::{BLOCK, MANIFEST};
use crate::format::manifest::{Manifest, TableEntry};
use crate::format::shard::INDEX;
use crate::memory::AlignedBuffer;
use crate::mutant::{self, Mutant};
use crate::outcome::{Committed, Phase};
use crate::plan::{Made, Plan, Planned, Receipts, Request, SegmentSource, Shard};
use crate::ticket::Ticket;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Ends a save: commits it, or abandons it.
pub(crate) fn conclude(ending: Ending<'_>) -> Concluded {
    let (ticket, attempt) = (&ending.request.ticket, ending.attempt.clone());
    let committed = ticket.failure().map_or_else(|| commit(ending), Err);
    concluded(ticket, attempt, committed)
}

fn commit(ending: Ending<'_>) -> Result<Committed> {
    let Ending { request, attempt, receipts, path, table } = ending;
    let receipts = receipts?;
    let attempt = attempt.ok_or_else(|| Error::internal("a save without an attempt was written"))?;
    if let Some(index) = &request.plan.index {
        attempt.put(INDEX, index)?;
    }
    let entry = fill_table(request, &receipts, table)?;
    attempt.put(TENSORS_TABLE, table)?;
    let plan = &request.plan;
    let files = plan.length + plan.index.as_ref().map_or(0, |index| index.len() as u64);
    attempt.put(MANIFEST, &manifest(request, files, entry).to_bytes()?)?;
    enter(&request.ticket, Phase::Publishing)?;
    attempt.publish(request.overwrite)?;
    Ok(committed(request, &receipts, path))
}

/// Moves the save to `phase`. From then on the save cannot be failed any more.
///
/// # Errors
/// The reason, if the save has failed before.
pub(super) fn enter(ticket: &Ticket, phase: Phase) -> Result<()> {
    if ticket.enter(phase) {
        return Ok(());
    }
    let gone = || Error::new(ErrorKind::Cancelled, "the save ended before its publish");
    Err(ticket.failure().unwrap_or_else(gone))
}

/// The digests of the bytes that this process has written.
pub(super) struct Summary {
    /// The digest of each tensor of the plan, with the range of `blocks` that has the digests of its blocks.
    pub tensors: Vec<(Digest, Range<usize>)>,
    pub blocks: Vec<Digest>,
    /// For each shard, the digest of its header and of the whole shard.
    pub shards: Vec<(Digest, Digest)>,
    /// The digests at `save` of tensors on devices, by their index in the state dict.
    pub on_devices: Vec<(usize, Digest)>,
}

/// Combines the digests of segments and chunks, and checks for tensors that changed since `save`.
pub(super) fn summarize(request: &Request, receipts: &Receipts) -> Result<Summary> {
    let plan = &request.plan;
    let (segments, chunks) = (&receipts.digests, &receipts.chunks);
    let mut blocks = Vec::new();
    let tensors: Vec<_> = plan.tensors.iter().map(|t| digests(plan, t, segments, &mut blocks)).collect();
    let on_devices = unchanged(request, &tensors)?;
    let shards = plan.shards.iter().map(|s| shard_digests(plan, s, segments, chunks)).collect();
    Ok(Summary { tensors, blocks, shards, on_devices })
}

/// Fills the table of the tensors that this process has written.
fn fill_table(request: &Request, receipts: &Receipts, out: &mut AlignedBuffer) -> Result<TableEntry> {
    let (ticket, plan) = (&request.ticket, &request.plan);
    let Summary { tensors, blocks, shards, .. } = summarize(request, receipts)?;
    let made = shards.into_iter().zip(&receipts.made).map(|(digests, made)| match made {
        Made::Linked(older) if !mutant::on(Mutant::LinkedOrigin) => *older,
        Made::Linked(_) | Made::Written | Made::Refused | Made::Cloned => digests.into(),
    });
    let index = plan.index.iter().map(|index| (Digest::EMPTY, Digest::of(index)).into());
    let files = made.chain(index);
    let slices = tensors.iter().map(|(digest, range)| (*digest, blocks.get(range.clone()).unwrap_or_default()));
    plan.table.fill((ticket.step, ticket.attempt()), files, slices, out)
}

/// The manifest of a step with the table `entry`. `files` is the total length of all files that the table
/// names.
fn manifest(request: &Request, files: u64, entry: TableEntry) -> Manifest {
    Manifest {
        session: request.session.map(|(session, _)| session),
        generation: request.session.map(|(_, generation)| generation),
        metadata: request.metadata.clone(),
        values: request.values.clone(),
        bytes: files + entry.length,
        tables: vec![entry],
        ..Manifest::new(request.ticket.step, request.ticket.attempt())
    }
}

/// Measures a save that has just become durable.
pub(super) fn committed(request: &Request, receipts: &Receipts, path: PathBuf) -> Committed {
    let ticket = &request.ticket;
    let durable = ticket.began.elapsed();
    let of = |kind: fn(&Made) -> bool| {
        let shards = request.plan.shards.iter().zip(&receipts.made);
        shards.filter(|(_, made)| kind(made)).map(|(shard, _)| shard.length).sum()
    };
    let nanos = |n: &AtomicU64| Duration::from_nanos(n.load(Ordering::Relaxed));
    Committed {
        step: ticket.step,
        attempt: ticket.attempt(),
        path,
        bytes: ticket.extent().bytes,
        blocked: nanos(&ticket.blocked_nanos),
        // Kernels of a fence may still run, and keep sources alive, after all bytes have left the GPU.
        staged: Some(nanos(&ticket.staged_nanos)).filter(|staged| !staged.is_zero()).unwrap_or(durable),
        durable,
        tail: durable.saturating_sub(receipts.last_byte),
        mode: receipts.mode,
        written_bytes: of(|made| matches!(made, Made::Written | Made::Refused)),
        cloned_bytes: of(|made| matches!(made, Made::Cloned)),
        linked_bytes: of(|made| matches!(made, Made::Linked(_))),
        refused_files: receipts.made.iter().filter(|made| matches!(made, Made::Refused)).count(),
        over_budget: ticket.extent().over_budget,
        late_chunks: ticket.late_chunks.load(Ordering::Relaxed),
    }
}

/// Combines the digests of a tensor's segments into the digest of the tensor. Adds the digests of its blocks
/// to `blocks`, if the tensor is long enough to have blocks, and returns their range. Segments end where
/// blocks end.
fn digests(plan: &Plan, tensor: &Planned, all: &[Digest], blocks: &mut Vec<Digest>) -> (Digest, Range<usize>) {
    let begin = blocks.len();
    let mut whole = Digest::EMPTY;
    for (segment, digest) in plan.segments[tensor.segments.clone()].iter().zip(&all[tensor.segments.clone()]) {
        let length = segment.length as u64;
        whole = whole.then(*digest, length);
        if tensor.bytes > BLOCK {
            match blocks.last_mut() {
                Some(block) if !segment.at.is_multiple_of(BLOCK) => *block = block.then(*digest, length),
                _ => blocks.push(*digest),
            }
        }
    }
    (whole, begin..blocks.len())
}

/// Returns the digests of a shard's header and of the whole shard.
pub(crate) fn shard_digests(plan: &Plan, shard: &Shard, segments: &[Digest], chunks: &[Digest]) -> (Digest, Digest) {
    let pieces = plan.segments[shard.segments.clone()].iter().zip(&segments[shard.segments.clone()]);
    let header = pieces.take_while(|(segment, _)| segment.source == SegmentSource::Header);
    let header = Digest::concat(header.map(|(segment, digest)| (*digest, segment.length as u64)));
    let parts = plan.chunks[shard.chunks.clone()].iter().zip(&chunks[shard.chunks.clone()]);
    (header, Digest::concat(parts.map(|(chunk, digest)| (*digest, chunk.length as u64))))
}

/// Compares the staged tensors with their digests at `save`. A difference means that a fence was forgotten.
/// Returns the digests of tensors on devices.
fn unchanged(request: &Request, tensors: &[(Digest, Range<usize>)]) -> Result<Vec<(usize, Digest)>> {
    let on_devices = (request.device_digests.0)().unwrap_or_else(|error| {
        request.ticket.digests_missing.store(true, Ordering::Relaxed);
        tracing::warn!(
            error = format_args!("{error:#}"),
            "digests of a device are missing; a forgotten fence is not detected"
        );
        Vec::new()
    });
    for &(index, expected) in request.expected.iter().chain(&on_devices) {
        let place = request.plan.places.get(index).copied();
        if place == Some(None) {
            continue;
        }
        let staged = place.flatten().and_then(|place| tensors.get(place));
        if staged.is_none_or(|(digest, _)| *digest != expected) {
            let name = request.plan.name(index);
            return Err(Error::invalid(format!(
                "a tensor changed between save and fence; was `fence` forgotten, or the tensor written before it? tensor={name:?}"
            )));
        }
    }
    Ok(on_devices)
}
