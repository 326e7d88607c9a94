//! The index of a step: the contents of its manifest and tables, whatever their version.
//!
//! A manifest of version 1 has everything, so its index is complete. The tables of version 2 are read when
//! something is looked up. Opening reads their headers and the digests of their pages; a lookup reads and
//! checks the pages that it passes. Entries that were looked up stay in memory.

use super::cells::Cells;
use super::columns::{BESIDE, FileRow, SINGLE, STEP_FILES, STRUCTURE, TENSORS_TABLE};
use super::entries::{FileEntry, TensorEntry};
use super::invariants;
use super::manifest::{Manifest, Sealed, TableEntry};
use super::page::DamagedPage;
use super::part::{Count, Part, RECORD, View, disordered};
use super::table::{Column, InMemory, Source, Table, resealed};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::id::Attempt;
use foldhash::fast::FixedState;
use smallvec::SmallVec;
use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// The number of tensors that a walk reads at once.
const WALK: u64 = 1024;

/// The number of names that a search passes. A walk over as many tensors costs no more.
const DENSE: usize = 32;

/// Maximum number of tables beside shards that are kept open.
const KEPT: usize = 256;

/// Maximum number of pages of such a table in memory: 32 MiB for all of them.
const PAGES_BESIDE: NonZeroUsize = NonZeroUsize::new(8).expect("not zero");

/// The files of a step.
pub trait Medium: Send + Sync + Debug {
    /// Opens a table.
    ///
    /// # Errors
    /// `NotFound` when there is no such file.
    fn table(&self, name: &str) -> Result<Arc<dyn Source>>;
}

/// The facts that are known of a step.
#[derive(Debug)]
pub struct Index {
    manifest: Manifest,
    tensors: Cells<TensorEntry>,
    files: Cells<FileRow>,
    /// None if everything is in the cells.
    tables: Option<Tables>,
}

/// Columns of the structure: `dims`, `spans`, `tensors`, `box_files`, `names`.
type Structure = [Column; 5];

#[derive(Debug)]
struct Tables {
    medium: Box<dyn Medium>,
    structure: Table,
    columns: Structure,
    /// A table of the files, separate from `structure`, if several ranks wrote the step.
    files: Option<Table>,
    /// `files` and `file_names`.
    file_columns: [Column; 2],
    rows: Rows,
}

#[derive(Debug)]
enum Rows {
    /// The rows are in the table of the structure: `rows` and `blocks`.
    Here([Column; 2]),
    /// The rows are in tables beside the shards, here by the number of the shard's file.
    Beside(Mutex<HashMap<usize, Arc<Beside>>>),
}

/// The table beside a shard: `rows`, `blocks`, `row_tensors`, `values`.
#[derive(Debug)]
struct Beside(Table, [Column; 4]);

impl Medium for Arc<InMemory> {
    fn table(&self, _: &str) -> Result<Arc<dyn Source>> {
        Ok(self.clone())
    }
}

impl Index {
    /// Creates the index from the bytes of a `tensors.table` that has all columns. The caller has checked the
    /// table's digest.
    ///
    /// # Errors
    /// `Corrupt` when the table contradicts itself.
    pub fn of_table(bytes: Vec<u8>) -> Result<Self> {
        let (bytes, digest) = resealed(bytes);
        let entry = TableEntry { name: TENSORS_TABLE.into(), length: bytes.len() as u64, digest };
        let manifest = Manifest { tables: vec![entry], ..Manifest::new(0, Attempt::from_u128(0)) };
        Self::new(Sealed::Two(manifest), Box::new(Arc::new(InMemory::new(TENSORS_TABLE, bytes))))
    }

    /// Creates the index of a manifest. `medium` opens the tables.
    ///
    /// # Errors
    /// `Corrupt` when a table does not match the manifest, or contradicts itself; `NotFound` when a table is
    /// missing.
    pub fn new(manifest: Sealed, medium: Box<dyn Medium>) -> Result<Self> {
        match manifest {
            Sealed::One(old) => {
                let (manifest, origin) = (Manifest::from(&old), (old.step, old.attempt));
                let files: Vec<_> = old.files.into_iter().map(|entry| FileRow { entry, origin, rows: None }).collect();
                Ok(Self { manifest, tensors: old.tensors.into(), files: files.into(), tables: None })
            }
            Sealed::Two(manifest) => {
                let tables = Tables::open(&manifest.tables, medium)?;
                let count = |column: &Column| column.rows.checked_sub(1).and_then(|rows| usize::try_from(rows).ok());
                let (Some(tensors), Some(files)) = (count(&tables.columns[2]), count(&tables.file_columns[0])) else {
                    return Err(tables.structure.wrong("a column has no last row"));
                };
                let (tensors, files) = (Cells::new(tensors), Cells::new(files));
                Ok(Self { manifest, tensors, files, tables: Some(tables) })
            }
        }
    }

    /// The manifest. In version 1 it has no tables.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The number of tensors.
    pub fn tensors(&self) -> usize {
        self.tensors.len()
    }

    /// The number of files, without the manifest and the tables.
    pub fn files(&self) -> usize {
        self.files.len()
    }

    /// A file by its number.
    ///
    /// # Errors
    /// `Corrupt` when no file has this number, or the table of the files is damaged or contradicts itself.
    pub fn file(&self, number: usize) -> Result<&FileRow> {
        let made = self.files.get(number, || match &self.tables {
            Some(tables) => tables.file(number as u64),
            None => Err(Error::internal("a file was lost")),
        })?;
        made.ok_or_else(|| Error::corrupt(format!("there is no such file number={number}")))
    }

    /// Returns every file, and checks the files together.
    ///
    /// # Errors
    /// As [`Index::file`].
    pub fn all_files(&self) -> Result<Vec<&FileRow>> {
        let files = (0..self.files()).map(|number| self.file(number)).collect::<Result<Vec<_>>>()?;
        invariants::check_files(files.iter().map(|file| &file.entry))?;
        Ok(files)
    }

    /// A tensor by its number. Tensors are numbered in the order of their names.
    ///
    /// # Errors
    /// `Corrupt` when no tensor has this number, or tables are damaged or contradict themselves about it.
    pub fn tensor(&self, number: usize) -> Result<&TensorEntry> {
        let made = self.tensors.get(number, || match &self.tables {
            Some(tables) => self.made(tables, &tables.part(self, number as u64..number as u64 + 1)?, 0),
            None => Err(Error::internal("a tensor was lost")),
        })?;
        made.ok_or_else(|| Error::corrupt(format!("there is no such tensor number={number}")))
    }

    /// Tensors by their numbers.
    ///
    /// # Errors
    /// As [`Index::tensor`].
    pub fn some(&self, range: Range<usize>) -> Result<Vec<&TensorEntry>> {
        if let Some(tables) = &self.tables {
            self.parts(tables, range.clone(), |part| {
                (0..part.len()).try_for_each(|index| {
                    let entry = self.made(tables, part, index)?;
                    self.tensors.keep(part.first as usize + index, entry);
                    Ok(())
                })
            })?;
        }
        range.map(|number| self.tensor(number)).collect()
    }

    /// The tensor `name`.
    ///
    /// # Errors
    /// As [`Index::tensor`].
    pub fn find(&self, name: &str) -> Result<Option<&TensorEntry>> {
        let number =
            bisect(0..self.tensors(), |number| self.name(number, name.len() + 1, |there| there < name.as_bytes()))?;
        if number == self.tensors() || !self.name(number, name.len() + 1, |there| there == name.as_bytes())? {
            return Ok(None);
        }
        self.tensor(number).map(Some)
    }

    /// The tensors of these names, in this order. For many names this walks once over the tensors, so that a
    /// restore of 40,000 tensors does not search 40,000 times.
    ///
    /// # Errors
    /// As [`Index::tensor`].
    pub fn find_all(&self, names: &[&str]) -> Result<Vec<Option<&TensorEntry>>> {
        let tables = self.tables.as_ref().filter(|_| names.len().saturating_mul(DENSE) >= self.tensors());
        let Some(tables) = tables else { return names.iter().map(|name| self.find(name)).collect() };
        let mut asked = HashMap::<&str, SmallVec<[usize; 1]>, FixedState>::default();
        names.iter().enumerate().for_each(|(place, name)| asked.entry(name).or_default().push(place));
        let mut found = vec![None; names.len()];
        self.parts(tables, 0..self.tensors(), |part| {
            for index in 0..part.len() {
                let name = part.view(index).map_err(|error| error.with_path(tables.structure.path()))?.name;
                if let Some(places) = asked.get(name) {
                    let number = part.first as usize + index;
                    self.tensors.keep(number, self.made(tables, part, index)?);
                    places.iter().for_each(|&place| found[place] = Some(number));
                }
            }
            Ok(())
        })?;
        found.into_iter().map(|number| number.map(|number| self.tensor(number)).transpose()).collect()
    }

    /// The numbers of the tensors whose names begin with `prefix`.
    ///
    /// # Errors
    /// As [`Index::tensor`].
    pub fn prefix(&self, prefix: &str) -> Result<Range<usize>> {
        let prefix = prefix.as_bytes();
        let begin = bisect(0..self.tensors(), |number| self.name(number, prefix.len(), |there| there < prefix))?;
        let end = bisect(begin..self.tensors(), |number| self.name(number, prefix.len(), |there| there == prefix))?;
        Ok(begin..end)
    }

    /// The values of one rank, from the table beside the file of this number.
    ///
    /// # Errors
    /// `Corrupt` when the table is damaged or its values are not JSON.
    pub fn values_beside(&self, file: usize) -> Result<BTreeMap<String, serde_json::Value>> {
        let Some(Tables { rows: Rows::Beside(open), medium, .. }) = &self.tables else { return Ok(BTreeMap::new()) };
        let beside = Tables::beside(open, medium.as_ref(), file, self.file(file)?)?;
        let Beside(table, [.., values]) = &*beside;
        super::unique::from_slice(&table.bytes(values, 0..values.rows)?)
            .map_err(|e| table.wrong("the values of a rank cannot be read").with_source(e))
    }

    /// Reads and checks everything: every page, every name, row and digest, that names rise, and that boxes
    /// cover their tensors and lie inside their files. Keeps no tensor in memory.
    ///
    /// # Errors
    /// `Corrupt`, naming the table and the tensor.
    pub fn check(&self) -> Result<()> {
        self.all_files()?;
        let Some(tables) = &self.tables else { return Ok(()) };
        let mut last = String::new();
        self.parts(tables, 0..self.tensors(), |part| {
            for index in 0..part.len() {
                let view = self.view(tables, part, index)?;
                if view.number > 0 && last.as_str() >= view.name {
                    let names = format!("tensors are not in order tensor={:?} after={last:?}", view.name);
                    return Err(tables.structure.wrong(&names));
                }
                last.clear();
                last.push_str(view.name);
                if view.holder != view.number {
                    self.made(tables, part, index)?;
                }
            }
            Ok(())
        })
    }

    /// The damaged pages of tables, each with its table's name. Empty for version 1.
    ///
    /// # Errors
    /// When a table cannot be read.
    pub fn damaged(&self) -> Result<Vec<(String, DamagedPage)>> {
        let Some(tables) = &self.tables else { return Ok(Vec::new()) };
        let mut damaged = Vec::new();
        for (table, entry) in
            [Some(&tables.structure), tables.files.as_ref()].into_iter().flatten().zip(&self.manifest.tables)
        {
            damaged.extend(table.damaged()?.into_iter().map(|page| (entry.name.clone(), page)));
        }
        if let (Rows::Beside(open), true) = (&tables.rows, damaged.is_empty()) {
            for (number, file) in self.all_files()?.into_iter().enumerate().filter(|(_, file)| file.rows.is_some()) {
                let name = FileRow::rows_name(&file.entry.name);
                let beside = Tables::beside(open, tables.medium.as_ref(), number, file)?;
                damaged.extend(beside.0.damaged()?.into_iter().map(|page| (name.clone(), page)));
            }
        }
        Ok(damaged)
    }

    /// Calls `visit` with the first `most` bytes of a tensor's name.
    fn name(&self, number: usize, most: usize, visit: impl FnOnce(&[u8]) -> bool) -> Result<bool> {
        if let Some(made) = self.tensors.made(number) {
            let name = made.name.as_bytes();
            return Ok(visit(name.get(..most).unwrap_or(name)));
        }
        let Some(Tables { structure, columns: [_, _, tensors, _, names], .. }) = &self.tables else {
            return Err(Error::internal("a tensor was lost"));
        };
        let record = structure.numbers(tensors, number as u64..number as u64 + 2)?;
        let (Some(&begin), Some(&end)) = (record.first(), record.get(RECORD)) else {
            return Err(structure.wrong("a column has no last row"));
        };
        let name = structure.bytes(names, begin..end.min(begin.saturating_add(most as u64)))?;
        Ok(visit(&name))
    }

    /// Calls `visit` with parts of the tensors `range`, in order.
    fn parts(&self, tables: &Tables, range: Range<usize>, mut visit: impl FnMut(&Part) -> Result<()>) -> Result<()> {
        let (mut at, end) = (range.start as u64, range.end as u64);
        while at < end {
            let next = end.min(at + WALK);
            visit(&tables.part(self, at..next)?)?;
            at = next;
        }
        Ok(())
    }

    /// A tensor of a part, checked against the files that the tensor names.
    fn view<'p>(&self, tables: &Tables, part: &'p Part, index: usize) -> Result<View<'p>> {
        let locate = |error: Error| error.with_path(tables.structure.path());
        let view = part.view(index).map_err(locate)?;
        for file in view.files() {
            self.file(usize::try_from(*file).unwrap_or(usize::MAX))?;
        }
        if view.holder == view.number {
            let file = |number| self.files.made(number).map(|file| &file.entry);
            view.check(file).map_err(locate)?;
        }
        Ok(view)
    }

    /// The entry of a tensor of a part. An alias gets the slices of its holder.
    fn made(&self, tables: &Tables, part: &Part, index: usize) -> Result<TensorEntry> {
        let view = self.view(tables, part, index)?;
        let mut entry = view.entry()?;
        if view.holder != view.number {
            let held = (view.holder < self.tensors() as u64).then(|| tables.part(self, view.holder..view.holder + 1));
            let held = held.transpose()?.ok_or_else(disordered)?;
            let holder = self.view(tables, &held, 0)?;
            let alike = holder.holder == holder.number && holder.layout == view.layout;
            if !alike || matches!(view.name, "" | "__metadata__") {
                let what = format!("an alias differs from its holder tensor={:?} holder={:?}", view.name, holder.name);
                return Err(tables.structure.wrong(&what));
            }
            entry.slices = holder.entry()?.slices;
        }
        Ok(entry)
    }

    /// True for a tensor whose bytes another tensor holds.
    ///
    /// # Errors
    /// As [`Index::tensor`].
    pub fn is_alias(&self, number: usize) -> Result<bool> {
        let Some(Tables { structure, columns: [_, _, tensors, ..], .. }) = &self.tables else { return Ok(false) };
        let record = structure.numbers(tensors, number as u64..number as u64 + 1)?;
        Ok(record.last().is_some_and(|holder| *holder != number as u64))
    }
}

impl Tables {
    fn open(entries: &[TableEntry], medium: Box<dyn Medium>) -> Result<Self> {
        let open = |entry: &TableEntry| medium.table(&entry.name).map(|file| (file, (entry.length, entry.digest)));
        match entries {
            [all] => {
                let (file, expected) = open(all)?;
                let (structure, columns) = Table::open(file, expected, &SINGLE)?;
                let [rows, blocks, files, dims, spans, tensors, box_files, names, file_names] = columns;
                let columns = [dims, spans, tensors, box_files, names];
                if rows.rows != box_files.rows.saturating_add(1) {
                    return Err(structure.wrong("a table has not one row for each box"));
                }
                let rows = Rows::Here([rows, blocks]);
                Ok(Self { medium, structure, columns, files: None, file_columns: [files, file_names], rows })
            }
            [structure, files] => {
                let (file, expected) = open(structure)?;
                let (structure, columns) = Table::open(file, expected, &STRUCTURE)?;
                let (file, expected) = open(files)?;
                let (files, file_columns) = Table::open(file, expected, &STEP_FILES)?;
                let rows = Rows::Beside(Mutex::default());
                Ok(Self { medium, structure, columns, files: Some(files), file_columns, rows })
            }
            _ => Err(Error::internal("a manifest was not checked")),
        }
    }

    fn file(&self, number: u64) -> Result<FileRow> {
        let table = self.files.as_ref().unwrap_or(&self.structure);
        let [files, names] = &self.file_columns;
        let row = table.numbers(files, number..number + 2)?;
        let &[begin, length, data, header, digest, rows, rows_digest, step, high, low, end, ..] = &row[..] else {
            return Err(table.wrong("a column has no last row"));
        };
        let name = table.bytes(names, begin..end)?;
        let name = String::from_utf8(name).map_err(|e| table.wrong("the name of a file is no text").with_source(e))?;
        let (header, digest) = (Digest::from_bits(header), Digest::from_bits(digest));
        let entry = FileEntry { name, length, data, header, digest };
        invariants::check_files([&entry]).map_err(|error| error.with_path(table.path()))?;
        let beside = matches!(self.rows, Rows::Beside(_)) && data > 0;
        if beside != (rows > 0) {
            return Err(
                table.wrong(&format!("a file has a table of rows, or none, against the rules file={:?}", entry.name))
            );
        }
        let origin = (step, Attempt::from_u128(u128::from(high) << 64 | u128::from(low)));
        Ok(FileRow { entry, origin, rows: beside.then_some((rows, Digest::from_bits(rows_digest))) })
    }

    /// Reads the tensors of these numbers.
    fn part(&self, index: &Index, range: Range<u64>) -> Result<Part> {
        let [dims, spans, tensors, box_files, names] = &self.columns;
        let mut part = Part { first: range.start, ..Part::default() };
        part.tensors = self.structure.numbers(tensors, range.start..range.end + 1)?;
        let all = |part: &Part, count| part.all(count).map_err(|error| error.with_path(self.structure.path()));
        part.names = self.structure.bytes(names, all(&part, Count::Names)?)?;
        part.dims = self.structure.numbers(dims, all(&part, Count::Dims)?)?;
        part.spans = self.structure.numbers(spans, all(&part, Count::Spans)?)?;
        let boxes = all(&part, Count::Boxes)?;
        part.files = self.structure.numbers(box_files, boxes.clone())?;
        match &self.rows {
            Rows::Here([rows, blocks]) => {
                part.rows = self.structure.numbers(rows, boxes.start..boxes.end + 1)?;
                let range = part.rows.get(3).zip(part.rows.last()).map_or(0..0, |(begin, end)| *begin..*end);
                part.blocks = self.structure.numbers(blocks, range)?;
            }
            Rows::Beside(open) => self.gather(open, index, &mut part)?,
        }
        Ok(part)
    }

    /// Gathers the rows of a part from the tables beside the shards.
    fn gather(&self, open: &Mutex<HashMap<usize, Arc<Beside>>>, index: &Index, part: &mut Part) -> Result<()> {
        for tensor in 0..part.len() {
            let number = part.first + tensor as u64;
            // How many boxes of the current tensor were found in each file.
            let mut found = HashMap::<usize, u64>::new();
            let boxes = part.boxes(tensor).ok_or_else(disordered)?;
            for place in boxes {
                let file = part.files.get(place as usize).map_or(usize::MAX, |file| *file as usize);
                let row = index.file(file)?;
                if row.rows.is_none() {
                    let what = format!("a box is in a file that is not a shard file={:?}", row.entry.name);
                    return Err(self.structure.wrong(&what));
                }
                let beside = Self::beside(open, self.medium.as_ref(), file, row)?;
                let Beside(table, [rows, blocks, tensors, _]) = &*beside;
                let seen = found.entry(file).or_default();
                let at = bisect(0..tensors.rows as usize, |row| {
                    let row = row as u64;
                    Ok(table.numbers(tensors, row..row + 1)?.first().is_some_and(|there| *there < number))
                })? as u64
                    + *seen;
                *seen += 1;
                if at >= tensors.rows || table.numbers(tensors, at..at + 1)?.first() != Some(&number) {
                    return Err(table.wrong(&format!("a box of a tensor has no row tensor={number}")));
                }
                let row = table.numbers(rows, at..at + 2)?;
                let &[offset, length, digest, begin, _, _, _, end] = &row[..] else { return Err(disordered()) };
                part.rows.extend([offset, length, digest, part.blocks.len() as u64]);
                part.blocks.extend(table.numbers(blocks, begin..end)?);
            }
        }
        part.rows.extend([0, 0, 0, part.blocks.len() as u64]);
        Ok(())
    }

    /// Returns the table beside a shard, and opens it if needed.
    fn beside(
        open: &Mutex<HashMap<usize, Arc<Beside>>>,
        medium: &dyn Medium,
        number: usize,
        file: &FileRow,
    ) -> Result<Arc<Beside>> {
        let mut open = open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(beside) = open.get(&number) {
            return Ok(beside.clone());
        }
        let none = || Error::corrupt(format!("a file has no table of rows file={:?}", file.entry.name));
        let expected = file.rows.ok_or_else(none)?;
        let source = medium.table(&FileRow::rows_name(&file.entry.name))?;
        let (table, columns) = Table::open(source, expected, &BESIDE)?;
        table.keep(PAGES_BESIDE);
        let [rows, _, tensors, _] = &columns;
        if rows.rows != tensors.rows.saturating_add(1) {
            return Err(table.wrong("a table has not one tensor for each row"));
        }
        let beside = Arc::new(Beside(table, columns));
        if open.len() >= KEPT {
            open.clear();
        }
        open.insert(number, beside.clone());
        Ok(beside)
    }
}

/// Returns the first number for which `before` is false. `before` must be true for all numbers in front of
/// it.
fn bisect(range: Range<usize>, mut before: impl FnMut(usize) -> Result<bool>) -> Result<usize> {
    let Range { mut start, mut end } = range;
    while start < end {
        let middle = start + (end - start) / 2;
        if before(middle)? { start = middle + 1 } else { end = middle }
    }
    Ok(start)
}
