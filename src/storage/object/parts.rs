//! The parts of a file in a store: their lengths, and the bytes of each part that have arrived.
//!
//! Chunks arrive in any order, and do not end where parts end. So a part consists of pieces of chunks,
//! without a copy, and a chunk that two parts share stays in its slab until both parts are stored.
//! **Completion.** The call that adds the last piece of a part takes all of its pieces. Only this caller
//! sends the part.

use crate::error::{Error, Result};
use crate::memory::ALIGNMENT;
use bytes::Bytes;
use object_store::PutPayload;
use object_store::multipart::PartId;
use smallvec::SmallVec;

/// The limits of stores for the parts of an upload.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// The minimum length of a part in bytes, except the last part.
    pub least: u64,
    /// Parts are rounded up to a multiple of this.
    pub unit: u64,
    /// The maximum number of parts of a file.
    pub count: u64,
    /// The maximum length of a part in bytes.
    pub most: u64,
}

impl Limits {
    /// Limits that every store accepts.
    pub const STORES: Self = Self { least: 8 << 20, unit: 1 << 20, count: 10_000, most: 5 << 30 };

    /// The length of the parts of a file of `len` bytes.
    ///
    /// # Errors
    /// `Invalid` when the file is too long for any store.
    pub fn part(&self, len: u64) -> Result<u64> {
        let part = len.div_ceil(self.count).next_multiple_of(self.unit).max(self.least);
        if part > self.most {
            let what = "a file is too long for a store: save with more files, or on more ranks";
            return Err(Error::invalid(format!("{what} bytes={len} most={}", self.most.saturating_mul(self.count))));
        }
        Ok(part)
    }
}

/// A part of which all bytes have arrived.
#[derive(Debug)]
pub(super) struct Ready {
    pub index: usize,
    pub payload: PutPayload,
}

#[derive(Debug)]
enum Part {
    /// The pieces that have arrived, with their offsets in the file.
    Filling {
        pieces: Vec<(u64, Bytes)>,
        bytes: u64,
    },
    /// The part is being sent.
    Sent,
    Stored(Option<PartId>),
}

/// The parts of one file.
#[derive(Debug)]
pub(super) struct Parts {
    len: u64,
    part: u64,
    parts: Vec<Part>,
    sealed: bool,
    /// Why the file is lost.
    lost: Option<Error>,
}

impl Parts {
    /// The parts of a file of `len` bytes, each of `part` bytes. An empty file has none.
    pub fn new(len: u64, part: u64) -> Self {
        let filling = || Part::Filling { pieces: Vec::new(), bytes: 0 };
        let count = len.div_ceil(part) as usize;
        Self { len, part, parts: std::iter::repeat_with(filling).take(count).collect(), sealed: false, lost: None }
    }

    /// Takes the bytes of a chunk at `offset`, and returns the parts that they complete. Bytes beyond the end
    /// of the file are dropped.
    ///
    /// # Errors
    /// Why the file was lost; `Invalid` for bytes that are not a chunk of the file, or that were added
    /// before.
    pub fn add(&mut self, offset: u64, bytes: &Bytes) -> Result<SmallVec<[Ready; 2]>> {
        self.check(offset, bytes.len() as u64)?;
        let end = self.len.min(offset + bytes.len() as u64);
        let (mut at, mut ready) = (offset, SmallVec::new());
        while at < end {
            let index = (at / self.part) as usize;
            let until = end.min((index as u64 + 1) * self.part);
            let piece = bytes.slice((at - offset) as usize..(until - at + at - offset) as usize);
            ready.extend(self.fill(index, at, piece)?);
            at = until;
        }
        Ok(ready)
    }

    fn check(&self, offset: u64, len: u64) -> Result<()> {
        if let Some(why) = &self.lost {
            return Err(why.clone());
        }
        let unit = ALIGNMENT as u64;
        let room = self.len.checked_next_multiple_of(unit).unwrap_or(u64::MAX);
        let end = offset.checked_add(len).filter(|end| *end <= room);
        let whole = end.is_some_and(|end| len.is_multiple_of(unit) || end == self.len);
        if self.sealed {
            return Err(Error::invalid("a file was written after it was sealed"));
        }
        if len == 0 || !offset.is_multiple_of(unit) || offset >= self.len || !whole {
            let what = "a write must be aligned and within the file";
            return Err(Error::invalid(format!("{what} offset={offset} len={len} file_len={}", self.len)));
        }
        Ok(())
    }

    /// Adds a piece to a part.
    fn fill(&mut self, index: usize, at: u64, piece: Bytes) -> Result<Option<Ready>> {
        let twice = || Error::invalid(format!("bytes of a file were written twice offset={at}"));
        let start = index as u64 * self.part;
        let wanted = self.part.min(self.len - start);
        let slot = self.parts.get_mut(index).ok_or_else(|| Error::internal("a part was lost"))?;
        let Part::Filling { pieces, bytes } = slot else { return Err(twice()) };
        let place = pieces.partition_point(|(before, _)| *before < at);
        let end = |(at, piece): &(u64, Bytes)| at + piece.len() as u64;
        let before = place.checked_sub(1).and_then(|before| pieces.get(before)).map_or(start, end);
        let after = pieces.get(place).map_or(start + wanted, |(after, _)| *after);
        if at < before || at + piece.len() as u64 > after {
            return Err(twice());
        }
        *bytes += piece.len() as u64;
        pieces.insert(place, (at, piece));
        if *bytes < wanted {
            return Ok(None);
        }
        let payload = std::mem::take(pieces).into_iter().map(|(_, piece)| piece).collect();
        *slot = Part::Sent;
        Ok(Some(Ready { index, payload }))
    }

    /// Records that a part is stored. `id` is the store's name for it, if the file has several parts.
    pub fn stored(&mut self, index: usize, id: Option<PartId>) {
        if let Some(part) = self.parts.get_mut(index) {
            *part = Part::Stored(id);
        }
    }

    /// Marks the file as lost: its slabs are returned, and every later call returns this error. The first
    /// call returns true.
    pub fn lose(&mut self, why: &Error) -> bool {
        self.parts.clear();
        let first = self.lost.is_none();
        self.lost.get_or_insert_with(|| why.clone());
        first
    }

    /// Seals the file, and returns the store's names of its parts.
    ///
    /// # Errors
    /// Why the file was lost; `Invalid` when it is sealed already; `Internal` when bytes are missing.
    pub fn seal(&mut self) -> Result<Vec<PartId>> {
        if let Some(why) = &self.lost {
            return Err(why.clone());
        }
        if std::mem::replace(&mut self.sealed, true) {
            return Err(Error::invalid("a file is sealed once"));
        }
        let missing = self.parts.iter().position(|part| !matches!(part, Part::Stored(_)));
        if let Some(first) = missing {
            let what = "a file was sealed before all of it was written";
            return Err(Error::internal(format!("{what} expected_bytes={} missing_part={first}", self.len)));
        }
        let id = |part: &Part| if let Part::Stored(id) = part { id.clone() } else { None };
        Ok(self.parts.iter().filter_map(id).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use proptest::prelude::*;

    const PAGE: u64 = ALIGNMENT as u64;

    #[test]
    fn a_part_follows_from_the_length_and_a_file_has_at_most_ten_thousand() {
        let limits = Limits::STORES;
        let mib = |n: u64| n << 20;
        let cases = [(0, 8), (1, 8), (mib(8), 8), (mib(80_000), 8), (mib(80_000) + 1, 9), (405_000_000_000, 39)];
        for (len, part) in cases {
            assert_eq!(limits.part(len).unwrap(), mib(part), "len={len}");
            assert!(len.div_ceil(mib(part)) <= 10_000);
        }
        assert_eq!(limits.part(10_000 * (5 << 30)).unwrap(), 5 << 30);
        for len in [10_000 * (5 << 30) + 1, u64::MAX - (1 << 20)] {
            let error = limits.part(len).unwrap_err();
            assert!(error.kind() == ErrorKind::Invalid && error.message().contains("more files"), "{error}");
        }
    }

    proptest! {
        #[test]
        fn parts_hold_every_byte_once_whatever_the_order_of_chunks(
            len in 1..40 * PAGE, part in 1..20 * PAGE, chunk in 1..9_u64, seed in any::<u64>(),
        ) {
            let bytes: Vec<u8> = (0..len).map(|at| (at.wrapping_mul(seed | 1) >> 7) as u8).collect();
            let mut padded = bytes.clone();
            padded.resize(len.next_multiple_of(PAGE) as usize, 0xee);
            let mut chunks: Vec<_> = padded.chunks((chunk * PAGE) as usize).enumerate().collect();
            chunks.sort_by_key(|(index, _)| (*index as u64).wrapping_mul(seed | 1).rotate_left(17));
            let mut parts = Parts::new(len, part);
            let mut found = vec![None; len.div_ceil(part) as usize];
            for (index, chunk_bytes) in chunks {
                let offset = index as u64 * chunk * PAGE;
                for ready in parts.add(offset, &Bytes::copy_from_slice(chunk_bytes)).unwrap() {
                    prop_assert!(found[ready.index].is_none());
                    found[ready.index] = Some(Bytes::from(ready.payload));
                    parts.stored(ready.index, None);
                }
                prop_assert_eq!(parts.add(offset, &Bytes::copy_from_slice(chunk_bytes)).unwrap_err().kind(), ErrorKind::Invalid);
            }
            let found: Vec<u8> = found.into_iter().flat_map(|part| part.expect("every part is complete").to_vec()).collect();
            prop_assert!(found == bytes);
            parts.seal().unwrap();
            prop_assert_eq!(parts.seal().unwrap_err().kind(), ErrorKind::Invalid);
        }
    }
}
