//! Queues one chunk: its header, its captured bytes, and copies of the rest.
//!
//! # Safety argument
//! The stager itself copies elements that lie at strides in host memory, inside
//! [`Source::read`](crate::state::Source::read). It queues any other copy inside `read`, or holds the copy
//! back there and queues it with the rest of its chunk. Either way it has locked the source gate for reading.
//! If a source returns its address, `read` is not called, and a copy may begin at any time. The copy reads
//! bytes that the source keeps allocated until it is dropped, and writes a slab whose lease is among the
//! chunks in flight. Both stay until the completion event behind the copy is reached, or until `quiesce`
//! drops a copy that is held back. A chunk is in flight before its first copy is queued, and only its
//! completion event ends that. The state dict is dropped when no chunk is in flight, or when the device says
//! that no copy runs (`quiesce`). The same holds for the allocation of the tensors that the device captured.
//!
//! A scope may drop borrowed sources earlier. Then nothing is queued from them any more, and all work that
//! writes or frees their memory comes after the queued copies (see `executor/scope.rs`). If the device does
//! not end its copies in time, the release of sources and slabs is deferred until it does, or sources and
//! slabs are leaked with the queue. For borrowed sources the stager waits instead.
#![expect(unsafe_code, reason = "asynchronous copies from sources into slabs; argument above")]

use super::in_flight_chunk::{InFlightChunk, Origin};
use super::job::Job;
use super::late_copy::LateCopy;
use crate::device::CopyQueue;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::shard::Stamp;
use crate::mutant::{self, Mutant};
use crate::plan::SegmentSource;
use crate::state::MemoryLocation;
use crate::sync::MutexGuard;
use smallvec::SmallVec;
use std::ops::Range;

/// Queues the copies of one chunk, and the completion event behind them.
pub(super) fn enqueue(
    job: &Job,
    stamp: &Stamp,
    queue: &mut dyn CopyQueue,
    in_flight: &mut InFlightChunk,
) -> Result<()> {
    let index = in_flight.chunk.index;
    if let Some(digests) = look(job, stamp, in_flight)? {
        in_flight.event = queue.event()?;
        in_flight.chunk.digests = Some(digests);
        return Ok(());
    }
    let images = images(job, in_flight)?;
    let chunk = &job.plan.chunks[index];
    let mut digests = Some(Vec::with_capacity(chunk.segments.len()));
    let (base, mut at, mut run) = (in_flight.chunk.lease.as_mut_ptr(), 0, Run::default());
    // Locked at the first segment that is read from live memory, and kept for all of the chunk.
    let mut reading = None;
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
            SegmentSource::Tensor(tensor) => match (captured(tensor), image_of(job, &images, tensor)) {
                (Some(bytes), _) => {
                    // SAFETY: as above.
                    let location = unsafe { std::slice::from_raw_parts_mut(to, length) };
                    location.copy_from_slice(bytes);
                    Some(Digest::of(location))
                }
                (None, Image::At(ordinal, address)) => {
                    if (run.ordinal, run.address, run.range.end) != (ordinal, address, offset) {
                        run.fetch(queue, base)?;
                        run = Run { ordinal, address, range: offset..offset };
                    }
                    run.range.end = at;
                    None
                }
                (None, Image::Arrived) => None,
                (None, Image::None) => {
                    if reading.is_none() {
                        reading = Some(begin_reading(job)?);
                    }
                    read(job, tensor, begin, length, to, queue)?
                }
            },
        };
        match digest {
            Some(digest) => digests.iter_mut().for_each(|d| d.push(digest)),
            None => digests = None,
        }
    }
    run.fetch(queue, base)?;
    drop(reading);
    let tail = at.next_multiple_of(crate::ALIGNMENT) - at;
    // SAFETY: a chunk is no longer than its slab, whose size is a multiple of the alignment; no copy writes
    // beyond `at`.
    unsafe { std::ptr::write_bytes(base.wrapping_add(at), 0, tail) };
    if !mutant::on(Mutant::BatchLate) {
        // Flush before the watermark is published, because the watermark says that these copies have been
        // made.
        flush(job, queue)?;
    }
    if let Some(late_copy) = &job.late_copy {
        late_copy.publish(index, &in_flight.origins)?;
    }
    in_flight.event = queue.event()?;
    in_flight.chunk.digests = digests;
    Ok(())
}

/// The digests of a chunk in host memory whose bytes are as predicted. Such a chunk is not copied, because a
/// chunk with these digests is not written. None: the chunk has to be copied.
fn look(job: &Job, stamp: &Stamp, in_flight: &InFlightChunk) -> Result<Option<Vec<Digest>>> {
    let index = in_flight.chunk.index;
    let older = job.prediction.as_ref().and_then(|prediction| prediction.of(&job.plan, index));
    let Some(older) = older.filter(|_| job.late_copy.is_none()) else { return Ok(None) };
    let chunk = &job.plan.chunks[index];
    let mut digests = Vec::with_capacity(older.len());
    let reading = begin_reading(job)?;
    for (segment, old) in job.plan.segments[chunk.segments.clone()].iter().zip(older) {
        let (begin, length) = (segment.at as usize, segment.length);
        let tensor = match segment.source {
            SegmentSource::Header => {
                let mut header = vec![0; length];
                if !job.plan.shards[chunk.shard].header.copy(stamp, begin, &mut header) {
                    return Err(Error::internal("a header is shorter than planned"));
                }
                digests.push(Digest::of(&header));
                continue;
            }
            SegmentSource::Tensor(tensor) => tensor,
        };
        let mut digest = job.captured.get(tensor).and_then(|b| b.get(begin..begin + length)).map(Digest::of);
        if digest.is_none() {
            let (_, tensor) = job.state.tensors.get_index(tensor).expect("checked by the plan");
            if tensor.location.stream().is_some() || tensor.strides().is_some() {
                return Ok(None);
            }
            tensor.read(&mut |from| {
                // SAFETY: the source hands out all its bytes in host memory, and keeps them until it is
                // dropped; the locked gate keeps the program from writing them.
                let bytes = unsafe { std::slice::from_raw_parts(from.wrapping_add(begin), length) };
                digest = Some(Digest::of(bytes));
            });
        }
        if digest != Some(*old) {
            return Ok(None);
        }
        digests.extend(digest);
    }
    drop(reading);
    Ok(Some(digests))
}

/// The memory from which one device's part of a chunk is read.
#[derive(Clone, Copy)]
enum Image {
    /// Memory of the device with the layout of the slab, at this address: a slot, or gathered tensors.
    At(u32, u64),
    /// The tensors themselves, one by one.
    None,
    /// No memory: the part is in the slab already.
    Arrived,
}

/// Returns the memory from which each device's part is read. Makes a device gather its part first, if the
/// part is to be gathered.
fn images(job: &Job, in_flight: &InFlightChunk) -> Result<SmallVec<[Image; 2]>> {
    let (Some(late_copy), index) = (&job.late_copy, in_flight.chunk.index) else { return Ok(SmallVec::new()) };
    let image = |(device, origin): (usize, &Origin)| {
        let address = match origin {
            Origin::Nothing => return Ok(Image::Arrived),
            Origin::Live => gather(job, late_copy, device, index)?,
            Origin::Slot => {
                let slot = late_copy.slot(device, index);
                Some(slot.ok_or_else(|| Error::internal("a chunk from F on has no slot"))?)
            }
        };
        Ok(address.map_or(Image::None, |address| Image::At(late_copy.ordinal(device), address)))
    };
    in_flight.origins.iter().enumerate().map(image).collect()
}

/// The memory from which a tensor is read.
fn image_of(job: &Job, images: &[Image], tensor: usize) -> Image {
    let device = job.late_copy.as_ref().and_then(|late_copy| late_copy.device_of(tensor));
    device.and_then(|device| images.get(device).copied()).unwrap_or(Image::None)
}

/// Adjacent segments of one image, which one copy transfers.
#[derive(Default)]
struct Run {
    ordinal: u32,
    address: u64,
    range: Range<usize>,
}

impl Run {
    /// Queues the copy of the run into the slab at `to`.
    fn fetch(&self, queue: &mut dyn CopyQueue, to: *mut u8) -> Result<()> {
        let Self { ordinal, address, ref range } = *self;
        if range.is_empty() {
            return Ok(());
        }
        let from = std::ptr::without_provenance(address as usize + range.start);
        // SAFETY: a slot is kept until its chunk is handed over, and a gathered chunk until the queue has
        // reached this copy; `to` as in `read`.
        unsafe { queue.fetch(ordinal, from, to.wrapping_add(range.start), range.len()) }
    }
}

/// Makes a device gather its part of a chunk from live memory, if the part is to be gathered.
fn gather(job: &Job, late_copy: &LateCopy, device: usize, chunk: usize) -> Result<Option<u64>> {
    let _reading = begin_reading(job)?;
    late_copy.gather(device, chunk)
}

/// Queues the copies that are held back. Queues none once the save has failed, because writers of the tensors
/// then wait for no more copies.
fn flush(job: &Job, queue: &mut dyn CopyQueue) -> Result<()> {
    let _reading = begin_reading(job)?;
    queue.flush()
}

/// Locks the source gate for reading, unless the save has failed.
fn begin_reading(job: &Job) -> Result<MutexGuard<'_, ()>> {
    let reading = job.ticket.sources.read();
    match job.ticket.failure() {
        Some(error) => Err(error),
        None => Ok(reading),
    }
}

/// Queues the copy of a segment from live memory. The caller has locked the source gate.
fn read(
    job: &Job,
    tensor: usize,
    begin: usize,
    length: usize,
    to: *mut u8,
    queue: &mut dyn CopyQueue,
) -> Result<Option<Digest>> {
    let (name, tensor) = job.state.tensors.get_index(tensor).expect("checked by the plan");
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
