//! The machine's own limits, measured beside every figure of the library: bare loops without digests, plans
//! or locks, which share no code with the library.

#[cfg(feature = "uring")]
mod ring;
mod search;

pub use search::{Found, Spread, compare, search, search_existing};

use ashore::{Error, IoMode, Result};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const ALIGNMENT: u64 = ashore::ALIGNMENT as u64;

/// How a loop submits its transfers to the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    Pwrite,
    #[cfg(feature = "uring")]
    Uring,
}

/// Describes a loop in a few words.
pub fn shown(config: &Config) -> String {
    let engine = match config.engine {
        Engine::Pwrite => "threads",
        #[cfg(feature = "uring")]
        Engine::Uring => "io_uring",
    };
    format!("{engine}, {} MiB, depth {}", config.chunk >> 20, config.depth)
}

/// The direction of a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    Write,
    Read,
}

/// A loop: transfers of `chunk` bytes, `depth` of them at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Config {
    pub engine: Engine,
    pub chunk: u64,
    pub depth: usize,
}

impl Config {
    pub const fn threads(chunk: u64, depth: usize) -> Self {
        Self { engine: Engine::Pwrite, chunk, depth }
    }
}

/// A measured limit.
#[derive(Clone, Copy, Debug)]
pub struct Limit {
    pub bytes: u64,
    pub time: Duration,
    /// The time after the last byte was transferred.
    pub tail: Duration,
    pub mode: IoMode,
}

impl Limit {
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.time.as_secs_f64()
    }
}

/// The memory of the loops, allocated and touched once, as in a measured program.
pub struct Memory {
    bytes: Vec<u8>,
    start: usize,
}

impl Memory {
    pub fn new(len: u64) -> Self {
        let mut rng = crate::rng::Rng::new(len);
        let mut bytes = vec![0; (len + ALIGNMENT) as usize];
        bytes.chunks_mut(64).for_each(|line| line.fill(rng.below(256) as u8));
        let start = bytes.as_ptr().align_offset(ALIGNMENT as usize).min(ALIGNMENT as usize);
        Self { bytes, start }
    }

    /// Allocates enough for any loop of `search`.
    pub fn ample() -> Self {
        Self::new(search::MEMORY)
    }

    /// Copies all of `sources` into the same memory again and again.
    pub fn copy_all<'a>(&mut self, sources: impl Iterator<Item = &'a [u8]>) {
        let to = &mut self.bytes[self.start..];
        let (mut at, end) = (0, to.len());
        for source in sources {
            for part in source.chunks(8 << 20) {
                at = if at + part.len() > end { 0 } else { at };
                let len = part.len().min(end);
                to[at..at + len].copy_from_slice(&std::hint::black_box(part)[..len]);
                at += len;
            }
        }
        std::hint::black_box(to);
    }

    fn parts(&mut self, config: &Config) -> Vec<&mut [u8]> {
        self.bytes[self.start..].chunks_exact_mut(config.chunk as usize).take(config.depth).collect()
    }
}

/// A file for measuring, in the measured directory.
pub struct Scratch {
    file: File,
    mode: IoMode,
    bytes: u64,
}

impl Scratch {
    /// Opens a fresh file without a name, so that no file remains however the program ends. The file is fresh
    /// because overwriting an old file would be up to a third faster than any program can write new files.
    pub fn new(dir: &Path, bytes: u64) -> Result<Self> {
        Self::opened(dir, bytes, |how| nameless(dir, how))
    }

    fn opened(path: &Path, bytes: u64, open: impl Fn(OFlags) -> rustix::io::Result<OwnedFd>) -> Result<Self> {
        let direct = open(OFlags::DIRECT).map(|file| (file, IoMode::Direct));
        let (file, mode) = direct
            .or_else(|_| open(OFlags::empty()).map(|file| (file, IoMode::Buffered)))
            .map_err(|e| Error::io("cannot create a file to measure the disk", e.into()).with_path(path))?;
        Ok(Self { file: file.into(), mode, bytes: bytes.next_multiple_of(ALIGNMENT) })
    }

    /// Writes the file and makes it durable.
    pub fn write(&self, config: &Config, memory: &mut Memory) -> Result<Limit> {
        let began = Instant::now();
        self.fill(config, memory)?;
        let filled = began.elapsed();
        self.sync()?;
        let time = began.elapsed();
        Ok(Limit { bytes: self.bytes, time, tail: time - filled, mode: self.mode })
    }

    /// Reads the file.
    pub fn read(&self, config: &Config, memory: &mut Memory) -> Result<Limit> {
        let began = Instant::now();
        transfer(&self.file, self.bytes, Direction::Read, config, memory)?;
        Ok(Limit { bytes: self.bytes, time: began.elapsed(), tail: Duration::ZERO, mode: self.mode })
    }

    fn fill(&self, config: &Config, memory: &mut Memory) -> Result<()> {
        // Not every file system supports this; without it the loop is only slower.
        let _ = fallocate(&self.file, FallocateFlags::empty(), 0, self.bytes);
        transfer(&self.file, self.bytes, Direction::Write, config, memory)
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(|e| Error::io("cannot sync the file that measures the disk", e))
    }
}

/// Existing files, which a bare loop reads.
pub struct Existing(Vec<Scratch>);

impl Existing {
    /// Opens the shards of a step.
    pub fn shards(step: &Path) -> Result<Self> {
        let failed = |e| Error::io("cannot list a step to measure the disk", e).with_path(step);
        let mut shards = Vec::new();
        for entry in std::fs::read_dir(step).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            if path.extension().is_none_or(|extension| extension != "safetensors") {
                continue;
            }
            let bytes = path.metadata().map_err(failed)?.len();
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            let shard = Scratch::opened(&path, bytes, |how| open(&path, flags | how, Mode::empty()))?;
            // Direct reads need whole blocks: the last, partial block is left out.
            shards.push(Scratch { bytes: bytes - bytes % ALIGNMENT, ..shard });
        }
        Ok(Self(shards))
    }

    /// Reads the files, one after the other.
    pub fn read(&self, config: &Config, memory: &mut Memory) -> Result<Limit> {
        self.read_some(u64::MAX, config, memory)
    }

    /// Reads the first `most` bytes of them.
    pub fn read_some(&self, most: u64, config: &Config, memory: &mut Memory) -> Result<Limit> {
        let (began, mut bytes, mut mode) = (Instant::now(), 0, IoMode::Direct);
        for shard in &self.0 {
            let length = shard.bytes.min((most - bytes) / ALIGNMENT * ALIGNMENT);
            transfer(&shard.file, length, Direction::Read, config, memory)?;
            (bytes, mode) = (bytes + length, shard.mode);
            if bytes >= most {
                break;
            }
        }
        Ok(Limit { bytes, time: began.elapsed(), tail: Duration::ZERO, mode })
    }
}

/// Measures the minimum of a durable checkpoint: fresh files of these lengths, a manifest, a rename, and the
/// same fsyncs.
pub fn checkpoint(dir: &Path, files: &[u64], manifest: u64, config: &Config, memory: &mut Memory) -> Result<Limit> {
    let from = attempt(dir);
    let began = Instant::now();
    std::fs::create_dir(&from).map_err(|e| failed("cannot create a directory to measure in", e, &from))?;
    let (last_byte, mode) = write_files(&from, "shard", files, config, memory)?;
    publish(dir, manifest, memory)?;
    let time = began.elapsed();
    remove(dir)?;
    Ok(Limit { bytes: files.iter().sum(), time, tail: time - (last_byte - began), mode })
}

/// The directory of a measured checkpoint before its rename.
pub fn attempt(dir: &Path) -> PathBuf {
    dir.join(".limit.tmp")
}

/// Writes fresh files of these lengths and makes them durable; [`publish`] or [`sync_names`] makes their
/// names durable. Returns the time when the last byte was written.
pub fn write_files(
    attempt: &Path,
    name: &str,
    files: &[u64],
    config: &Config,
    memory: &mut Memory,
) -> Result<(Instant, IoMode)> {
    let mut shards = Vec::with_capacity(files.len());
    for (i, &bytes) in files.iter().enumerate() {
        let shard = fresh(&attempt.join(format!("{name}-{i}")), bytes)?;
        shard.fill(config, memory)?;
        shards.push(shard);
    }
    let last_byte = Instant::now();
    for (shard, &bytes) in shards.iter().zip(files) {
        if !bytes.is_multiple_of(ALIGNMENT) {
            shard.file.set_len(bytes).map_err(|e| failed("cannot cut a file to measure the disk", e, attempt))?;
        }
        shard.sync()?;
    }
    Ok((last_byte, shards.first().map_or(IoMode::Direct, |shard| shard.mode)))
}

/// Makes the names in a directory durable.
pub fn sync_names(dir: &Path) -> Result<()> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|e| failed("cannot sync a directory to measure the disk", e, dir))
}

/// Writes the manifest of a measured checkpoint, and renames its directory.
pub fn publish(dir: &Path, manifest: u64, memory: &mut Memory) -> Result<()> {
    let from = attempt(dir);
    let small = fresh(&from.join("manifest"), manifest)?;
    let whole = Config { chunk: small.bytes.clamp(ALIGNMENT, search::MEMORY), ..Config::threads(0, 1) };
    transfer(&small.file, small.bytes, Direction::Write, &whole, memory)?;
    small.file.set_len(manifest).map_err(|e| failed("cannot cut a file to measure the disk", e, &from))?;
    small.sync()?;
    sync_names(&from)?;
    std::fs::rename(&from, published(dir))
        .map_err(|e| failed("cannot rename a directory to measure the disk", e, &from))?;
    sync_names(dir)
}

/// Removes a measured checkpoint, outside of all timings.
pub fn remove(dir: &Path) -> Result<()> {
    let path = published(dir);
    std::fs::remove_dir_all(&path).map_err(|e| failed("cannot remove the directory that measured the disk", e, &path))
}

fn published(dir: &Path) -> PathBuf {
    dir.join("limit")
}

fn failed(what: &'static str, error: std::io::Error, path: &Path) -> Error {
    Error::io(what, error).with_path(path)
}

fn fresh(path: &Path, bytes: u64) -> Result<Scratch> {
    let mode = Mode::RUSR | Mode::WUSR;
    Scratch::opened(path, bytes, |how| {
        let opened = open(path, OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | how, mode);
        // A refused flag can still create the name.
        opened.inspect_err(|_| drop(std::fs::remove_file(path)))
    })
}

/// Opens a file without a name, or, if the file system does not support that, one that is unlinked at once.
fn nameless(dir: &Path, how: OFlags) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | how;
    let mode = Mode::RUSR | Mode::WUSR;
    open(dir, flags | OFlags::TMPFILE, mode).or_else(|_| {
        let path = dir.join(format!(".ashore-limit-{}", std::process::id()));
        let opened = open(&path, flags | OFlags::CREATE | OFlags::EXCL, mode);
        // A refused flag can still create the name.
        let _ = std::fs::remove_file(&path);
        opened
    })
}

fn transfer(file: &File, total: u64, direction: Direction, config: &Config, memory: &mut Memory) -> Result<()> {
    let parts = memory.parts(config);
    if parts.is_empty() {
        return Err(Error::new(ashore::ErrorKind::Internal, "a loop has no memory"));
    }
    let ended = match config.engine {
        Engine::Pwrite => threads(file, total, direction, config.chunk, parts),
        #[cfg(feature = "uring")]
        Engine::Uring => ring::transfer(file, total, direction, config.chunk, parts),
    };
    ended.map_err(|e| Error::io("the loop that measures the disk failed", e))
}

fn threads(file: &File, total: u64, way: Direction, chunk: u64, parts: Vec<&mut [u8]>) -> std::io::Result<()> {
    let next = AtomicU64::new(0);
    let run = |part: &mut [u8]| loop {
        let at = next.fetch_add(chunk, Ordering::Relaxed);
        let len = total.saturating_sub(at).min(chunk) as usize;
        match way {
            _ if len == 0 => return Ok(()),
            Direction::Write => file.write_all_at(&part[..len], at)?,
            Direction::Read => file.read_exact_at(&mut part[..len], at)?,
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts.into_iter().map(|part| scope.spawn(|| run(part))).collect();
        let died = |_| Err(std::io::ErrorKind::Other.into());
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(died))
    })
}

/// Measures how fast this machine copies memory on one thread.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn configs() -> Vec<Config> {
        vec![
            Config::threads(8192, 3),
            Config::threads(4096, 1),
            #[cfg(feature = "uring")]
            Config { engine: Engine::Uring, chunk: 8192, depth: 3 },
        ]
    }

    #[test]
    fn every_byte_is_written_and_read_and_nothing_stays_behind() {
        let dir = tempfile::tempdir().unwrap();
        for config in configs() {
            let scratch = Scratch::new(dir.path(), 5 * 8192 + 100).unwrap();
            let mut memory = Memory::new(3 * 8192);
            memory.bytes.fill(7);
            assert_eq!(scratch.write(&config, &mut memory).unwrap().bytes, 11 * 4096);
            assert_eq!(scratch.file.metadata().unwrap().len(), 11 * 4096);
            memory.bytes.fill(0);
            assert_eq!(scratch.read(&config, &mut memory).unwrap().bytes, 11 * 4096);
            let read = (11 * 4096).min(config.depth * config.chunk as usize);
            let seen = memory.bytes[memory.start..][..read].iter().filter(|&&b| b == 7).count();
            assert!(seen >= 4096, "{config:?}: {seen} of {read}");
            let limit = checkpoint(dir.path(), &[5 * 8192 + 100, 4096], 5000, &config, &mut memory).unwrap();
            assert_eq!(limit.bytes, 6 * 8192 - 4096 + 100);
            assert!(limit.tail < limit.time);
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_is_not_there_is_named() {
        let mut memory = Memory::new(4096);
        let nowhere = Path::new("/nowhere/at/all");
        let error = checkpoint(nowhere, &[4096], 1, &Config::threads(4096, 1), &mut memory).unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"), "{error}");
    }
}
