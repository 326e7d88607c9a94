//! The pages of a table: read when they are used, checked, and kept in a cache of bounded size.

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::AlignedBuffer;
use crate::mutant::{self, Mutant};
use foldhash::fast::FixedState;
use lru::LruCache;
use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// One digest in the column `pages` covers this many bytes.
pub const PAGE: u64 = 16 << 10;

/// A file in memory.
#[derive(Debug)]
pub struct InMemory {
    name: String,
    bytes: Vec<u8>,
}

impl InMemory {
    /// Creates a file of this name and these bytes.
    pub fn new(name: impl Into<String>, bytes: Vec<u8>) -> Self {
        Self { name: name.into(), bytes }
    }
}

impl Source for InMemory {
    fn length(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.bytes.get(offset..));
        let from = rest.and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(from.ok_or_else(|| Error::corrupt("a file ends too early"))?);
        Ok(())
    }

    fn path(&self) -> PathBuf {
        self.name.clone().into()
    }
}

/// The usual number of pages in the cache of a table: 32 MiB. A thousand lookups spread over a million
/// tensors pass about as many pages. The cache keeps the pages that many lookups pass, so that they are not
/// read again.
const KEPT: NonZeroUsize = NonZeroUsize::new(2048).expect("not zero");

/// The bytes of a file from which a table is read.
pub trait Source: Send + Sync + Debug {
    /// The source's length in bytes.
    fn length(&self) -> u64;

    /// Fills `buffer` from `offset`.
    ///
    /// # Errors
    /// When the bytes cannot be read.
    fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Returns true if a second read of the same bytes may return different bytes, and forgets bytes that
    /// were read ahead.
    fn again(&self) -> bool {
        false
    }

    /// The path of the source, for errors.
    fn path(&self) -> PathBuf;
}

/// The data of a table before its column `pages`.
#[derive(Debug)]
pub(super) struct Pages {
    source: Arc<dyn Source>,
    /// The offset of the data in the file.
    data: u64,
    /// The length of the data.
    length: u64,
    digests: Vec<Digest>,
    /// Pages that were read and checked.
    kept: Mutex<LruCache<u64, AlignedBuffer, FixedState>>,
}

/// A damaged page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DamagedPage {
    /// The range of the page in the file.
    pub range: Range<u64>,
    /// The digest as it was written and the digest of the page as read. None if the file is too short.
    pub digests: Option<(Digest, Digest)>,
}

impl Pages {
    pub fn new(source: Arc<dyn Source>, data: u64, length: u64, digests: Vec<Digest>) -> Self {
        let kept = Mutex::new(LruCache::unbounded_with_hasher(FixedState::default()));
        let pages = Self { source, data, length, digests, kept };
        pages.keep(KEPT);
        pages
    }

    /// Keeps at most `most` pages.
    pub fn keep(&self, most: NonZeroUsize) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).resize(most);
    }

    /// Calls `visit` with the bytes of `range`, counted from the start of the data, page by page.
    pub fn visit(&self, range: Range<u64>, mut visit: impl FnMut(&[u8])) -> Result<()> {
        if range.start > range.end || range.end > self.length {
            return Err(Error::internal(format!("rows are outside their table range={range:?}")));
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let mut at = range.start;
        while at < range.end {
            let number = at / PAGE;
            let page = self.page(&mut kept, number)?;
            let from = (at % PAGE) as usize;
            let to = (range.end - number * PAGE).min(PAGE) as usize;
            visit(page.get(from..to).unwrap_or_default());
            at = (number + 1) * PAGE;
        }
        Ok(())
    }

    fn page<'k>(&self, kept: &'k mut LruCache<u64, AlignedBuffer, FixedState>, number: u64) -> Result<&'k [u8]> {
        if !kept.contains(&number) {
            let full = kept.len() >= kept.cap().get();
            let free = if full { kept.pop_lru().map(|(_, bytes)| bytes) } else { None };
            let mut bytes = free.unwrap_or_else(|| AlignedBuffer::new(0));
            self.read(number, &mut bytes)?;
            kept.put(number, bytes);
        }
        kept.get(&number).map(|bytes| &**bytes).ok_or_else(|| Error::internal("a page was lost"))
    }

    fn read(&self, number: u64, bytes: &mut AlignedBuffer) -> Result<()> {
        let found = self.fill(number, bytes)?;
        if self.digests.get(number as usize) != Some(&found) && !mutant::on(Mutant::DigestCheck) {
            let range = self.range(number);
            return Err(Error::corrupt(format!("a page of a table is not what was written range={range:?}")));
        }
        Ok(())
    }

    /// Reads a page, even a damaged one, and returns its digest. If the page is wrong and the source may
    /// return different bytes the next time, reads it twice.
    fn fill(&self, number: u64, bytes: &mut AlignedBuffer) -> Result<Digest> {
        let range = self.range(number);
        bytes.reset((range.end - range.start) as usize);
        self.source.fill(range.start, bytes)?;
        let mut found = Digest::of(bytes);
        if self.digests.get(number as usize) != Some(&found) && self.source.again() {
            self.source.fill(range.start, bytes)?;
            found = Digest::of(bytes);
        }
        Ok(found)
    }

    /// The range of a page in the file.
    fn range(&self, number: u64) -> Range<u64> {
        let begin = (number * PAGE).min(self.length);
        self.data + begin..self.data + (begin + PAGE).min(self.length)
    }

    /// Reads every page and returns the damaged pages.
    pub fn damaged(&self) -> Result<Vec<DamagedPage>> {
        let (mut bytes, mut damaged) = (AlignedBuffer::new(0), Vec::new());
        for (number, written) in (0..).zip(&self.digests) {
            let found = match self.fill(number, &mut bytes) {
                Err(error) if error.kind() == ErrorKind::Corrupt => None,
                filled => Some(filled?),
            };
            if found != Some(*written) && !mutant::on(Mutant::DigestCheck) {
                let digests = found.map(|found| (*written, found));
                damaged.push(DamagedPage { range: self.range(number), digests });
            }
        }
        Ok(damaged)
    }
}
