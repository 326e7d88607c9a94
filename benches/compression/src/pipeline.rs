//! The whole pipeline: codes blocks into aligned buffers while other buffers are written, compared with
//! writing the same bytes raw.
//!
//! A file is a row of buffers, each at a multiple of a write's size, because writes at other offsets are
//! slower. A buffer has the used length, then blocks, each with its number and length. The unused rest of a
//! buffer is never written.

use crate::block::{BLOCK, Codec, OVERHEAD_MAX, Scheme};
use crate::disk::{WRITE, WRITERS, fresh, reserve};
use crate::memory::{ALIGNMENT, Aligned};
use std::fs::File;
use std::io::Result;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

const CODERS: usize = 2;
const BUFFERS: usize = CODERS + WRITERS + 2;
const WORD: usize = 4;
const RECORD_MAX: usize = 2 * WORD + BLOCK + OVERHEAD_MAX;

/// The input of a pipeline: bytes, and how the bytes before each end are coded.
pub struct Job<'a> {
    pub raw: &'a Aligned,
    pub parts: Vec<(usize, Scheme)>,
}

impl Job<'_> {
    fn part(&self, block: usize) -> usize {
        self.parts.partition_point(|&(end, _)| end <= block * BLOCK)
    }

    fn codecs(&self) -> Vec<Codec> {
        self.parts.iter().map(|&(_, scheme)| Codec::new(scheme)).collect()
    }
}

/// The memory of a pipeline, allocated once.
pub struct Pipeline {
    codecs: Vec<Vec<Codec>>,
    /// All buffers in one allocation, as in the library. On huge pages a write has fewer parts.
    arena: Aligned,
}

impl Pipeline {
    pub fn new(job: &Job<'_>) -> Self {
        let codecs = (0..CODERS).map(|_| job.codecs()).collect();
        Self { codecs, arena: Aligned::zeroed(BUFFERS * WRITE) }
    }

    /// Codes and writes a fresh file. Once the file is durable, returns it with the number of bytes written.
    pub fn write(&mut self, dir: &Path, job: &Job<'_>) -> Result<(File, usize, Duration)> {
        let file = fresh(dir)?;
        let began = Instant::now();
        reserve(&file, job.raw.len());
        let (next, end, written) = (AtomicUsize::new(0), AtomicUsize::new(0), AtomicUsize::new(0));
        let (give, free) = crossbeam_channel::unbounded();
        let (send, filled) = crossbeam_channel::unbounded::<(&mut [u8], usize)>();
        self.arena.chunks_mut(WRITE).for_each(|buffer| give.send(buffer).expect("an open channel"));
        std::thread::scope(|scope| {
            for codecs in &mut self.codecs {
                let (next, free, send) = (&next, &free, send.clone());
                scope.spawn(move || {
                    let mut taken = take(next, job);
                    while taken.is_some() {
                        let buffer: &mut [u8] = free.recv().expect("an open channel");
                        let used = fill(buffer, &mut taken, next, codecs, job);
                        send.send((buffer, used)).expect("an open channel");
                    }
                });
            }
            drop(send);
            let write = || -> Result<()> {
                for (buffer, used) in &filled {
                    let at = end.fetch_add(WRITE, Ordering::Relaxed);
                    written.fetch_add(used, Ordering::Relaxed);
                    file.write_all_at(&buffer[..used], at as u64)?;
                    give.send(buffer).expect("an open channel");
                }
                Ok(())
            };
            let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(write)).collect();
            writers.into_iter().try_for_each(|writer| writer.join().expect("a writer"))
        })?;
        file.set_len(end.into_inner() as u64)?;
        file.sync_all()?;
        Ok((file, written.into_inner(), began.elapsed()))
    }
}

/// The number of the next block, if there is one.
fn take(next: &AtomicUsize, job: &Job<'_>) -> Option<usize> {
    Some(next.fetch_add(1, Ordering::Relaxed)).filter(|block| block * BLOCK < job.raw.len())
}

/// Fills a buffer with blocks and returns how many bytes of it to write.
fn fill(
    buffer: &mut [u8],
    taken: &mut Option<usize>,
    next: &AtomicUsize,
    codecs: &mut [Codec],
    job: &Job<'_>,
) -> usize {
    let mut at = WORD;
    while let Some(block) = taken.filter(|_| at + RECORD_MAX <= WRITE) {
        let raw = &job.raw[block * BLOCK..(block + 1) * BLOCK];
        let length = codecs[job.part(block)].encode(raw, None, &mut buffer[at + 2 * WORD..]);
        put(buffer, at, block);
        put(buffer, at + WORD, length);
        at += 2 * WORD + length;
        *taken = take(next, job);
    }
    put(buffer, 0, at);
    at.next_multiple_of(ALIGNMENT)
}

/// Reads a file back and returns whether every bit is right.
pub fn came_back(file: &File, job: &Job<'_>) -> Result<bool> {
    let mut all = Aligned::zeroed(file.metadata()?.len() as usize);
    file.read_exact_at(&mut all, 0)?;
    let mut codecs = job.codecs();
    let (mut raw, mut seen) = (Aligned::zeroed(BLOCK), vec![false; job.raw.len() / BLOCK]);
    for buffer in all.chunks(WRITE) {
        let mut at = WORD;
        while at < get(buffer, 0) {
            let (block, length) = (get(buffer, at), get(buffer, at + WORD));
            at += 2 * WORD;
            codecs[job.part(block)].decode(&buffer[at..at + length], None, &mut raw);
            at += length;
            if *raw != job.raw[block * BLOCK..(block + 1) * BLOCK] || std::mem::replace(&mut seen[block], true) {
                return Ok(false);
            }
        }
    }
    Ok(seen.iter().all(|&seen| seen))
}

fn put(buffer: &mut [u8], at: usize, value: usize) {
    buffer[at..at + WORD].copy_from_slice(&(value as u32).to_le_bytes());
}

fn get(buffer: &[u8], at: usize) -> usize {
    let mut word = [0; WORD];
    word.copy_from_slice(&buffer[at..at + WORD]);
    u32::from_le_bytes(word) as usize
}
