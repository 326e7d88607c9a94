//! Files of an older step, for a save with unchanged bytes.
//!
//! **Consistency.** A chunk that is as predicted is not written. When all chunks of a shard are as predicted,
//! the older file becomes the shard: cloned, or linked. Where the storage refuses that, and where another
//! chunk of the shard has changed, the chunks that were not written are copied from the older file. Only the
//! older file has them: the sources may be gone.
//! **Failure.** An older file whose bytes differ from what was written fails the save. The next save writes
//! the file anew.

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

/// The files of an older step of the same plan.
#[derive(Debug)]
pub(crate) struct Older {
    pub prediction: Arc<Prediction>,
    /// For each shard that is predicted to be unchanged, its older file.
    pub files: Vec<Option<Arc<OlderFile>>>,
}

/// A durable file of an older step.
#[derive(Debug)]
pub(crate) struct OlderFile {
    /// The open file, which stays readable after the step is pruned.
    pub reading: Arc<dyn FileReading>,
    /// The row of the file in its step. The origin is the step and attempt in the file's header.
    pub filled: FilledFile,
    /// The number of saves since its bytes were written, and the time of that write.
    pub saves: u32,
    pub written: Instant,
    /// Set when its bytes were found to differ from what was written. All owners of the flag see that.
    pub damaged: Arc<AtomicBool>,
}

impl Older {
    /// Returns the file to adopt for a shard.
    pub fn file(&self, shard: usize) -> Result<&Arc<OlderFile>> {
        let file = self.files.get(shard).and_then(Option::as_ref);
        file.ok_or_else(|| Error::internal("a shard is predicted to be unchanged and has no older file"))
    }
}

impl OlderFile {
    /// Makes a shard of a save out of the file. No chunk of that shard was written.
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

    /// Copies a chunk that the save did not write from the file, through `bytes`.
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
