//! Pieces: what one thread reads at a time, and the threads that read.

use crate::checkpoint::Files;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::ALIGNMENT;
use crate::storage::{Access, FileReading};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Unwanted bytes up to this length between wanted ones are read as well, because another read costs more.
const GAP: u64 = 64 << 10;

/// Maximum bytes of a read, whatever the storage asks for.
const READ_MAX: u64 = 32 << 20;

/// Minimum bytes per further thread. The running threads read fewer bytes than this before another has
/// started.
const WORTHWHILE: u64 = 4 << 20;

/// Bytes of a file that one digest checks.
pub(super) trait Part: Send {
    /// Returns the index of the file.
    fn file(&self) -> usize;
    /// Returns the byte range in the file, at most `BLOCK` bytes.
    fn range(&self) -> Range<u64>;
    /// Receives the next bytes, and their offset in the file.
    fn take(&mut self, at: u64, bytes: &[u8]) -> Result<()>;
    /// Forgets the received bytes, because all of them are read again.
    fn again(&mut self);
}

/// Bytes per read; `docs/tuning.md` has the measurements. Small neighbours are merged up to this length.
pub(super) const WINDOW: u64 = 2 << 20;

/// How the files of a step are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Manner {
    /// Bytes per read: small neighbours are merged up to this length.
    pub window: u64,
    /// Unwanted bytes up to this length between wanted ones are read as well.
    pub gap: u64,
    /// The most threads that read.
    pub threads: usize,
    /// Bytes with a wrong digest are read once more.
    pub again: bool,
}

impl Manner {
    /// The manner of files with this access, for up to `threads` threads.
    pub fn of(access: Access, threads: usize) -> Self {
        let threads = access.in_flight.map_or(threads, |at_most| threads.min(at_most)).max(1);
        let Some(read) = access.read else { return Self { window: WINDOW, gap: GAP, threads, again: access.again } };
        let window = read.clamp(WINDOW, READ_MAX).next_multiple_of(ALIGNMENT as u64);
        // Reading an eighth more costs less than another request.
        Self { window, gap: window / 8, threads, again: access.again }
    }
}

/// Bytes that are copied and then digested while they are in the second-level cache.
const HOT: usize = 128 << 10;

/// Neighbouring parts of a file, up to the `most` bytes of [`coalesce`], or one part of at most `BLOCK`. One
/// thread reads it.
#[derive(Debug)]
pub(super) struct Piece<P> {
    pub file: usize,
    pub range: Range<u64>,
    pub parts: Vec<P>,
}

impl<P> Piece<P> {
    /// Returns its byte range, extended to whole pages.
    pub fn pages(&self) -> Range<u64> {
        let align = ALIGNMENT as u64;
        let end = self.range.end.checked_next_multiple_of(align).unwrap_or(self.range.end);
        self.range.start - self.range.start % align..end
    }
}

/// Merges neighbours up to `most` bytes with `gap` bytes between them, so that 40,000 small tensors do not
/// cost 40,000 reads.
pub(super) fn coalesce<P: Part>(mut parts: Vec<P>, most: u64, gap: u64) -> Vec<Piece<P>> {
    parts.sort_by_key(|part| (part.file(), part.range().start, part.range().end));
    let mut pieces: Vec<Piece<P>> = Vec::new();
    for part in parts {
        let (file, range) = (part.file(), part.range());
        match pieces.last_mut() {
            Some(last)
                if last.file == file
                    && range.start.saturating_sub(last.range.end) <= gap
                    && range.end.saturating_sub(last.range.start) <= most =>
            {
                last.range.end = last.range.end.max(range.end);
                last.parts.push(part);
            }
            _ => pieces.push(Piece { file, range, parts: vec![part] }),
        }
    }
    pieces
}

/// The buffer that a file's bytes are read into.
pub(super) trait Space {
    /// The maximum length of one read, in whole pages.
    fn step(&self) -> u64;

    /// Returns aligned memory for the next `len` bytes, which begin `offset` bytes after the first.
    fn room(&mut self, offset: u64, len: usize) -> Result<&mut [u8]>;
}

/// An aligned buffer of one thread, reused for each read.
pub(super) struct Window {
    buffer: Vec<u8>,
    /// The bytes of a read.
    bytes: u64,
}

impl Window {
    pub fn new(bytes: u64) -> Self {
        Self { buffer: Vec::new(), bytes }
    }
}

impl Space for Window {
    /// One page more than a window, so that a window with any start takes a single read.
    fn step(&self) -> u64 {
        self.bytes + ALIGNMENT as u64
    }

    fn room(&mut self, _: u64, len: usize) -> Result<&mut [u8]> {
        let need = len + ALIGNMENT;
        if self.buffer.len() < need {
            self.buffer = zeroed(need)?;
        }
        let start = self.buffer.as_ptr().align_offset(ALIGNMENT);
        self.buffer.get_mut(start..start + len).ok_or_else(|| Error::internal("a buffer cannot be aligned"))
    }
}

/// Reads `range` of `file` in aligned steps. Calls `each` with exactly its bytes in order and their offset in
/// the file, in runs short enough to stay in the CPU cache for a second pass.
pub(super) fn stream<S: Space>(
    space: &mut S,
    file: &dyn FileReading,
    range: &Range<u64>,
    mut each: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let align = ALIGNMENT as u64;
    let end = range.end.checked_next_multiple_of(align).unwrap_or(range.end).min(file.len());
    if range.start > range.end || range.end > end {
        return Err(Error::corrupt(format!("a file ends too early range={range:?} len={}", file.len())));
    }
    let (first, step) = (range.start - range.start % align, space.step());
    let mut at = first;
    while at < range.end {
        let bytes = space.room(at - first, (end - at).min(step) as usize)?;
        file.read_at(at, bytes)?;
        let skip = range.start.saturating_sub(at) as usize;
        let wanted = (range.end - at).min(bytes.len() as u64) as usize;
        for start in (skip..wanted).step_by(HOT) {
            each(at + start as u64, &bytes[start..wanted.min(start + HOT)])?;
        }
        at += bytes.len() as u64;
    }
    Ok(())
}

/// Passes the bytes of `piece` through `space`. Each part receives its own.
pub(super) fn pass<P: Part>(space: &mut impl Space, file: &dyn FileReading, piece: &mut Piece<P>) -> Result<()> {
    let Piece { range, parts, .. } = piece;
    let mut first = 0;
    stream(space, file, range, |at, bytes| {
        let end = at + bytes.len() as u64;
        for part in &mut parts[first..] {
            let wanted = part.range();
            let (from, to) = (wanted.start.max(at), wanted.end.min(end));
            if from < to {
                part.take(from, &bytes[(from - at) as usize..(to - at) as usize])?;
            } else if wanted.start >= end {
                break;
            }
        }
        // Parts are sorted by their start, but may end in any order.
        while parts.get(first).is_some_and(|part| part.range().end <= end) {
            first += 1;
        }
        Ok(())
    })
}

/// Allocates zeroed elements; `Busy` when there is not enough memory.
pub(super) fn zeroed<T: bytemuck::Zeroable>(len: usize) -> Result<Vec<T>> {
    bytemuck::allocation::try_zeroed_slice_box(len)
        .map(Vec::from)
        .map_err(|()| Error::new(ErrorKind::Busy, format!("no memory to read into elements={len}")))
}

/// Merges `parts` into pieces and visits each once, on several threads including the caller's. The first
/// error wins; the other threads stop at their next piece.
pub(super) fn visit_all<P: Part>(
    parts: Vec<P>,
    manner: Manner,
    visit: impl Fn(&mut Window, Piece<P>) -> Result<()> + Sync,
) -> Result<()> {
    let pieces = coalesce(parts, manner.window, manner.gap);
    let threads = worthwhile(&pieces, manner.threads);
    share_out(pieces, threads, |pieces| {
        let mut window = Window::new(manner.window);
        for piece in pieces {
            visit(&mut window, piece)?;
        }
        Ok(())
    })
}

/// Returns how many threads to use for `pieces`: at least 1 and at most `threads`.
pub(super) fn worthwhile<P>(pieces: &[Piece<P>], threads: usize) -> usize {
    let bytes: u64 = pieces.iter().map(|piece| piece.range.end - piece.range.start).sum();
    let enough = usize::try_from(bytes / WORTHWHILE).unwrap_or(usize::MAX).saturating_add(1);
    threads.min(pieces.len()).min(enough).max(1)
}

/// Calls `work` on up to `threads` threads including the caller's, each with a share of the pieces. After the
/// first error, which wins, the other threads get no more pieces.
pub(super) fn share_out<P: Part>(
    pieces: Vec<Piece<P>>,
    threads: usize,
    work: impl Fn(&mut dyn Iterator<Item = Piece<P>>) -> Result<()> + Sync,
) -> Result<()> {
    let queue = Mutex::new(pieces.into_iter());
    let failed = AtomicBool::new(false);
    let first = Mutex::new(None);
    let next = || {
        let stop = failed.load(Ordering::Relaxed);
        if stop { None } else { queue.lock().unwrap_or_else(PoisonError::into_inner).next() }
    };
    let work = || {
        if let Err(error) = work(&mut std::iter::from_fn(next)) {
            failed.store(true, Ordering::Relaxed);
            first.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads {
            // If a thread cannot be started, the caller does its work, only slower.
            if thread::Builder::new().name("ashore-read".into()).spawn_scoped(scope, work).is_err() {
                break;
            }
        }
        work();
    });
    match first.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

/// Returns a file of a step by its number.
pub(super) fn file_at(files: &Files, index: usize) -> Result<&dyn FileReading> {
    files.get(index)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::entries::BLOCK;
    use proptest::prelude::*;

    impl Part for (usize, Range<u64>) {
        fn file(&self) -> usize {
            self.0
        }
        fn range(&self) -> Range<u64> {
            self.1.clone()
        }
        fn take(&mut self, _: u64, _: &[u8]) -> Result<()> {
            Ok(())
        }
        fn again(&mut self) {}
    }

    proptest! {
        #[test]
        fn pieces_hold_every_part_once_and_no_more_than_a_window_or_one_part(
            parts in prop::collection::vec((0_usize..3, 0_u64..4 * BLOCK, 0_u64..BLOCK), 0..60),
        ) {
            let mut parts: Vec<_> = parts.into_iter().map(|(file, at, len)| (file, at..at + len)).collect();
            let longest = parts.iter().map(|(_, part)| part.end - part.start).max().unwrap_or(0);
            let pieces = coalesce(parts.clone(), WINDOW, GAP);
            for piece in &pieces {
                let length = piece.range.end - piece.range.start;
                let most = if piece.parts.len() == 1 { BLOCK } else { WINDOW.max(longest) };
                prop_assert!(length <= most);
                let inside = |(file, part): &(usize, Range<u64>)| {
                    *file == piece.file && piece.range.start <= part.start && part.end <= piece.range.end
                };
                prop_assert!(piece.parts.iter().all(inside));
            }
            let mut seen: Vec<_> = pieces.into_iter().flat_map(|piece| piece.parts).collect();
            let key = |part: &(usize, Range<u64>)| (part.0, part.1.start, part.1.end);
            parts.sort_by_key(key);
            seen.sort_by_key(key);
            prop_assert_eq!(seen, parts);
        }
    }

    #[test]
    fn many_small_neighbours_are_one_read_and_far_ones_are_not() {
        let near: Vec<_> = (0..40_000).map(|i| (0, i * 16..i * 16 + 16)).collect();
        assert_eq!(coalesce(near, WINDOW, GAP).len(), 1);
        let gaps = || vec![(0, 0..8), (0, 8 + GAP..9 + GAP), (0, 10 + 2 * GAP..11 + 2 * GAP)];
        assert_eq!((coalesce(gaps(), WINDOW, GAP).len(), coalesce(gaps(), WINDOW, GAP + 1).len()), (2, 1));
        assert_eq!(coalesce(vec![(0, 0..8), (1, 8..9)], WINDOW, GAP).len(), 2);
    }

    #[test]
    fn the_first_error_stops_every_thread_and_is_the_one_reported() {
        let (parts, local) = ((0..1000).map(|i| (i, 0..WORTHWHILE)).collect(), Manner::of(Access::LOCAL, 4));
        let visited = std::sync::atomic::AtomicUsize::new(0);
        let result = visit_all(parts, local, |_, piece| {
            visited.fetch_add(1, Ordering::Relaxed);
            if piece.file == 5 { Err(Error::corrupt("five")) } else { Ok(()) }
        });
        assert_eq!(result.unwrap_err().message(), "five");
        assert!(visited.into_inner() >= 6);
        visit_all(Vec::<(usize, Range<u64>)>::new(), local, |_, _| Ok(())).unwrap();
    }

    #[test]
    fn a_storage_says_how_it_is_read_within_bounds() {
        let local = Manner { window: WINDOW, gap: GAP, threads: 32, again: false };
        assert_eq!(Manner::of(Access::LOCAL, 32), local);
        let store = Manner { window: 8 << 20, gap: 1 << 20, threads: 16, again: true };
        assert_eq!(Manner::of(Access::remote(8 << 20, 16), 32), store);
        assert_eq!(
            Manner::of(Access::remote(0, 0), 32),
            Manner { window: WINDOW, gap: WINDOW / 8, threads: 1, ..store }
        );
        assert_eq!(Manner::of(Access::remote(u64::MAX, 99), 3).window, READ_MAX);
    }
}
