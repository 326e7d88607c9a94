//! The commit of a save that one process made alone.

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::manifest::{BLOCK, Head, MANIFEST};
use crate::format::shard::INDEX;
use crate::plan::{From, Plan, Planned, Receipts, Request, Shard};
use crate::storage::Writing;
use crate::ticket::{Committed, Phase};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A step that was published by us and is durable.
#[derive(Debug)]
pub(crate) struct Published {
    pub attempt: Arc<dyn Writing>,
}

/// A save whose chunks are all done.
pub(crate) struct Ending<'a> {
    pub request: &'a Request,
    /// None when it failed before there was one.
    pub attempt: Option<Arc<dyn Writing>>,
    pub receipts: Result<Receipts>,
    /// Where the step will be.
    pub path: PathBuf,
}

/// How a save ended. Its future is still to be resolved: first whoever counts steps has to know.
pub(crate) enum Concluded {
    /// It is durable; the replaced copy, the hint and the rest can be tidied up.
    Durable(Committed, Published),
    /// It may or may not be durable: it must not be counted.
    Doubtful(Error),
    /// It is not there.
    Failed {
        why: Error,
        /// Nothing is left of it; otherwise a sweep has to remove it.
        swept: bool,
    },
}

/// Ends a save: commits it, or abandons it.
pub(crate) fn conclude(ending: Ending<'_>) -> Concluded {
    let (ticket, attempt) = (&ending.request.ticket, ending.attempt.clone());
    let committed = ticket.failure().map_or_else(|| commit(ending), Err);
    match (committed, attempt) {
        (Ok(committed), Some(attempt)) => {
            tracing::info!(step = ticket.step, bytes = committed.bytes, durable = ?committed.durable, "durable");
            Concluded::Durable(committed, Published { attempt })
        }
        (Err(error), _) if error.kind() == ErrorKind::Indeterminate => {
            tracing::error!(step = ticket.step, %error, "nobody knows whether the step is durable");
            Concluded::Doubtful(error)
        }
        (committed, attempt) => {
            let abandoned = attempt.map_or(Ok(()), |a| a.abandon());
            if let Err(left) = &abandoned {
                tracing::warn!(step = ticket.step, error = %left, "an attempt is left for a sweep");
            }
            let why = committed.err().unwrap_or_else(|| Error::internal("a commit without an attempt"));
            tracing::warn!(step = ticket.step, error = %why, "the save failed");
            Concluded::Failed { why, swept: abandoned.is_ok() }
        }
    }
}

fn commit(ending: Ending<'_>) -> Result<Committed> {
    let Ending { request, attempt, receipts, path } = ending;
    let (ticket, plan) = (&request.ticket, &request.plan);
    let Receipts { digests: segments, mode, last_byte } = receipts?;
    let attempt = attempt.ok_or_else(|| Error::internal("a save without an attempt was written"))?;
    let tensors: Vec<_> = plan.tensors.iter().map(|t| digests(plan, t, &segments)).collect();
    unchanged(request, &tensors)?;
    let mut files: Vec<(Digest, Digest)> = plan.shards.iter().map(|s| file(plan, s, &segments)).collect();
    if let Some(index) = &plan.index {
        attempt.put(INDEX, index)?;
        files.push((Digest::EMPTY, Digest::of(index)));
    }
    let head = Head {
        step: ticket.step,
        attempt: ticket.attempt,
        world: 1,
        values: &request.values,
        metadata: &request.metadata,
    };
    let manifest = plan.manifest.fill(&head, files, tensors.iter().map(|(digest, blocks)| (*digest, &blocks[..])))?;
    attempt.put(MANIFEST, &manifest)?;
    if !ticket.enter(Phase::Publishing) {
        let gone = || Error::new(ErrorKind::Cancelled, "the save ended before its publish");
        return Err(ticket.failure().unwrap_or_else(gone));
    }
    attempt.publish(request.overwrite)?;
    let durable = ticket.began.elapsed();
    let nanos = |n: &AtomicU64| Duration::from_nanos(n.load(Ordering::Relaxed));
    Ok(Committed {
        step: ticket.step,
        attempt: ticket.attempt,
        path,
        bytes: ticket.bytes,
        blocked: nanos(&ticket.blocked_nanos),
        staged: nanos(&ticket.staged_nanos),
        durable,
        tail: durable.saturating_sub(last_byte),
        mode,
        over_budget: ticket.over_budget,
    })
}

/// The digest of a tensor and of its blocks, from those of its segments: these are cut where blocks end.
fn digests(plan: &Plan, tensor: &Planned, segments: &[Digest]) -> (Digest, Vec<Digest>) {
    let mut blocks: Vec<(Digest, u64)> = Vec::with_capacity(tensor.bytes.div_ceil(BLOCK) as usize);
    for (segment, digest) in plan.segments[tensor.segments.clone()].iter().zip(&segments[tensor.segments.clone()]) {
        match blocks.last_mut() {
            Some((block, length)) if !segment.at.is_multiple_of(BLOCK) => {
                *block = block.then(*digest, segment.length as u64);
                *length += segment.length as u64;
            }
            _ => blocks.push((*digest, segment.length as u64)),
        }
    }
    let whole = Digest::concat(blocks.iter().copied());
    (whole, if tensor.bytes > BLOCK { blocks.into_iter().map(|(digest, _)| digest).collect() } else { Vec::new() })
}

/// The digests of a shard: of its header, and of all of it.
fn file(plan: &Plan, shard: &Shard, segments: &[Digest]) -> (Digest, Digest) {
    let pieces = plan.segments[shard.segments.clone()].iter().zip(&segments[shard.segments.clone()]);
    let (mut header, mut digest) = (Digest::EMPTY, Digest::EMPTY);
    for (segment, piece) in pieces {
        digest = digest.then(*piece, segment.length as u64);
        if segment.from == From::Header {
            header = digest;
        }
    }
    (header, digest)
}

/// Compares what was staged with what was there at `save`: a difference means that a fence was forgotten.
fn unchanged(request: &Request, tensors: &[(Digest, Vec<Digest>)]) -> Result<()> {
    for (index, expected) in &request.expected {
        let staged = request.plan.places.get(*index).and_then(|place| tensors.get(*place));
        if staged.is_none_or(|(digest, _)| digest != expected) {
            let name = request.plan.name(*index);
            return Err(Error::invalid(format!(
                "a tensor changed between save and fence; was `fence` forgotten, or the tensor written before it? tensor={name:?}"
            )));
        }
    }
    Ok(())
}
