//! The commit of a save made by one process.

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::{BLOCK, MANIFEST};
use crate::format::shard::INDEX;
use crate::format::template::Head;
use crate::memory::AlignedBuffer;
use crate::outcome::{Committed, Phase};
use crate::plan::{Plan, Planned, Receipts, Request, SegmentSource, Shard};
use crate::storage::Writing;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A save whose chunks are all done.
pub(crate) struct Ending<'a> {
    pub request: &'a Request,
    /// None when the save failed before it had one.
    pub attempt: Option<Arc<dyn Writing>>,
    pub receipts: Result<Receipts>,
    /// The path of the step.
    pub path: PathBuf,
    /// Memory for the manifest, reused from save to save.
    pub manifest: &'a mut AlignedBuffer,
}

/// How a save ended. The future resolves later, after the step was counted.
pub(crate) enum Concluded {
    /// It is durable. The replaced copy and the `latest` hint can be tidied.
    Durable(Committed, Arc<dyn Writing>),
    /// It may or may not be durable, so it must not be counted.
    Doubtful(Error),
    /// It was not published.
    Failed {
        why: Error,
        /// The attempt, if it could not be deleted.
        left: Option<Arc<dyn Writing>>,
    },
}

/// Ends a save: commits it, or abandons it.
pub(crate) fn conclude(ending: Ending<'_>) -> Concluded {
    let (ticket, attempt) = (&ending.request.ticket, ending.attempt.clone());
    let committed = ticket.failure().map_or_else(|| commit(ending), Err);
    match (committed, attempt) {
        (Ok(committed), Some(attempt)) => {
            tracing::info!(step = ticket.step, bytes = committed.bytes, durable = ?committed.durable, "durable");
            Concluded::Durable(committed, attempt)
        }
        (Err(error), _) if error.kind() == ErrorKind::Indeterminate => {
            tracing::error!(
                step = ticket.step,
                error = format_args!("{error:#}"),
                "it is unknown whether the step is durable"
            );
            Concluded::Doubtful(error)
        }
        (committed, attempt) => {
            let left = attempt.filter(|attempt| match attempt.abandon() {
                Ok(()) => false,
                Err(error) => {
                    tracing::warn!(
                        step = ticket.step,
                        error = format_args!("{error:#}"),
                        "a failed attempt will be deleted later"
                    );
                    true
                }
            });
            let why = committed.err().unwrap_or_else(|| Error::internal("a commit without an attempt"));
            if why.kind() == ErrorKind::Cancelled {
                tracing::info!(step = ticket.step, reason = format_args!("{why:#}"), "the save was cancelled");
            } else {
                tracing::warn!(step = ticket.step, error = format_args!("{why:#}"), "the save failed");
            }
            Concluded::Failed { why, left }
        }
    }
}

fn commit(ending: Ending<'_>) -> Result<Committed> {
    let Ending { request, attempt, receipts, path, manifest } = ending;
    let (ticket, plan) = (&request.ticket, &request.plan);
    let Receipts { digests: segments, chunks, mode, last_byte } = receipts?;
    let attempt = attempt.ok_or_else(|| Error::internal("a save without an attempt was written"))?;
    let mut blocks = Vec::new();
    let tensors: Vec<_> = plan.tensors.iter().map(|t| digests(plan, t, &segments, &mut blocks)).collect();
    unchanged(request, &tensors)?;
    let mut files: Vec<(Digest, Digest)> = plan.shards.iter().map(|s| file(plan, s, &segments, &chunks)).collect();
    if let Some(index) = &plan.index {
        attempt.put(INDEX, index)?;
        files.push((Digest::EMPTY, Digest::of(index)));
    }
    let head = Head {
        step: ticket.step,
        attempt: ticket.attempt(),
        world: 1,
        values: &request.values,
        metadata: &request.metadata,
    };
    let slices = tensors.iter().map(|(digest, range)| (*digest, blocks.get(range.clone()).unwrap_or_default()));
    plan.manifest.fill(&head, files, slices, manifest)?;
    attempt.put(MANIFEST, manifest)?;
    if !ticket.enter(Phase::Publishing) {
        let gone = || Error::new(ErrorKind::Cancelled, "the save ended before its publish");
        return Err(ticket.failure().unwrap_or_else(gone));
    }
    attempt.publish(request.overwrite)?;
    let durable = ticket.began.elapsed();
    let nanos = |n: &AtomicU64| Duration::from_nanos(n.load(Ordering::Relaxed));
    Ok(Committed {
        step: ticket.step,
        attempt: ticket.attempt(),
        path,
        bytes: ticket.extent().bytes,
        blocked: nanos(&ticket.blocked_nanos),
        // Kernels of a fence may still run, and keep sources alive, after all bytes have left the GPU.
        staged: Some(nanos(&ticket.staged_nanos)).filter(|staged| !staged.is_zero()).unwrap_or(durable),
        durable,
        tail: durable.saturating_sub(last_byte),
        mode,
        over_budget: ticket.extent().over_budget,
        late_chunks: ticket.late_chunks.load(Ordering::Relaxed),
    })
}

/// Returns the digest of a tensor, from those of its segments, and the range of `blocks` to which the digests
/// of its blocks were added, if it is long enough to have any. Segments end where blocks end.
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
fn file(plan: &Plan, shard: &Shard, segments: &[Digest], chunks: &[Digest]) -> (Digest, Digest) {
    let pieces = plan.segments[shard.segments.clone()].iter().zip(&segments[shard.segments.clone()]);
    let header = pieces.take_while(|(segment, _)| segment.source == SegmentSource::Header);
    let header = Digest::concat(header.map(|(segment, digest)| (*digest, segment.length as u64)));
    let parts = plan.chunks[shard.chunks.clone()].iter().zip(&chunks[shard.chunks.clone()]);
    (header, Digest::concat(parts.map(|(chunk, digest)| (*digest, chunk.length as u64))))
}

/// Compares the staged tensors with their digests at `save`; a difference means that a fence was forgotten.
fn unchanged(request: &Request, tensors: &[(Digest, Range<usize>)]) -> Result<()> {
    let on_devices = (request.device_digests.0)().unwrap_or_else(|error| {
        request.ticket.digests_missing.store(true, Ordering::Relaxed);
        tracing::warn!(
            error = format_args!("{error:#}"),
            "digests of a device are missing; a forgotten fence is not detected"
        );
        Vec::new()
    });
    for &(index, expected) in request.expected.iter().chain(&on_devices) {
        let staged = request.plan.places.get(index).and_then(|place| tensors.get(*place));
        if staged.is_none_or(|(digest, _)| *digest != expected) {
            let name = request.plan.name(index);
            return Err(Error::invalid(format!(
                "a tensor changed between save and fence; was `fence` forgotten, or the tensor written before it? tensor={name:?}"
            )));
        }
    }
    Ok(())
}
