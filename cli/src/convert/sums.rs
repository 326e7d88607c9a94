//! The digests of a file, taken from its bytes in order.

use super::layout::File;
use ashore::internal::digest::Digest;
use ashore::internal::format::entries::{BLOCK, FileEntry, SliceEntry};

/// The digests of the bytes of a file so far.
#[derive(Debug)]
pub struct Sums<'f> {
    file: &'f File,
    header: Run,
    parts: Vec<Run>,
    /// The number of the run that the next byte is in: 0 is the header.
    at: usize,
}

/// A header or box within a file.
#[derive(Debug)]
struct Run {
    length: u64,
    done: u64,
    digest: Digest,
    blocks: Vec<Digest>,
}

impl Run {
    fn new(length: u64) -> Self {
        Self { length, done: 0, digest: Digest::EMPTY, blocks: Vec::new() }
    }

    /// Takes bytes that all belong to this run.
    fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = usize::try_from(BLOCK - self.done % BLOCK).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            let (digest, length) = (Digest::of(now), now.len() as u64);
            match self.blocks.last_mut() {
                Some(block) if !self.done.is_multiple_of(BLOCK) => *block = block.then(digest, length),
                _ => self.blocks.push(digest),
            }
            self.digest = self.digest.then(digest, length);
            self.done += length;
            bytes = later;
        }
    }
}

impl<'f> Sums<'f> {
    /// Returns the digests of no bytes.
    pub fn new(file: &'f File) -> Self {
        let parts = file.parts.iter().map(|part| Run::new(part.bytes)).collect();
        Self { file, header: Run::new(file.header.len()), parts, at: 0 }
    }

    /// Takes the next bytes of the file.
    pub fn feed(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let run = match self.at.checked_sub(1) {
                None => &mut self.header,
                Some(part) => match self.parts.get_mut(part) {
                    Some(run) => run,
                    None => return,
                },
            };
            let room = usize::try_from(run.length - run.done).unwrap_or(usize::MAX);
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            run.feed(now);
            self.at += usize::from(run.done == run.length);
            bytes = later;
        }
    }

    /// Returns file `number` of the step as tables describe it: its entry, and for each box the number of its
    /// tensor, in ascending order.
    pub fn finish(self, number: usize) -> (FileEntry, Vec<(u32, SliceEntry)>) {
        let header = self.header.digest;
        let (name, length, data) = (self.file.name.clone(), self.file.length, self.header.length);
        let (mut digest, mut offset) = (header, data);
        let mut rows = Vec::with_capacity(self.parts.len());
        for (part, run) in self.file.parts.iter().zip(self.parts) {
            let blocks = if run.length > BLOCK { run.blocks } else { Vec::new() };
            let (at, shape, length) = (part.at.clone(), part.shape.clone(), run.length);
            let slice = SliceEntry { file: number, offset, length, at, shape, digest: run.digest, blocks };
            rows.push((part.tensor as u32, slice));
            digest = digest.then(run.digest, run.length);
            offset += run.length;
        }
        rows.sort_by_key(|(tensor, _)| *tensor);
        (FileEntry { name, length, data, header, digest }, rows)
    }
}
