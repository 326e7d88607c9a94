//! The contribution of a rank to a save: its files, the rows that describe them, and on rank 0 the manifest.

use super::end::Part;
use super::message::Receipt;
use super::session::Group;
use crate::commit::concluded::{Concluded, Ending, concluded};
use crate::commit::single::{Summary, committed, enter, summarize};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::columns::{FILES_TABLE, FileRow, TENSORS_TABLE};
use crate::format::entries::{FileEntry, MANIFEST, SliceEntry, TensorEntry};
use crate::format::manifest::TableEntry;
use crate::format::shard::values_name;
use crate::format::split::{Head, files_table, manifest, rows_table, tensors_table};
use crate::mutant::{self, Mutant};
use crate::outcome::Phase;
use crate::plan::{Comparison, Receipts, Request, Whole, Written};
use crate::ranks::Session;
use crate::storage::shared::SharedWriting;
use crate::sync::{Mutex, lock};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

/// Maximum length of a rank's note about its files.
const MAX_NOTE: u64 = 1 << 30;

/// A save that the ranks have agreed on.
#[derive(Debug)]
pub(crate) struct Attempted {
    /// Its number in the session.
    pub save: u64,
    /// The attempt, or the reason why this rank cannot write it.
    pub attempt: Result<Arc<dyn SharedWriting>>,
    /// The digest of the plan that all ranks follow.
    pub plan: Digest,
    /// On rank 0: the structure that it writes.
    pub structure: Option<Arc<Structure>>,
}

/// The data that rank 0 writes for a structure. It is the same for all saves of the structure.
#[derive(Debug)]
pub(crate) struct Structure {
    /// The bytes of the table of the structure.
    table: Vec<u8>,
    entry: TableEntry,
    /// The names of the shards of all ranks, in the order of their numbers.
    files: Vec<String>,
    /// Used to name the tensors of replicas that differ. Dropped with the first save that compares no
    /// replicas, because its boxes need more memory than all other fields.
    whole: Mutex<Option<Whole>>,
}

impl Structure {
    /// The structure of a step.
    ///
    /// # Errors
    /// `Invalid` when there are more tensors than a table can number.
    pub fn of(whole: Whole) -> Result<Self> {
        let mut aliases = BTreeMap::new();
        let mut tensors = Vec::with_capacity(whole.tensors.len());
        for (number, tensor) in whole.tensors.iter().enumerate() {
            aliases.extend(tensor.alias_of.map(|holder| (number, holder as usize)));
            let slice = |written: &Written| SliceEntry {
                file: written.file as usize,
                at: written.place.at.clone(),
                shape: written.place.extent.clone(),
                offset: 0,
                length: 0,
                digest: Digest::EMPTY,
                blocks: Vec::new(),
            };
            let (name, dtype, shape) = (tensor.name.clone(), tensor.dtype, tensor.shape.clone());
            tensors.push(TensorEntry { name, dtype, shape, slices: tensor.boxes.iter().map(slice).collect() });
        }
        let (table, entry) = tensors_table(&tensors, &aliases)?;
        let files = whole.files.clone();
        Ok(Self { table, entry, files, whole: Mutex::new(Some(Whole { shares: Vec::new(), ..whole })) })
    }

    /// Compares replicas, in the first saves of a structure.
    fn compare(&self, comparison: &Comparison) -> Result<()> {
        let mut whole = lock(&self.whole);
        if comparison.is_empty() {
            *whole = None;
        }
        whole.as_ref().map_or(Ok(()), |whole| comparison.finish(whole))
    }

    /// The length of the table of the structure.
    #[cfg(test)]
    pub(super) fn table_len(&self) -> usize {
        self.table.len()
    }
}

/// The note of a rank for rank 0 about its part.
#[derive(Serialize, Deserialize)]
struct Note {
    files: Vec<FileNote>,
    /// The digests of boxes that other ranks hold, too, by the number of the replica.
    replicas: Vec<(u32, Digest)>,
}

/// The description of one file in the note of a rank.
#[derive(Serialize, Deserialize)]
struct FileNote {
    entry: FileEntry,
    /// Length and digest of the table of its rows. None if the file is not a shard.
    rows: Option<(u64, Digest)>,
}

/// Ends a save on this rank.
pub(crate) fn conclude(group: &Group, attempted: &Attempted, ending: Ending<'_>) -> Concluded {
    let Ending { request, receipts, path, .. } = ending;
    let ticket = &request.ticket;
    let attempt = match &attempted.attempt {
        Ok(attempt) => attempt.clone(),
        Err(error) => {
            // This rank cannot open the attempt if rank 0 has deleted it because of another rank.
            let first = group.refuse(attempted.save, error, ticket.deadline);
            let why = first.or_else(|| ticket.failure()).unwrap_or_else(|| error.clone());
            return concluded(ticket, None, Err(why));
        }
    };
    let failed = ticket.failure().or_else(|| receipts.as_ref().err().cloned());
    let mut part = Mine { group, attempt: attempt.as_ref(), attempted, request, receipts: receipts.as_ref().ok() };
    let ended = group.end(attempted.save, attempt.as_ref(), &mut part, failed, ticket.deadline);
    concluded(ticket, Some(attempt), ended.and_then(|()| Ok(committed(request, &receipts?, path))))
}

/// The data that this rank has written.
struct Mine<'a> {
    group: &'a Group,
    attempt: &'a dyn SharedWriting,
    attempted: &'a Attempted,
    request: &'a Request,
    /// None if something was not written.
    receipts: Option<&'a Receipts>,
}

impl Mine<'_> {
    /// Writes the table of rows of each shard, and returns the note for rank 0.
    fn write_rows(&self, receipts: &Receipts) -> Result<Note> {
        let (plan, values) = (&self.request.plan, &self.request.rank_values);
        let Summary { tensors, blocks, shards, on_devices } = summarize(self.request, receipts)?;
        let replicas = replicas(self.request, &tensors, &on_devices);
        let mut notes = Vec::with_capacity(plan.shards.len());
        for (number, (shard, (header, digest))) in plan.shards.iter().zip(shards).enumerate() {
            let mine = plan.tensors.iter().zip(&tensors).filter(|(planned, _)| planned.shard == number);
            let slices = mine.map(|(planned, (digest, range))| {
                let blocks = blocks.get(range.clone()).unwrap_or_default().to_vec();
                let (at, shape) = (Vec::new(), Vec::new());
                let slice = SliceEntry {
                    file: 0,
                    offset: planned.offset,
                    length: planned.bytes,
                    at,
                    shape,
                    digest: *digest,
                    blocks,
                };
                (planned.number, slice)
            });
            let slices: Vec<(u32, SliceEntry)> = slices.collect();
            let none = BTreeMap::new();
            let values = if number == 0 { values } else { &none };
            let rows = slices.iter().map(|(number, slice)| (*number, slice));
            let (bytes, TableEntry { name, length, digest: of_rows }) = rows_table(&shard.name, rows, values)?;
            self.attempt.put(&name, &bytes)?;
            let (name, data) = (shard.name.clone(), shard.header.len());
            let entry = FileEntry { name, length: shard.length, data, header, digest };
            notes.push(FileNote { entry, rows: Some((length, of_rows)) });
        }
        if plan.shards.is_empty() && !values.is_empty() {
            notes.push(self.write_values()?);
        }
        Ok(Note { files: notes, replicas })
    }

    /// Writes the values of a rank that writes no shard. Otherwise the values are in the table beside a
    /// shard.
    fn write_values(&self) -> Result<FileNote> {
        let values = serde_json::to_vec(&self.request.rank_values);
        let bytes = values.map_err(|e| Error::internal("cannot write the values of a rank").with_source(e))?;
        let (name, length) = (values_name(self.group.member.rank), bytes.len() as u64);
        self.attempt.put(&name, &bytes)?;
        let entry = FileEntry { name, length, data: 0, header: Digest::EMPTY, digest: Digest::of(&bytes) };
        Ok(FileNote { entry, rows: None })
    }

    /// Reads the note of a rank, and checks it against the digest in the rank's receipt.
    fn read(&self, rank: u32, receipt: &Receipt) -> Result<Note> {
        let note = self.group.shared.note(self.group.session.generation, &files_of(rank), MAX_NOTE)?;
        let note = note.filter(|note| Digest::of(note) == receipt.digest);
        let why = || Error::corrupt("a rank's note of its files is not what the rank wrote").with_ranks([rank]);
        serde_json::from_slice(&note.ok_or_else(why)?).map_err(|error| why().with_source(error))
    }
}

impl Part for Mine<'_> {
    fn overwrite(&self) -> bool {
        self.request.overwrite
    }

    fn seal(&mut self) -> Result<Receipt> {
        let receipts = self.receipts.ok_or_else(|| Error::internal("a save that was not written is sealed"))?;
        let note = self.write_rows(receipts)?;
        let note = serde_json::to_vec(&note).map_err(|e| Error::internal("cannot write a note").with_source(e))?;
        let rank = self.group.member.rank;
        self.group.shared.put_note(self.group.session.generation, &files_of(rank), &note)?;
        self.attempt.sync_names()?;
        let ticket = &self.request.ticket;
        Ok(Receipt {
            step: ticket.step,
            attempt: ticket.attempt(),
            plan: self.attempted.plan,
            bytes: self.request.plan.length,
            rows: note.len() as u64,
            digest: Digest::of(&note),
        })
    }

    fn assemble(&mut self, receipts: &BTreeMap<u32, Receipt>) -> Result<()> {
        let missing = || Error::internal("rank 0 has no structure to write");
        let structure = self.attempted.structure.as_ref().ok_or_else(missing)?;
        let ticket = &self.request.ticket;
        let origin = (ticket.step, ticket.attempt());
        let mut files = Vec::with_capacity(structure.files.len());
        // Files of values come last, because tensors refer to shards by number.
        let (mut others, mut comparison) = (Vec::new(), Comparison::default());
        let mut names = structure.files.iter();
        for (rank, receipt) in receipts {
            let note = self.read(*rank, receipt)?;
            comparison.add(*rank, &note.replicas);
            for FileNote { entry, rows } in note.files {
                let of_values = (rows.is_none() && entry.data == 0).then(|| values_name(*rank));
                let planned = if of_values.is_some() { of_values.as_ref() } else { names.next() };
                if planned != Some(&entry.name) && !mutant::on(Mutant::ReceiptCheck) {
                    let why = format!("a rank has written another file file={:?} expected={planned:?}", entry.name);
                    return Err(Error::internal(why).with_ranks([*rank]));
                }
                let to = if of_values.is_some() { &mut others } else { &mut files };
                to.push(FileRow { entry, origin, rows });
            }
        }
        if !mutant::on(Mutant::Replicas) {
            structure.compare(&comparison)?;
        }
        files.append(&mut others);
        if let (Some(missing), false) = (names.next(), mutant::on(Mutant::Receipts)) {
            return Err(Error::internal(format!("no rank has written a file of the plan file={missing:?}")));
        }
        let (of_files, listed) = files_table(&files)?;
        let Session { id, generation } = self.group.session;
        let (world, request) = (self.group.member.world, self.request);
        let head = Head { step: origin.0, attempt: origin.1, session: id, generation, world };
        let tables = [structure.entry.clone(), listed];
        let manifest = manifest(&head, &files, tables, &request.metadata, &request.values)?;
        self.attempt.put(TENSORS_TABLE, &structure.table)?;
        self.attempt.put(FILES_TABLE, &of_files)?;
        self.attempt.put(MANIFEST, &manifest)
    }

    fn promise(&self) -> Result<()> {
        enter(&self.request.ticket, Phase::Promised)
    }

    fn begin_publish(&self) -> Result<()> {
        enter(&self.request.ticket, Phase::Publishing)
    }
}

/// The digests that this rank took of boxes that other ranks hold, too. Empty in a save that does not compare
/// them.
fn replicas(
    request: &Request,
    tensors: &[(Digest, Range<usize>)],
    on_devices: &[(usize, Digest)],
) -> Vec<(u32, Digest)> {
    let (plan, Some(elsewhere)) = (&request.plan, &request.replicas) else { return Vec::new() };
    let on_devices: HashMap<usize, Digest> = on_devices.iter().copied().collect();
    let digest = |index: usize| match plan.places.get(index).copied().flatten() {
        Some(place) => tensors.get(place).map(|(digest, _)| *digest),
        None => on_devices.get(&index).copied(),
    };
    let mine = plan.replicas.iter().filter_map(|&(index, replica)| Some((replica, digest(index)?)));
    mine.chain(elsewhere.iter().copied()).collect()
}

fn files_of(rank: u32) -> String {
    format!("files-{rank:05}")
}
