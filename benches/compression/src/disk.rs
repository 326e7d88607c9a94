//! The disk's own limit: fresh files, written past the page cache, then one fsync.

use crate::memory::{ALIGNMENT, Aligned};
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use std::fs::File;
use std::io::Result;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// How much is written at once.
pub const WRITE: usize = 8 << 20;

/// Writes in flight. Enough that the disk has one to do when a writer waits for a core.
pub const WRITERS: usize = 4;

/// A fresh file without a name, so that nothing stays behind however the program ends.
pub fn fresh(dir: &Path) -> Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
    Ok(open(dir, flags, Mode::RUSR | Mode::WUSR)?.into())
}

/// Takes the room for a file, as the library does.
pub fn reserve(file: &File, len: usize) {
    // Not every file system can.
    let _ = fallocate(file, FallocateFlags::empty(), 0, len as u64);
}

/// Writes `bytes` as they lie, which copies nothing: no program that copies or digests can be faster.
pub fn write_raw(dir: &Path, bytes: &Aligned) -> Result<Duration> {
    assert!(bytes.len().is_multiple_of(ALIGNMENT));
    let file = fresh(dir)?;
    let began = Instant::now();
    reserve(&file, bytes.len());
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let write = || -> Result<()> {
            loop {
                let at = next.fetch_add(WRITE, Ordering::Relaxed);
                let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) else { return Ok(()) };
                file.write_all_at(&rest[..rest.len().min(WRITE)], at as u64)?;
            }
        };
        let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(write)).collect();
        writers.into_iter().try_for_each(|writer| writer.join().expect("a writer"))
    })?;
    file.sync_all()?;
    Ok(began.elapsed())
}
