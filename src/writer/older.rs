//! Files of an older step, for a save that has the same bytes.
//!
//! **Consistency.** A chunk that is as predicted is not written. When all chunks of a shard are, the older
//! file becomes the shard: cloned, or linked. Where the storage refuses, and where another chunk of the shard
//! has changed, the chunks that were not written are copied from the older file, which is the only place that
//! has them: the sources may be gone.
//! **Failure.** An older file that is not what was written fails the save; the next one writes the file anew.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::shard::Stamp;
use crate::format::template::FilledFile;
use crate::memory::{ALIGNMENT, AlignedBuffer};
use crate::mutant::{self, Mutant};
use crate::plan::{ChunkPlan, Prediction, Request, SegmentSource};
use crate::storage::{Adopted, FileReading, FileWriting, Writing};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What an older step of the same plan has.
#[derive(Debug)]
pub(crate) struct Older {
    pub prediction: Arc<Prediction>,
    /// Of each shard that is predicted to be unchanged, its file.
    pub files: Vec<Option<Arc<OlderFile>>>,
}

/// A file of an older step, which is durable.
#[derive(Debug)]
pub(crate) struct OlderFile {
    /// It stays readable when the step is pruned.
    pub reading: Arc<dyn FileReading>,
    /// What its step says of it. The origin is the step and attempt that its header names.
    pub filled: FilledFile,
    /// Saves since its bytes were written, and when that was.
    pub saves: u32,
    pub written: Instant,
    /// Its bytes were found to be others than those that were written. All who share them know it.
    pub damaged: Arc<AtomicBool>,
}

impl Older {
    /// The file to adopt for a shard.
    pub fn file(&self, shard: usize) -> Result<&Arc<OlderFile>> {
        let file = self.files.get(shard).and_then(Option::as_ref);
        file.ok_or_else(|| Error::internal("a shard is predicted to be unchanged and has no older file"))
    }
}

impl OlderFile {
    /// Makes a shard of a save, no chunk of which was written, out of the file.
    pub(super) fn adopt(&self, request: &Request, shard: usize, attempt: &dyn Writing) -> Result<Adopted> {
        if self.damaged.load(Ordering::Acquire) {
            return Ok(Adopted::Refused("it is damaged".into()));
        }
        let (plan, ticket) = (&request.plan.shards[shard], &request.ticket);
        let mut head = AlignedBuffer::new(plan.header.len() as usize);
        let stamp = Stamp::new(ticket.step, ticket.attempt());
        if !plan.header.copy(&stamp, 0, &mut head) {
            return Err(Error::internal("a header is shorter than planned"));
        }
        let adopted = attempt.adopt(&plan.name, self.reading.as_ref(), &head)?;
        if let Adopted::Refused(why) = &adopted {
            tracing::debug!(step = ticket.step, file = plan.name, why, "an unchanged file is written");
        }
        Ok(adopted)
    }

    /// Copies a chunk of a save that was not written from the file, through `bytes`.
    pub(super) fn copy(
        &self,
        request: &Request,
        chunk: &ChunkPlan,
        digests: &[Digest],
        to: &dyn FileWriting,
        bytes: &mut AlignedBuffer,
    ) -> Result<()> {
        let (plan, ticket) = (&request.plan, &request.ticket);
        let shard = &plan.shards[chunk.shard];
        bytes.reset(chunk.length.next_multiple_of(ALIGNMENT));
        bytes[chunk.length..].fill(0);
        self.reading.read_at(chunk.offset, &mut bytes[..chunk.length])?;
        let stamp = Stamp::new(ticket.step, ticket.attempt());
        let mut at = 0;
        for (segment, digest) in plan.segments[chunk.segments.clone()].iter().zip(digests) {
            let part = &mut bytes[at..at + segment.length];
            at += segment.length;
            if segment.source == SegmentSource::Header && !shard.header.copy(&stamp, segment.at as usize, part) {
                return Err(Error::internal("a header is shorter than planned"));
            }
            if Digest::of(part) != *digest && !mutant::on(Mutant::CopiedRot) {
                let what = "bytes of an older step are damaged, and this save would have copied them because they \
                    have not changed; the next save writes the file anew";
                return Err(Error::corrupt(format!("{what} file={} offset={}", shard.name, chunk.offset)));
            }
        }
        to.write_at(chunk.offset, bytes)
    }
}
