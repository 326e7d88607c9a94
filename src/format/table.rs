//! A table: columns of numbers and text, in the bytes of a safetensors file with another extension.
//!
//! The last column, `pages`, holds the digest of every [`PAGE`] bytes of the data before it. The digest of a
//! table covers its header and that column. So a reader that knows the digest checks every byte that it uses,
//! and reads only the header, `pages`, and the pages of the rows that it looks up.

use super::page::{DamagedPage, Pages};
pub use super::page::{InMemory, PAGE, Source};
use super::shard::write_json;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::ALIGNMENT;
use crate::mutant::{self, Mutant};
use crate::state::Dtype;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Maximum length of a header with its prefix.
const MAX_HEADER: u64 = 64 << 10;

/// Maximum length of a table. At this length the digests of its pages take 32 MiB.
pub const MAX_TABLE: u64 = 64 << 30;

/// The name of the last column.
const PAGES: &str = "pages";

/// Numbers of a row. A row of few numbers needs no allocation.
pub type Numbers = SmallVec<[u64; 16]>;

/// The specification of a column: its name, the type of its numbers, and the count of numbers in a row.
#[derive(Clone, Copy, Debug)]
pub struct Spec {
    /// The column's name.
    pub name: &'static str,
    /// `U8`, `U32` or `U64`.
    pub dtype: Dtype,
    /// The count of numbers in a row; 1 for a column of one dimension.
    pub width: u64,
}

impl Spec {
    /// Creates the specification of a column.
    pub const fn new(name: &'static str, dtype: Dtype, width: u64) -> Self {
        Self { name, dtype, width }
    }

    /// The bytes of a row.
    const fn row(&self) -> u64 {
        self.width * (self.dtype.bitsize() / 8) as u64
    }
}

/// A column in a header, as safetensors describes a tensor.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Info {
    dtype: Dtype,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// The bytes of a table, some of which may still change before they are sealed.
#[derive(Clone, Debug)]
pub struct Blank {
    bytes: Vec<u8>,
    /// The offset of the data: the length of the header with its prefix.
    data: usize,
    /// The offset of each column, followed by the offset of `pages`.
    columns: Vec<usize>,
}

impl Blank {
    /// Puts columns together, in this order. Columns of wide numbers must come first, and among these the
    /// columns that change from save to save.
    ///
    /// # Errors
    /// `Internal` when a column does not consist of whole rows; `Invalid` when the table would be too long.
    pub fn new(columns: &[(Spec, Vec<u8>)]) -> Result<Self> {
        let mut header = vec![0; 8];
        let (mut end, mut offsets) = (0_u64, Vec::with_capacity(columns.len() + 1));
        let mut describe = |spec: &Spec, length: u64| {
            if !length.is_multiple_of(spec.row()) {
                return Err(Error::internal(format!("a column has a part of a row column={}", spec.name)));
            }
            let rows = length / spec.row();
            let shape = if spec.width == 1 { vec![rows] } else { vec![rows, spec.width] };
            header.push(if end == 0 && offsets.is_empty() { b'{' } else { b',' });
            write_json(&mut header, spec.name)?;
            header.push(b':');
            write_json(&mut header, &Info { dtype: spec.dtype, shape, data_offsets: (end, end + length) })?;
            offsets.push(end);
            end += length;
            Ok(())
        };
        for (spec, bytes) in columns {
            describe(spec, bytes.len() as u64)?;
        }
        let length: u64 = columns.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        describe(&Spec::new(PAGES, Dtype::U64, 1), 8 * length.div_ceil(PAGE))?;
        if length > MAX_TABLE - (MAX_TABLE >> 8) {
            return Err(Error::invalid(format!("a step has too many tensors for a table bytes={length}")));
        }
        header.push(b'}');
        header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');
        let (data, text) = (header.len(), (header.len() - 8) as u64);
        header[..8].copy_from_slice(&text.to_le_bytes());
        let mut bytes = header;
        bytes.reserve_exact(end as usize);
        columns.iter().for_each(|(_, column)| bytes.extend_from_slice(column));
        bytes.resize(data + end as usize, 0);
        let columns = offsets.into_iter().map(|offset| data + offset as usize).collect();
        let mut this = Self { bytes, data, columns };
        let mut bytes = std::mem::take(&mut this.bytes);
        this.seal(&mut bytes, usize::MAX);
        this.bytes = bytes;
        Ok(this)
    }

    /// The bytes, with the digests of their pages.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The offset of column number `index`.
    pub fn column(&self, index: usize) -> usize {
        self.columns.get(index).copied().unwrap_or(self.bytes.len())
    }

    /// Sets the digests of pages in `bytes`, and returns the digest of the table. `bytes` is a copy of
    /// [`Blank::bytes`] that differs from it only before offset `end`.
    pub fn seal(&self, bytes: &mut [u8], end: usize) -> Digest {
        let Some(&pages) = self.columns.last() else { return Digest::EMPTY };
        let (before, pages) = bytes.split_at_mut(pages);
        let (header, data) = before.split_at(self.data);
        let dirty = data.chunks(PAGE as usize).take(end.saturating_sub(self.data).div_ceil(PAGE as usize));
        for (to, page) in pages.chunks_exact_mut(8).zip(dirty) {
            to.copy_from_slice(&Digest::of(page).to_bits().to_le_bytes());
        }
        Digest::of(header).then(Digest::of(pages), pages.len() as u64)
    }

    /// The sealed bytes and the digest of the table.
    pub fn sealed(mut self) -> (Vec<u8>, Digest) {
        let mut bytes = std::mem::take(&mut self.bytes);
        let digest = self.seal(&mut bytes, 0);
        (bytes, digest)
    }
}

/// Seals the bytes of a table again, without checking them: sets the digests of pages at the place that the
/// header names, and returns the digest of the table.
pub fn resealed(mut bytes: Vec<u8>) -> (Vec<u8>, Digest) {
    let header = bytes.first_chunk().map_or(0, |text| u64::from_le_bytes(*text)).saturating_add(8);
    let header =
        usize::try_from(header).ok().filter(|header| (8..=bytes.len()).contains(header)).unwrap_or(bytes.len());
    let infos: HashMap<String, Info> =
        bytes.get(8..header).and_then(|text| serde_json::from_slice(text).ok()).unwrap_or_default();
    let pages = infos.get(PAGES).and_then(|info| usize::try_from(info.data_offsets.0).ok()?.checked_add(header));
    let columns = vec![pages.unwrap_or(bytes.len()).clamp(header, bytes.len())];
    let digest = Blank { bytes: Vec::new(), data: header, columns }.seal(&mut bytes, usize::MAX);
    (bytes, digest)
}

/// A column of an open table.
#[derive(Clone, Copy, Debug)]
pub struct Column {
    /// The offset of its bytes from the start of the data.
    begin: u64,
    /// The number of rows.
    pub rows: u64,
    /// The bytes of a row.
    row: u64,
    /// The bytes of a number.
    size: usize,
    name: &'static str,
}

/// A table, open for reading.
#[derive(Debug)]
pub struct Table {
    pages: Pages,
    path: PathBuf,
}

impl Table {
    /// Opens a table of `length` bytes and this digest, with exactly these columns, and reads its header and
    /// the digests of its pages.
    ///
    /// # Errors
    /// `Corrupt`, with the path, when the file is not such a table.
    pub fn open<const N: usize>(
        source: Arc<dyn Source>,
        (length, digest): (u64, Digest),
        specs: &[Spec; N],
    ) -> Result<(Self, [Column; N])> {
        let path = source.path();
        let mut read = Self::read(source.clone(), length, digest, specs);
        if read.as_ref().is_err_and(|error| error.kind() == ErrorKind::Corrupt) && source.again() {
            read = Self::read(source, length, digest, specs);
        }
        read.map_err(|error| error.with_path(path))
    }

    fn read<const N: usize>(
        source: Arc<dyn Source>,
        length: u64,
        digest: Digest,
        specs: &[Spec; N],
    ) -> Result<(Self, [Column; N])> {
        let refuse = |why: &str| Err(Error::corrupt(format!("{why} bytes={length}")));
        if source.length() != length {
            let found = source.length();
            return Err(Error::corrupt(format!(
                "a file has the wrong length expected_bytes={length} found_bytes={found}"
            )));
        }
        if !(8..=MAX_TABLE).contains(&length) {
            return refuse("a table cannot have this length");
        }
        let mut header = vec![0; ALIGNMENT.min(length as usize)];
        source.fill(0, &mut header)?;
        let text = header.first_chunk().map_or(0, |text| u64::from_le_bytes(*text));
        let data = text.saturating_add(8);
        if data > length.min(MAX_HEADER) {
            return refuse("the header of a table cannot have this length");
        }
        if data as usize > header.len() {
            header.resize(data as usize, 0);
            source.fill(0, &mut header)?;
        }
        header.truncate(data as usize);
        let Some(text) = header.get(8..) else { return refuse("a table has no header") };
        let infos: Result<HashMap<String, Info>, _> = serde_json::from_slice(text);
        let mut infos = infos.map_err(|e| Error::corrupt("the header of a table cannot be read").with_source(e))?;
        let mut end = 0;
        let mut next = |spec: &Spec| {
            let Info { dtype, shape, data_offsets: (begin, until) } = infos.remove(spec.name)?;
            let rows = match (&shape[..], spec.width) {
                (&[rows], 1) => rows,
                (&[rows, width], expected) if width == expected => rows,
                _ => return None,
            };
            let sound =
                dtype == spec.dtype && begin == end && rows.checked_mul(spec.row())?.checked_add(begin)? == until;
            end = until;
            let size = spec.dtype.bitsize() / 8;
            sound.then_some(Column { begin, rows, row: spec.row(), size, name: spec.name })
        };
        let mut columns = [Column { begin: 0, rows: 0, row: 1, size: 1, name: "" }; N];
        for (column, spec) in columns.iter_mut().zip(specs) {
            let wrong = || Error::corrupt(format!("a column of a table is missing or wrong column={:?}", spec.name));
            *column = next(spec).ok_or_else(wrong)?;
        }
        let last = next(&Spec::new(PAGES, Dtype::U64, 1)).filter(|last| {
            last.rows == last.begin.div_ceil(PAGE) && data.checked_add(last.begin + 8 * last.rows) == Some(length)
        });
        let (Some(last), true) = (last, infos.is_empty()) else {
            return refuse("a table has other columns than it should have");
        };
        // The count of rows was compared with the length of the file.
        let mut bytes = vec![0; 8 * last.rows as usize];
        source.fill(data + last.begin, &mut bytes)?;
        let found = Digest::of(&header).then(Digest::of(&bytes), bytes.len() as u64);
        if found != digest && !mutant::on(Mutant::DigestCheck) {
            return refuse(&format!("a table is not what was written expected={digest} found={found}"));
        }
        let digests = bytes.as_chunks().0.iter().map(|bits| Digest::from_bits(u64::from_le_bytes(*bits))).collect();
        let path = source.path();
        Ok((Self { pages: Pages::new(source, data, last.begin, digests), path }, columns))
    }

    /// Keeps at most `pages` pages in memory, of 16 KiB each, instead of 2048.
    pub fn keep(&self, pages: NonZeroUsize) {
        self.pages.keep(pages);
    }

    /// The path of the table's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An error about the contents of this table.
    pub fn wrong(&self, why: &str) -> Error {
        Error::corrupt(why).with_path(&self.path)
    }

    /// The numbers of rows of a column.
    ///
    /// # Errors
    /// `Corrupt` when the column has no such rows, or when their bytes are damaged.
    pub fn numbers(&self, column: &Column, rows: Range<u64>) -> Result<Numbers> {
        let mut numbers = Numbers::new();
        self.visit(column, rows, |bytes| {
            match column.size {
                4 => numbers.extend(bytes.as_chunks().0.iter().map(|b| u64::from(u32::from_le_bytes(*b)))),
                8 => numbers.extend(bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b))),
                _ => numbers.extend(bytes.iter().map(|b| u64::from(*b))),
            };
        })?;
        Ok(numbers)
    }

    /// The bytes of rows of a column.
    ///
    /// # Errors
    /// As [`Table::numbers`].
    pub fn bytes(&self, column: &Column, rows: Range<u64>) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        self.visit(column, rows, |bytes| all.extend_from_slice(bytes))?;
        Ok(all)
    }

    /// Calls `visit` with the bytes of rows of a column. The bytes are split where pages end, but never
    /// within a number.
    fn visit(&self, column: &Column, rows: Range<u64>, mut visit: impl FnMut(&[u8])) -> Result<()> {
        if rows.start > rows.end || rows.end > column.rows {
            return Err(self.wrong(&format!("a table has no such rows column={} rows={rows:?}", column.name)));
        }
        let range = column.begin + rows.start * column.row..column.begin + rows.end * column.row;
        let mut split = SmallVec::<[u8; 8]>::new();
        let each = |mut bytes: &[u8]| {
            // Numbers are not aligned to pages: a number may begin in one page and end in the next.
            if !split.is_empty() {
                let (rest, more) = bytes.split_at(bytes.len().min(column.size - split.len()));
                split.extend_from_slice(rest);
                bytes = more;
                if split.len() < column.size {
                    return;
                }
                visit(&split);
                split.clear();
            }
            let (whole, rest) = bytes.split_at(bytes.len() - bytes.len() % column.size);
            visit(whole);
            split.extend_from_slice(rest);
        };
        self.pages.visit(range, each).map_err(|error| error.with_path(&self.path))
    }

    /// Reads every page and returns the damaged pages.
    ///
    /// # Errors
    /// When a page cannot be read.
    pub fn damaged(&self) -> Result<Vec<DamagedPage>> {
        self.pages.damaged().map_err(|error| error.with_path(&self.path))
    }
}
