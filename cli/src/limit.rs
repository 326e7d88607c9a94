//! What the machine itself can do, measured beside every figure of ours: bare loops without digests, plans or commits.

use ashore::{Error, IoMode, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ALIGNMENT: usize = ashore::ALIGNMENT;

/// A measured limit.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub bytes: u64,
    pub time: Duration,
    pub mode: IoMode,
}

impl Limit {
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.time.as_secs_f64()
    }
}

/// The memory of the loops: taken and touched once, as a program under measurement would, and one piece for each thread.
pub struct Loops {
    chunk: u64,
    buffers: Vec<Buffer>,
}

/// A file for measuring, in the directory that matters. It has no name, so that nothing stays behind however the program ends.
pub struct Scratch {
    file: File,
    mode: IoMode,
    bytes: u64,
}

impl Scratch {
    /// A fresh file: overwriting an old one would be up to a third faster than any program can write new ones.
    pub fn new(dir: &Path, bytes: u64) -> Result<Self> {
        let direct = nameless(dir, OFlags::DIRECT).map(|file| (file, IoMode::Direct));
        let (file, mode) = direct
            .or_else(|_| nameless(dir, OFlags::empty()).map(|file| (file, IoMode::Buffered)))
            .map_err(|e| Error::io("cannot create a file to measure the disk", e.into()).with_path(dir))?;
        let bytes = bytes.next_multiple_of(ALIGNMENT as u64);
        Ok(Self { file: file.into(), mode, bytes })
    }
}

/// A file that has no name, or, where the file system knows no such files, one that loses it at once.
fn nameless(dir: &Path, how: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | how;
    let mode = Mode::RUSR | Mode::WUSR;
    open(dir, flags | OFlags::TMPFILE, mode).or_else(|_| {
        let path = dir.join(format!(".ashore-limit-{}", std::process::id()));
        let opened = open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode);
        // A refused flag can leave the name behind.
        let _ = std::fs::remove_file(&path);
        opened
    })
}

impl Loops {
    pub fn new(chunk: u64, threads: usize) -> Self {
        Self { chunk, buffers: (0..threads).map(|i| Buffer::new(chunk, i as u8 + 1)).collect() }
    }

    /// Writes the file in chunks, and makes it durable.
    pub fn write(&mut self, scratch: &Scratch) -> Result<Limit> {
        let began = Instant::now();
        // Not every file system can; the loop is only slower then.
        let _ = fallocate(&scratch.file, FallocateFlags::empty(), 0, scratch.bytes);
        self.chunks(scratch.bytes, |at, bytes| scratch.file.write_all_at(bytes, at))?;
        scratch.file.sync_all().map_err(|e| Error::io("cannot sync the file that measures the disk", e))?;
        Ok(Limit { bytes: scratch.bytes, time: began.elapsed(), mode: scratch.mode })
    }

    /// One fresh file written durably: the limit of a save.
    pub fn write_fresh(&mut self, dir: &Path, bytes: u64) -> Result<Limit> {
        self.write(&Scratch::new(dir, bytes)?)
    }

    /// Reads the file in chunks.
    pub fn read(&mut self, scratch: &Scratch) -> Result<Limit> {
        let began = Instant::now();
        self.chunks(scratch.bytes, |at, bytes| scratch.file.read_exact_at(bytes, at))?;
        Ok(Limit { bytes: scratch.bytes, time: began.elapsed(), mode: scratch.mode })
    }

    fn chunks(&mut self, total: u64, transfer: impl Fn(u64, &mut [u8]) -> std::io::Result<()> + Sync) -> Result<()> {
        let (next, chunk) = (AtomicU64::new(0), self.chunk);
        let run = |buffer: &mut Buffer| loop {
            let at = next.fetch_add(chunk, Ordering::Relaxed);
            let len = total.saturating_sub(at).min(chunk);
            if len == 0 {
                return Ok(());
            }
            transfer(at, &mut buffer.aligned()[..len as usize])?;
        };
        let ended: std::io::Result<()> = std::thread::scope(|scope| {
            let threads: Vec<_> = self.buffers.iter_mut().map(|buffer| scope.spawn(|| run(buffer))).collect();
            let died = |_| Err(std::io::ErrorKind::Other.into());
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(died))
        });
        ended.map_err(|e| Error::io("the loop that measures the disk failed", e))
    }
}

/// How fast this machine copies memory on one thread.
pub fn copy(bytes: u64) -> f64 {
    const BLOCK: usize = 64 << 20;
    let from = vec![1_u8; BLOCK];
    let mut to = vec![0_u8; BLOCK];
    let rounds = (bytes / BLOCK as u64).max(1);
    let began = Instant::now();
    for _ in 0..rounds {
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&mut to);
    }
    (rounds * BLOCK as u64) as f64 / began.elapsed().as_secs_f64()
}

/// Memory with an aligned part of a given length.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    fn new(len: u64, fill: u8) -> Self {
        let memory = vec![fill; len as usize + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { memory, start }
    }

    fn aligned(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_is_written_and_read_and_nothing_stays_behind() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path(), 5 * 8192 + 100).unwrap();
        let mut loops = Loops::new(8192, 3);
        assert_eq!(loops.write(&scratch).unwrap().bytes, 11 * 4096);
        assert_eq!(scratch.file.metadata().unwrap().len(), 11 * 4096);
        let mut page = Buffer::new(4096, 0);
        for at in (0..11).map(|i| i * 4096) {
            let page = &mut page.aligned()[..4096];
            scratch.file.read_exact_at(page, at).unwrap();
            assert!(page.iter().all(|&b| (1..=3).contains(&b)), "at={at}");
        }
        assert_eq!(loops.read(&scratch).unwrap().bytes, 11 * 4096);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let error = Loops::new(4096, 1).write_fresh(Path::new("/nowhere/at/all"), 4096).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
