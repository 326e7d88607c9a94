//! Writes the files of a conversion into one attempt, which a later run can continue.
//!
//! Beside each shard stands the table of its rows, written once the shard is durable. The table shows that
//! the shard is complete, and has the digests to check the shard. In a step of one rank these tables are
//! deleted before the publish.

use super::copy::{Arena, check, copy};
use super::layout::{File, Form, Layout};
use super::sums::Sums;
use ashore::id::step_name;
use ashore::internal::digest::Digest;
use ashore::internal::format::columns::FileRow;
use ashore::internal::format::entries::{FileEntry, MANIFEST, SliceEntry, TensorEntry};
use ashore::internal::format::manifest::{Manifest, TableEntry};
use ashore::internal::format::shard::{INDEX, Stamp, values_name};
use ashore::internal::format::split::{files_table, rows_table, tensors_table};
use ashore::internal::format::template::TableTemplate;
use ashore::memory::AlignedBuffer;
use ashore::storage::Storage;
use ashore::storage::local::{Local, Resumable};
use ashore::{Attempt, Checkpoint, Error, ErrorKind, Result};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// The interval at which the attempt shows other hosts that its owner is alive.
const TOUCH: Duration = Duration::from_secs(120);

/// Values by name.
pub type Values = BTreeMap<String, Value>;

/// A conversion under way.
pub struct Output<'o> {
    pub checkpoint: &'o Checkpoint,
    pub layout: &'o Layout,
    pub form: Form,
    pub attempt: Attempt,
    /// The values of each rank.
    pub rank_values: BTreeMap<u32, Values>,
    /// The values of all ranks.
    pub values: Values,
    /// Called with the number of bytes that are done.
    pub done: &'o (dyn Fn(u64) + Sync),
}

/// A file that is complete.
struct Complete {
    entry: FileEntry,
    /// For each box the number of its tensor.
    rows: Vec<(u32, SliceEntry)>,
    /// Length and digest of the table of its rows.
    table: TableEntry,
}

impl Complete {
    fn row(&self, origin: (u64, Attempt), beside: bool) -> FileRow {
        let rows = beside.then_some((self.table.length, self.table.digest));
        FileRow { entry: self.entry.clone(), origin, rows }
    }
}

/// The files that an earlier run completed, by file number.
#[derive(Default)]
pub struct Kept(BTreeMap<usize, Complete>);

impl Kept {
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Returns the bytes of these files on disk.
    pub fn bytes(&self) -> u64 {
        self.0.values().map(|file| file.entry.length).sum()
    }
}

impl Output<'_> {
    fn stamp(&self) -> Stamp {
        Stamp::new(self.checkpoint.step(), self.attempt)
    }

    /// True if the tables of rows stay beside the shards.
    fn split(&self) -> bool {
        self.form != Form::Hf
    }

    /// Returns the values for the table beside a file: those of its rank beside the rank's first file, else
    /// none.
    fn values_of(&self, number: usize) -> Values {
        let file = &self.layout.files[number];
        let first = number == 0 || self.layout.files[number - 1].rank != file.rank;
        if first && self.split() {
            self.rank_values.get(&file.rank).cloned().unwrap_or_default()
        } else {
            Values::new()
        }
    }

    fn complete(&self, number: usize, sums: Sums<'_>) -> Result<(Complete, Vec<u8>)> {
        let (entry, rows) = sums.finish(number);
        let by_tensor = rows.iter().map(|(tensor, slice)| (*tensor, slice));
        let (bytes, table) = rows_table(&entry.name, by_tensor, &self.values_of(number))?;
        Ok((Complete { entry, rows, table }, bytes))
    }

    /// Checks the files that an earlier run left: every byte against the digests in the table of its rows, or
    /// in the table of the step, and the header against the expected header. Deletes files that are not
    /// complete.
    pub fn check(&self, attempt: &Resumable, arena: &mut Arena) -> Result<Kept> {
        let left = attempt.list()?;
        let has = |name: &str| left.iter().any(|file| file == name);
        // An earlier run may have reached the publish, before which it deletes the tables of rows.
        let (mut kept, mut assembled) = (BTreeMap::new(), !self.split() && has(MANIFEST));
        for (number, file) in self.layout.files.iter().enumerate() {
            let name = FileRow::rows_name(&file.name);
            if !has(&file.name) || !has(&name) && !assembled {
                continue;
            }
            if let Some((complete, table)) = self.checked(attempt, number, arena)? {
                let beside = has(&name) && same(attempt, &name, &table)?;
                kept.insert(number, (complete, table, beside));
            }
        }
        assembled &= kept.len() == self.layout.files.len();
        if assembled {
            let files: Vec<&Complete> = kept.values().map(|(complete, ..)| complete).collect();
            for (table, entry) in self.tables(&files)?.tables {
                assembled &= has(&entry.name) && same(attempt, &entry.name, &table)?;
            }
        }
        kept.retain(|_, (_, _, beside)| *beside || assembled);
        let mut good = BTreeSet::new();
        for (complete, table, _) in kept.values() {
            attempt.adopt(&complete.entry.name)?;
            // Write the table even if it is gone: the next run finds no manifest, and keeps only files that
            // have a table.
            attempt.rewrite(&complete.table.name, table)?;
            good.extend([&complete.entry.name, &complete.table.name]);
        }
        left.iter().filter(|name| !good.contains(name)).try_for_each(|name| attempt.discard(name))?;
        Ok(Kept(kept.into_iter().map(|(number, (complete, ..))| (number, complete)).collect()))
    }

    /// Returns a file that an earlier run left, if its bytes are as expected, and the table of its rows.
    fn checked(&self, attempt: &Resumable, number: usize, arena: &mut Arena) -> Result<Option<(Complete, Vec<u8>)>> {
        let (file, stamp) = (&self.layout.files[number], self.stamp());
        let Some(sums) = check(attempt.open(&file.name)?.as_ref(), (file, &stamp), arena, self.done)? else {
            return Ok(None);
        };
        self.complete(number, sums).map(Some)
    }

    /// Writes the files that are not complete, then tables and manifest, and publishes.
    pub fn write(&self, storage: &Local, attempt: &Resumable, mut kept: Kept, arena: &mut Arena) -> Result<()> {
        let writing = attempt.writing();
        let mut touched = Instant::now();
        for (number, file) in self.layout.files.iter().enumerate() {
            if kept.0.contains_key(&number) {
                continue;
            }
            let sums = self.write_file(storage, attempt, file, arena, &mut touched)?;
            let (complete, table) = self.complete(number, sums)?;
            writing.put(&complete.table.name, &table)?;
            kept.0.insert(number, complete);
        }
        let files: Vec<&Complete> = kept.0.values().collect();
        let Assembled { others, tables, bytes } = self.tables(&files)?;
        others.iter().try_for_each(|(name, bytes)| writing.put(name, bytes))?;
        tables.iter().try_for_each(|(bytes, table)| writing.put(&table.name, bytes))?;
        let manifest = Manifest {
            world: if let Form::Ranks(world) = self.form { world } else { 1 },
            metadata: self.checkpoint.manifest().metadata.clone(),
            values: self.values.clone(),
            bytes,
            tables: tables.into_iter().map(|(_, table)| table).collect(),
            ..Manifest::new(self.checkpoint.step(), self.attempt)
        };
        writing.put(MANIFEST, &manifest.to_bytes()?)?;
        if !self.split() {
            files.iter().try_for_each(|file| attempt.discard(&file.table.name))?;
        }
        writing.publish(false)?;
        writing.settle()
    }

    fn write_file<'f>(
        &self,
        storage: &Local,
        attempt: &Resumable,
        file: &'f File,
        arena: &mut Arena,
        touched: &mut Instant,
    ) -> Result<Sums<'f>> {
        let to = attempt.writing().create(&file.name, file.length)?;
        let last = std::sync::Mutex::new(*touched);
        let written = |bytes| {
            (self.done)(bytes);
            let mut last = last.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if last.elapsed() > TOUCH {
                // Only hosts that cannot see the lock judge by the time of the record.
                let _ = storage.touch();
                *last = Instant::now();
            }
        };
        let sums = copy(self.checkpoint, self.layout, (file, &self.stamp()), to.as_ref(), arena, &written)?;
        to.seal()?;
        *touched = last.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
        Ok(sums)
    }

    /// Makes the tables of the step, and the files that they name beside the shards.
    fn tables(&self, files: &[&Complete]) -> Result<Assembled> {
        let describe = |tensor: &super::layout::Tensor| {
            let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
            TensorEntry { name, dtype: tensor.dtype, shape, slices: Vec::new() }
        };
        let mut tensors: Vec<TensorEntry> = self.layout.tensors.iter().map(describe).collect();
        for (number, slice) in files.iter().flat_map(|file| &file.rows) {
            tensors[*number as usize].slices.push(slice.clone());
        }
        let (origin, aliases) = ((self.checkpoint.step(), self.attempt), &self.layout.aliases);
        let mut rows: Vec<FileRow> = files.iter().map(|file| file.row(origin, self.split())).collect();
        let others = self.others()?;
        for (name, bytes) in &others {
            let (name, length, digest) = (name.clone(), bytes.len() as u64, Digest::of(bytes));
            let entry = FileEntry { name, length, data: 0, header: Digest::EMPTY, digest };
            rows.push(FileRow { entry, origin, rows: None });
        }
        let tables = if self.split() {
            vec![tensors_table(&tensors, aliases)?, files_table(&rows)?]
        } else {
            let files: Vec<FileEntry> = rows.iter().map(|row| row.entry.clone()).collect();
            let template = TableTemplate::new(&files, &tensors, aliases)?;
            let digests = files.iter().map(|file| (file.header, file.digest));
            let slices = tensors.iter().flat_map(|tensor| &tensor.slices);
            let mut table = AlignedBuffer::new(0);
            let entry = template.fill(origin, digests, slices.map(|s| (s.digest, &s.blocks[..])), &mut table)?;
            vec![(table.to_vec(), entry)]
        };
        let of_files = rows.iter().map(|row| row.entry.length + row.rows.map_or(0, |(length, _)| length));
        let bytes = of_files.chain(tables.iter().map(|(_, table)| table.length)).sum();
        Ok(Assembled { others, tables, bytes })
    }

    /// Returns the files that are neither shards nor tables: the index, and the values of ranks without a
    /// shard.
    fn others(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut others: Vec<_> = self.layout.index.iter().map(|index| (INDEX.to_owned(), index.clone())).collect();
        let has_shard = |rank: u32| self.layout.files.binary_search_by_key(&rank, |file| file.rank).is_ok();
        for (rank, values) in self.rank_values.iter().filter(|(rank, _)| self.split() && !has_shard(**rank)) {
            let bytes = serde_json::to_vec(values)
                .map_err(|e| Error::new(ErrorKind::Internal, "cannot write json").with_source(e))?;
            others.push((values_name(*rank), bytes));
        }
        Ok(others)
    }
}

/// All files of a step except its shards and the manifest.
struct Assembled {
    others: Vec<(String, Vec<u8>)>,
    tables: Vec<(Vec<u8>, TableEntry)>,
    /// The length of all files except the manifest.
    bytes: u64,
}

/// True if a file of the attempt has these bytes.
fn same(attempt: &Resumable, file: &str, expected: &[u8]) -> Result<bool> {
    let reading = attempt.open(file)?;
    if reading.len() != expected.len() as u64 {
        return Ok(false);
    }
    let mut written = vec![0; expected.len()];
    reading.read_at(0, &mut written)?;
    Ok(written == expected)
}

/// The identity of a conversion: the same for the same program, step and choices, so that a later run knows
/// the files of an earlier one.
pub fn attempt_of(checkpoint: &Checkpoint, choices: &str) -> Result<Attempt> {
    let source = checkpoint.attempt().to_string();
    // Another version of the program may use another layout.
    let text = format!("convert {} {} {source} {choices}", env!("CARGO_PKG_VERSION"), step_name(checkpoint.step()));
    let digest = Digest::of(text.as_bytes()).to_bits();
    // A UUID of version 8: half of it from the choices, the rest from the attempt that is converted.
    let upper = digest & !0xF000 | 0x8000;
    let hex: String = source.chars().filter(char::is_ascii_hexdigit).collect();
    let lower = u64::from_str_radix(hex.get(16..).unwrap_or_default(), 16).unwrap_or_default();
    let lower = (lower ^ digest.rotate_left(29)) & (u64::MAX >> 2) | 1 << 63;
    let text = format!("{upper:016x}{lower:016x}");
    let groups = [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]];
    let wrong = || Error::new(ErrorKind::Internal, "cannot make an attempt");
    Attempt::parse(&groups.join("-")).ok_or_else(wrong)
}
