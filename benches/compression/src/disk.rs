//! The limit of the disk alone: fresh files, written past the page cache, then one fsync.

use crate::memory::{ALIGNMENT, Aligned};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use std::fs::File;
use std::io::Result;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// The length of one write.
pub const WRITE: usize = 8 << 20;

/// Writes in flight. This is enough that the disk always has a write while a writer waits for a core.
pub const WRITERS: usize = 4;

/// Creates a file without a name, so that no file stays behind, however the program ends.
pub fn fresh(dir: &Path) -> Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    Ok(open(dir, flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// Reserves the space of a file, as the library does.
pub fn reserve(file: &File, len: usize) {
    // Not every file system can reserve space.
    let _ = fallocate(file, FallocateFlags::empty(), 0, len as u64);
}

/// Writes `bytes` in place, without a copy. A program that copies or digests cannot be faster.
pub fn write_raw(dir: &Path, bytes: &Aligned) -> Result<Duration> {
    write(dir, bytes, &mut [(); WRITERS], |(), piece, file, at| file.write_all_at(piece, at))
}

/// Copies `bytes` piece by piece to slabs, as the library does, and writes the slabs.
pub fn write_copied(dir: &Path, bytes: &Aligned, slabs: &mut [Aligned; WRITERS]) -> Result<Duration> {
    write(dir, bytes, slabs, |slab, piece, file, at| {
        slab[..piece.len()].copy_from_slice(piece);
        file.write_all_at(&slab[..piece.len()], at)
    })
}

fn write<W: Send>(
    dir: &Path,
    bytes: &Aligned,
    writers: &mut [W; WRITERS],
    bring: impl Fn(&mut W, &[u8], &File, u64) -> Result<()> + Sync,
) -> Result<Duration> {
    assert!(bytes.len().is_multiple_of(ALIGNMENT));
    let file = fresh(dir)?;
    let began = Instant::now();
    reserve(&file, bytes.len());
    let next = AtomicUsize::new(0);
    let run = |writer: &mut W| -> Result<()> {
        loop {
            let at = next.fetch_add(WRITE, Ordering::Relaxed);
            let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) else { return Ok(()) };
            bring(writer, &rest[..rest.len().min(WRITE)], &file, at as u64)?;
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = writers.iter_mut().map(|writer| scope.spawn(|| run(writer))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("a writer"))
    })?;
    file.sync_all()?;
    Ok(began.elapsed())
}
