//! Writes with io_uring instead of pwrite(2): one call submits a whole chunk in pieces that are in flight
//! together, from memory that the kernel pinned at start. [`Linux`] does everything else.
//!
//! **Protocol.** A ring serves one write at a time. Idle rings wait in a pool, so there are as many rings as
//! writers. If no ring is available (an old kernel, a container that forbids it, no memory), pwrite(2) writes
//! instead. **Fork.** A child shares the queues of its parent's rings, so it does not use them and calls
//! pwrite(2).
//!
//! # Safety argument
//! The kernel reads from a caller's bytes between the submission of a piece and its completion.
//! [`Ring::write`] returns only when every submitted piece has completed, and nothing in between can panic.
//! When the kernel refuses a submission, no later call submits the queued pieces, and their ring is closed.
//! Pieces in registered memory name the memory by an index, and the kernel then reads the pages that were
//! mapped at registration. The registration ends before the memory is unmapped. At its end idle rings are
//! closed, and busy rings are closed instead of reused. No ring can be writing from that memory then, because
//! its writer would hold a lease of it.
#![expect(unsafe_code, reason = "submissions to the kernel's queue; argument above")]

use super::linux::Linux;
use super::sys::{Direct, Kind, Open, RawFd, Rename, Stat, Sys};
use crate::fork::ForkGuard;
use crate::memory::Pages;
use io_uring::{IoUring, opcode, squeue, types};
use std::any::Any;
use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Bytes of one submission. `docs/tuning.md` has the measurements.
const PIECE: usize = 1 << 20;
/// Maximum pieces of one write in flight.
const DEPTH: u32 = 16;
/// Maximum bytes that the kernel registers under one index.
const PER_INDEX: usize = 1 << 30;

/// The system calls of Linux, with writes through io_uring.
#[derive(Clone, Debug)]
pub struct Uring {
    pool: Arc<Mutex<Rings>>,
    origin: ForkGuard,
}

#[derive(Default)]
struct Rings {
    idle: Vec<Ring>,
    /// Addresses of the memory to register. `epoch` counts its changes.
    memory: Range<usize>,
    epoch: u64,
}

impl std::fmt::Debug for Rings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Rings({} idle)", self.idle.len())
    }
}

impl Uring {
    /// Creates a first ring, if the kernel allows it.
    ///
    /// # Errors
    /// Errors of the kernel: `ENOSYS` on kernels without io_uring, `EPERM` if it is forbidden, `ENOMEM`
    /// beyond the limit of locked memory.
    pub fn probe() -> io::Result<Self> {
        let rings = Self { pool: Arc::default(), origin: ForkGuard::new() };
        let ring = rings.ring(&rings.lock())?;
        rings.lock().idle.push(ring);
        Ok(rings)
    }

    fn lock(&self) -> MutexGuard<'_, Rings> {
        lock(&self.pool)
    }

    fn ring(&self, rings: &Rings) -> io::Result<Ring> {
        let (queue, memory, epoch) = (IoUring::new(DEPTH)?, 0..0, rings.epoch);
        let mut ring = Ring {
            queue,
            memory,
            epoch,
            broken: false,
            #[cfg(test)]
            instead: None,
        };
        if let Err(error) = ring.know(rings.memory.clone()) {
            tracing::debug!(error = format_args!("{error:#}"), "io_uring writes from memory that is not registered");
        }
        Ok(ring)
    }

    fn take(&self) -> Option<Ring> {
        let mut rings = self.lock();
        let idle = rings.idle.pop();
        idle.or_else(|| {
            self.ring(&rings)
                .inspect_err(|error| tracing::debug!(error = format_args!("{error:#}"), "no ring: pwrite"))
                .ok()
        })
    }

    fn give(&self, ring: Ring) {
        let mut rings = self.lock();
        if ring.epoch == rings.epoch && !ring.broken {
            rings.idle.push(ring);
        }
    }
}

fn lock(rings: &Mutex<Rings>) -> MutexGuard<'_, Rings> {
    rings.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A registration of memory with the rings, ended by drop.
struct Registered(Arc<Mutex<Rings>>);

impl Drop for Registered {
    fn drop(&mut self) {
        renew(&self.0, 0..0);
    }
}

fn renew(rings: &Mutex<Rings>, memory: Range<usize>) {
    let mut rings = lock(rings);
    rings.memory = memory;
    rings.epoch += 1;
    rings.idle.clear();
}

struct Ring {
    queue: IoUring,
    memory: Range<usize>,
    epoch: u64,
    /// The kernel refused submissions: the ring is not used again. Pieces that the kernel has not taken stay
    /// in the ring, and are discarded with it.
    broken: bool,
    #[cfg(test)]
    instead: Option<Instead>,
}

/// Replaces a submission in tests when it returns Some.
#[cfg(test)]
type Instead = Box<dyn FnMut(&IoUring) -> Option<io::Result<usize>> + Send>;

impl Ring {
    /// Registers `memory`, which saves pinning its pages for every write.
    fn know(&mut self, memory: Range<usize>) -> io::Result<()> {
        if memory.is_empty() {
            return Ok(());
        }
        let part = |base: usize| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(base),
            iov_len: PER_INDEX.min(memory.end - base),
        };
        let parts: Vec<_> = memory.clone().step_by(PER_INDEX).map(part).collect();
        // SAFETY: the memory is mapped while it is registered, and used as the module's safety argument says.
        unsafe { self.queue.submitter().register_buffers(&parts)? };
        self.memory = memory;
        Ok(())
    }

    fn piece(&self, fd: RawFd, bytes: &[u8], offset: u64) -> squeue::Entry {
        let (first, len) = (bytes.as_ptr().addr(), bytes.len() as u32);
        let inside = self.memory.contains(&first) && first + bytes.len() <= self.memory.end;
        let index = |address: usize| (address - self.memory.start) / PER_INDEX;
        if inside && index(first) == index(first + bytes.len() - 1) {
            let index = index(first) as u16;
            return opcode::WriteFixed::new(types::Fd(fd), bytes.as_ptr(), len, index).offset(offset).build();
        }
        opcode::Write::new(types::Fd(fd), bytes.as_ptr(), len).offset(offset).build()
    }

    /// Submits the queued pieces and waits for a completion. A broken ring only waits.
    fn submit(&mut self) -> io::Result<usize> {
        const GET_EVENTS: u32 = 1;
        #[cfg(test)]
        if let Some(submitted) = self.instead.as_mut().and_then(|instead| instead(&self.queue)) {
            return submitted;
        }
        if self.broken {
            // SAFETY: the call submits nothing, and has no pointer argument.
            return unsafe { self.queue.submitter().enter::<libc::sigset_t>(0, 1, GET_EVENTS, None) };
        }
        self.queue.submit_and_wait(1)
    }

    /// Writes `bytes` at `offset`. Returns how many bytes from the first on were written, or the error if no
    /// byte was written.
    fn write(&mut self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let pieces = bytes.len().div_ceil(PIECE);
        let slice = |index: usize| &bytes[index * PIECE..bytes.len().min((index + 1) * PIECE)];
        // The first piece that was not written in full, and its result.
        let mut cut = (pieces, Ok(0));
        let (mut next, mut in_flight) = (0, 0);
        while in_flight > 0 || (next < pieces && cut.0 == pieces) {
            while next < pieces && in_flight < DEPTH as usize && cut.0 == pieces {
                let entry = self.piece(fd, slice(next), offset + (next * PIECE) as u64).user_data(next as u64);
                // SAFETY: descriptor and bytes outlive this call, and this call waits for the completion.
                if unsafe { self.queue.submission().push(&entry) }.is_err() {
                    break;
                }
                (next, in_flight) = (next + 1, in_flight + 1);
            }
            if let Err(error) = self.submit() {
                let passing = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
                if !passing && !self.broken {
                    // Nothing is submitted any more, so the kernel never takes the pieces left in the queue.
                    // The loop waits for the others.
                    self.broken = true;
                    let left = self.queue.submission().len();
                    in_flight -= left;
                    if next - left < cut.0 {
                        cut = (next - left, Err(error));
                    }
                }
                std::thread::sleep(Duration::from_micros(50));
            }
            for done in self.queue.completion() {
                in_flight -= 1;
                let index = done.user_data() as usize;
                let written = usize::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()));
                let whole = written.as_ref().is_ok_and(|&written| written == slice(index).len());
                if !whole && index < cut.0 {
                    cut = (index, written);
                }
            }
        }
        match cut {
            (index, Ok(more)) => Ok(bytes.len().min(index * PIECE + more)),
            (0, Err(error)) => Err(error),
            (index, Err(_)) => Ok(index * PIECE),
        }
    }
}

impl Sys for Uring {
    fn pwrite(&self, fd: RawFd, bytes: &[u8], offset: u64) -> io::Result<usize> {
        if bytes.len() <= PIECE || !self.origin.is_ours() {
            return Linux.pwrite(fd, bytes, offset);
        }
        let Some(mut ring) = self.take() else { return Linux.pwrite(fd, bytes, offset) };
        let written = ring.write(fd, bytes, offset);
        self.give(ring);
        written
    }

    fn register(&self, pages: Pages<'_>) -> Box<dyn Any + Send + Sync> {
        let base = pages.base().addr();
        renew(&self.pool, base..base + pages.size());
        Box::new(Registered(self.pool.clone()))
    }

    fn engine(&self) -> &'static str {
        "io_uring"
    }

    fn open(&self, dir: Option<RawFd>, path: &Path, how: Open, follow: bool) -> io::Result<RawFd> {
        Linux.open(dir, path, how, follow)
    }

    fn close(&self, fd: RawFd) {
        Linux.close(fd);
    }

    fn mkdir(&self, dir: Option<RawFd>, path: &Path) -> io::Result<()> {
        Linux.mkdir(dir, path)
    }

    fn pread(&self, fd: RawFd, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        Linux.pread(fd, buffer, offset)
    }

    fn fsync(&self, fd: RawFd) -> io::Result<()> {
        Linux.fsync(fd)
    }

    fn fallocate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        Linux.fallocate(fd, len)
    }

    fn ftruncate(&self, fd: RawFd, len: u64) -> io::Result<()> {
        Linux.ftruncate(fd, len)
    }

    fn rename(&self, dir: RawFd, from: &Path, to: &Path, how: Rename) -> io::Result<()> {
        Linux.rename(dir, from, to, how)
    }

    fn link(&self, file: RawFd, dir: RawFd, name: &Path) -> io::Result<()> {
        Linux.link(file, dir, name)
    }

    fn clone_file(&self, from: RawFd, to: RawFd) -> io::Result<()> {
        Linux.clone_file(from, to)
    }

    fn protect(&self, fd: RawFd) -> io::Result<()> {
        Linux.protect(fd)
    }

    fn unlink(&self, dir: RawFd, name: &Path, kind: Kind) -> io::Result<()> {
        Linux.unlink(dir, name, kind)
    }

    fn stat(&self, fd: RawFd) -> io::Result<Stat> {
        Linux.stat(fd)
    }

    fn stat_at(&self, dir: RawFd, name: &Path) -> io::Result<Stat> {
        Linux.stat_at(dir, name)
    }

    fn touch(&self, fd: RawFd) -> io::Result<()> {
        Linux.touch(fd)
    }

    fn path_of(&self, dir: RawFd) -> Option<PathBuf> {
        Linux.path_of(dir)
    }

    fn list(&self, dir: RawFd) -> io::Result<Vec<OsString>> {
        Linux.list(dir)
    }

    fn drop_cached(&self, fd: RawFd) {
        Linux.drop_cached(fd);
    }

    fn try_lock(&self, fd: RawFd) -> io::Result<bool> {
        Linux.try_lock(fd)
    }

    fn direct(&self, fd: RawFd) -> io::Result<Direct> {
        Linux.direct(fd)
    }

    fn buffered(&self, fd: RawFd) -> io::Result<()> {
        Linux.buffered(fd)
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use super::*;
    use crate::memory::AlignedBuffer;
    use std::fs::{File, OpenOptions};
    use std::io::{Read, Write};
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::{FileExt, OpenOptionsExt};

    /// None, with a message, if this machine allows no rings.
    fn uring() -> Option<Uring> {
        let probed = Uring::probe();
        if let Err(error) = &probed {
            writeln!(io::stderr().lock(), "left out: io_uring is not available: {error}").unwrap();
        }
        probed.ok()
    }

    fn pattern(len: usize) -> AlignedBuffer {
        let mut bytes = AlignedBuffer::new(len);
        bytes.iter_mut().enumerate().for_each(|(i, b)| *b = (i / 4096 * 31 + i % 251) as u8);
        bytes
    }

    fn content(file: &File, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        file.read_exact_at(&mut bytes, 4096).unwrap();
        bytes
    }

    #[test]
    fn every_byte_of_a_long_write_arrives_from_registered_memory_and_from_any_other() {
        let Some(uring) = uring() else { return };
        let file = tempfile::tempfile().unwrap();
        let mut bytes = pattern(40 * PIECE + 12_288);
        for registered in [0, bytes.len(), 3 * PIECE + 4096] {
            bytes[PIECE] = bytes[PIECE].wrapping_add(1);
            // SAFETY: dropped before the buffer.
            let known = uring.register(unsafe { Pages::new(bytes.as_mut_ptr(), registered) });
            assert_eq!(uring.pwrite(file.as_raw_fd(), &bytes, 4096).unwrap(), bytes.len());
            assert!(content(&file, bytes.len()) == bytes[..], "registered={registered}");
            assert!(uring.lock().idle.iter().all(|ring| ring.memory.len() <= registered));
            drop(known);
            assert!(uring.lock().idle.is_empty(), "a ring still knows memory that may be unmapped now");
        }
    }

    #[test]
    fn memory_that_changed_its_pages_is_read_anew() {
        let Some(uring) = uring() else { return };
        let file = tempfile::tempfile().unwrap();
        let mut first = pattern(2 * PIECE);
        // SAFETY: dropped at once.
        drop(uring.register(unsafe { Pages::new(first.as_mut_ptr(), first.len()) }));
        drop(first);
        let second = pattern(2 * PIECE);
        uring.pwrite(file.as_raw_fd(), &second, 4096).unwrap();
        assert!(content(&file, second.len()) == second[..]);
    }

    #[test]
    fn a_write_that_ends_in_the_middle_says_how_far_it_came() {
        let Some(uring) = uring() else { return };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let direct = || OpenOptions::new().write(true).create(true).custom_flags(libc::O_DIRECT).open(&path);
        let Ok(file) = direct() else { return };
        let bytes = pattern(20 * PIECE + 100);
        // Direct I/O refuses the last piece because of its length. A file system that accepts it wrote
        // everything.
        let written = uring.pwrite(file.as_raw_fd(), &bytes, 4096).unwrap();
        assert!(written == 20 * PIECE || written == bytes.len(), "{written}");
        assert!(content(&File::open(&path).unwrap(), written) == bytes[..written]);
    }

    #[test]
    fn an_error_of_the_first_piece_is_the_error_of_the_write() {
        let Some(uring) = uring() else { return };
        let bytes = pattern(4 * PIECE);
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = uring.pwrite(full.as_raw_fd(), &bytes, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let error = uring.pwrite(-1, &bytes, 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
    }

    /// Regression: after a failed submission, pieces that the kernel had not taken were no longer counted,
    /// but the call that waited for the other pieces still submitted them. So the write returned while the
    /// kernel still read its bytes.
    #[test]
    fn pieces_that_were_not_taken_when_a_submission_failed_are_never_submitted() {
        let Some(uring) = uring() else { return };
        let mut ring = uring.take().unwrap();
        let bytes = pattern(8 * PIECE);
        // The pipe is full, so that the first piece is in flight until the test reads the pipe.
        let (mut from, mut to) = std::io::pipe().unwrap();
        // SAFETY: the call only returns a number.
        let room = unsafe { libc::fcntl(to.as_raw_fd(), libc::F_GETPIPE_SZ) } as usize;
        to.write_all(&vec![0; room]).unwrap();
        let (mut calls, mut drained) = (0, vec![0; room]);
        ring.instead = Some(Box::new(move |queue| {
            calls += 1;
            match calls {
                // SAFETY: the call submits only the first piece, whose bytes outlive the write.
                1 => Some(unsafe { queue.submitter().enter::<libc::sigset_t>(1, 0, 0, None) }),
                2 => Some(Err(io::Error::from_raw_os_error(libc::EIO))),
                3 => {
                    from.read_exact(&mut drained).unwrap();
                    None
                }
                _ => None,
            }
        }));
        let written = ring.write(to.as_raw_fd(), &bytes, 0).unwrap();
        assert!((1..PIECE).contains(&written), "{written}");
        assert_eq!((ring.broken, ring.queue.submission().len()), (true, 7));
        uring.give(ring);
        assert!(uring.lock().idle.is_empty());
    }

    #[test]
    fn writers_at_once_have_a_ring_each() {
        let Some(uring) = uring() else { return };
        let file = tempfile::tempfile().unwrap();
        let bytes = pattern(3 * PIECE);
        std::thread::scope(|scope| {
            for writer in 0..4_usize {
                let (uring, file, bytes) = (&uring, &file, &bytes);
                scope.spawn(move || {
                    let at = 4096 + (writer * bytes.len()) as u64;
                    assert_eq!(uring.pwrite(file.as_raw_fd(), bytes, at).unwrap(), bytes.len());
                });
            }
        });
        assert!(content(&file, 4 * bytes.len()).chunks(bytes.len()).all(|chunk| chunk == &bytes[..]));
        assert!((1..=4).contains(&uring.lock().idle.len()));
    }
}
