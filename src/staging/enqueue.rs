//! The queueing of one chunk: its header, its captured bytes, and copies of the rest.
//!
//! # Safety argument
//! The stager copies elements that lie at strides in host memory itself, inside
//! [`Source::read`](crate::state::Source::read). It queues any other copy inside `read`, or holds it back
//! there and queues it with the rest of its chunk; either way it has locked the source gate for reading. The copy reads bytes that the source keeps
//! allocated until it is dropped, and writes a slab whose lease is among the chunks in flight. Both stay
//! until the completion event behind the copy is reached, or until `quiesce` drops a copy that is held back.
//! A chunk is in flight before its first copy is queued, and leaves by its completion event only. The state
//! dict is dropped when no chunk is in flight, or when the device says that no copy runs (`quiesce`); so is
//! the allocation of the tensors that the device captured.
//!
//! A scope may drop borrowed sources earlier: nothing is queued from them any more, and whatever writes or
//! frees their memory comes after the queued copies (see `executor/scope.rs`). If the device does not end its
//! copies in time, the release of sources and slabs is deferred until it does, or they are forgotten with the
//! queue. For borrowed sources the stager waits instead.
#![expect(unsafe_code, reason = "asynchronous copies from sources into slabs; argument above")]

use super::in_flight_chunk::InFlightChunk;
use super::job::Job;
use super::late_copy::LateCopy;
use crate::device::CopyQueue;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::shard::Stamp;
use crate::mutant::{self, Mutant};
use crate::plan::SegmentSource;
use crate::state::MemoryLocation;
use std::ops::Range;

/// Queues the copies of one chunk, and the completion event behind them.
pub(super) fn enqueue(
    job: &Job,
    stamp: &Stamp,
    queue: &mut dyn CopyQueue,
    in_flight: &mut InFlightChunk,
) -> Result<()> {
    let index = in_flight.chunk.index;
    let whole = match &job.late_copy {
        Some(late_copy) if in_flight.live => gather(job, late_copy, index)?,
        Some(late_copy) => {
            Some(late_copy.location(index).ok_or_else(|| Error::internal("a chunk from F on has no slot"))?)
        }
        None => None,
    };
    let chunk = &job.plan.chunks[index];
    let mut digests = Some(Vec::with_capacity(chunk.segments.len()));
    let (base, mut at, mut run) = (in_flight.chunk.lease.as_mut_ptr(), 0, 0..0);
    for segment in &job.plan.segments[chunk.segments.clone()] {
        let (begin, offset, length) = (segment.at as usize, at, segment.length);
        let to = base.wrapping_add(offset);
        at += length;
        let captured = |tensor| job.captured.get(tensor).and_then(|b| b.get(begin..begin + length));
        let digest = match segment.source {
            SegmentSource::Header => {
                // SAFETY: inside the leased slab, initialised when the arena was made, and no queued copy
                // writes this part.
                let location = unsafe { std::slice::from_raw_parts_mut(to, length) };
                if !job.plan.shards[chunk.shard].header.copy(stamp, begin, location) {
                    return Err(Error::internal("a header is shorter than planned"));
                }
                Some(Digest::of(location))
            }
            SegmentSource::Tensor(tensor) => match (captured(tensor), whole) {
                (Some(bytes), _) => {
                    // SAFETY: as above.
                    let location = unsafe { std::slice::from_raw_parts_mut(to, length) };
                    location.copy_from_slice(bytes);
                    Some(Digest::of(location))
                }
                (None, Some((ordinal, address))) if !in_flight.live || job.lies_on(tensor, ordinal) => {
                    if run.end != offset {
                        fetch(queue, ordinal, address, &run, base)?;
                        run.start = offset;
                    }
                    run.end = at;
                    None
                }
                _ => read(job, tensor, begin, length, to, queue)?,
            },
        };
        match digest {
            Some(digest) => digests.iter_mut().for_each(|d| d.push(digest)),
            None => digests = None,
        }
    }
    if let Some((ordinal, address)) = whole {
        fetch(queue, ordinal, address, &run, base)?;
    }
    let tail = at.next_multiple_of(crate::ALIGNMENT) - at;
    // SAFETY: a chunk is no longer than its slab, whose size is a multiple of the alignment; no copy writes
    // beyond `at`.
    unsafe { std::ptr::write_bytes(base.wrapping_add(at), 0, tail) };
    if !mutant::on(Mutant::BatchLate) {
        // Flush before the watermark is published, which says that these copies have been made.
        flush(job, queue)?;
    }
    if let Some(late_copy) = job.late_copy.as_ref().filter(|_| in_flight.live) {
        late_copy.publish(index)?;
    }
    in_flight.event = queue.event()?;
    in_flight.chunk.digests = digests;
    Ok(())
}

/// Queues the copy of `run`, part of a chunk that has on the device the layout of the slab at `to`.
fn fetch(queue: &mut dyn CopyQueue, ordinal: u32, address: u64, run: &Range<usize>, to: *mut u8) -> Result<()> {
    if run.is_empty() {
        return Ok(());
    }
    let from = std::ptr::without_provenance(address as usize + run.start);
    // SAFETY: a slot is kept until its chunk is handed over, and a gathered chunk until the queue has reached
    // this copy; `to` as in `read`. A chunk that has a slot contains no host tensor.
    unsafe { queue.fetch(ordinal, from, to.wrapping_add(run.start), run.len()) }
}

/// Makes the device gather a chunk from live memory, if it is one to be gathered.
fn gather(job: &Job, late_copy: &LateCopy, chunk: usize) -> Result<Option<(u32, u64)>> {
    let _reading = job.ticket.sources.read();
    match job.ticket.failure() {
        Some(error) => Err(error),
        None => late_copy.gather(chunk),
    }
}

/// Queues the copies that are held back, but none once the save has failed: writers of the tensors then wait
/// for no more copies.
fn flush(job: &Job, queue: &mut dyn CopyQueue) -> Result<()> {
    let _reading = job.ticket.sources.read();
    match job.ticket.failure() {
        Some(error) => Err(error),
        None => queue.flush(),
    }
}

/// Queues the copy of a segment from live memory.
fn read(
    job: &Job,
    tensor: usize,
    begin: usize,
    length: usize,
    to: *mut u8,
    queue: &mut dyn CopyQueue,
) -> Result<Option<Digest>> {
    let (name, tensor) = job.state.tensors.get_index(tensor).expect("checked by the plan");
    let _reading = job.ticket.sources.read();
    if let Some(error) = job.ticket.failure() {
        return Err(error);
    }
    let strided = tensor.strided_on_host();
    if strided.is_none() && tensor.strides().is_some() {
        return Err(Error::internal(format!("a strided tensor was not gathered tensor={name:?}")));
    }
    let mut digest = None;
    tensor.read(&mut |from| {
        if let Some(strided) = &strided {
            // SAFETY: the source hands out all its elements, and the slab is leased and initialised; this
            // thread makes the copy now, and no queued copy writes this part.
            let location = unsafe {
                strided.gather(from, begin..begin + length, to);
                std::slice::from_raw_parts(to, length)
            };
            digest = Some(Ok(Some(Digest::of(location))));
            return;
        }
        let from = from.wrapping_add(begin);
        // SAFETY: the source hands out all its bytes and keeps them until it is dropped, the slab is leased
        // and its part at `to` has `length` bytes; both stay until the completion event behind this copy is
        // reached.
        digest = Some(match tensor.location {
            // SAFETY: as above.
            MemoryLocation::Host { .. } => unsafe { queue.copy(from, to, length) },
            MemoryLocation::Device { stream, .. } => {
                // SAFETY: as above.
                unsafe { queue.fetch(stream.ordinal, from, to, length) }.map(|()| None)
            }
        });
    });
    let nothing = || Error::new(ErrorKind::Invalid, format!("a source did not hand out its bytes tensor={name:?}"));
    digest.unwrap_or_else(|| Err(nothing()))
}
