//! Verification: reads every byte of a step once and reports all damage.

use super::matches;
use super::piece::{Part, Piece, Window, file_at, pass, stream, visit_all, zeroed};
use super::wanted::blocks;
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::agreement::{self, Listing};
use crate::format::columns::FileRow;
use crate::format::entries::{BLOCK, MANIFEST, TensorEntry};
use crate::format::header::Header;
use crate::format::invariants::check_layout;
use crate::format::shard::INDEX;
use crate::storage::FileReading;
use crate::telemetry::meters;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Maximum length of a shard's header: the limit of safetensors plus its length prefix.
const MAX_HEADER: u64 = 100_000_008;

/// The result of a verification.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Report {
    /// The number of files read, without the manifest and tables.
    pub files: usize,
    /// The number of tensors in them.
    pub tensors: usize,
    /// The length of the files in bytes.
    pub bytes: u64,
    /// All damage, sorted by file and offset. If a table is damaged, only the damage of tables.
    pub damage: Vec<Damage>,
    /// Files that stock loaders would read differently from the manifest: an index that names other files for
    /// tensors, or weights or an index that the manifest does not name. This library still reads the step
    /// correctly.
    pub misleading: Vec<Damage>,
}

/// A range of bytes that is not what was written, or cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Damage {
    /// The file.
    pub file: String,
    /// The tensor that the bytes belong to, if any.
    pub tensor: Option<String>,
    /// The byte range in the file.
    pub range: Range<u64>,
    /// A description of the damage, for people.
    pub what: String,
    /// True when the bytes cannot be read at present, which says nothing about their contents.
    pub unreadable: bool,
    /// The digest of the range as it was written, and as it was read.
    #[serde(skip)]
    pub(super) digests: Option<(Digest, Digest)>,
}

impl Damage {
    fn at(file: impl Into<String>, range: Range<u64>, what: impl Into<String>) -> Self {
        let (file, what) = (file.into(), what.into());
        Self { file, tensor: None, range, what, unreadable: false, digests: None }
    }
}

impl Report {
    /// True when every byte is what was written, and stock loaders read the same tensors as this library.
    pub fn is_sound(&self) -> bool {
        self.is_intact() && self.misleading.is_empty()
    }

    /// True when every byte is what was written.
    pub fn is_intact(&self) -> bool {
        self.damage.is_empty()
    }
}

impl Checkpoint {
    /// Reads everything once and checks it against every digest: of tables, files, headers, tensors and
    /// blocks. If tables of the step are damaged, nothing else can be checked.
    ///
    /// # Errors
    /// Damage is not an error of this call: the [`Report`] lists it, and also files that cannot be read.
    /// `Busy` when there is not enough memory.
    pub fn verify(&self) -> Result<Report> {
        self.verify_with(|_, _| {})
    }

    /// [`Checkpoint::verify`] that calls `progress` with the bytes done and the total, from any thread.
    ///
    /// # Errors
    /// As [`Checkpoint::verify`].
    pub fn verify_with(&self, progress: impl Fn(u64, u64) + Sync) -> Result<Report> {
        let report = self.read_whole(progress)?;
        if report.damage.iter().any(|damage| !damage.unreadable) {
            meters::damage_found();
        }
        Ok(report)
    }

    fn read_whole(&self, progress: impl Fn(u64, u64) + Sync) -> Result<Report> {
        let damage = self.verify_tables()?;
        if !damage.is_empty() {
            return Ok(Report { damage, ..Report::default() });
        }
        let listing = match self.listing() {
            Ok(listing) => listing,
            Err(error) => return Ok(Report { damage: vec![self.contradiction(&error)], ..Report::default() }),
        };
        let total = listing.files.iter().map(|file| file.entry.length).sum();
        let mut findings = Findings { damage: Vec::new(), digests: Vec::new() };
        let mut done = 0;
        for index in 0..listing.files.len() {
            done += self.verify_header(&listing, index, &mut findings)?;
            progress(done, total);
        }
        let done = AtomicU64::new(done);
        let findings = Mutex::new(findings);
        let visit = |window: &mut Window, piece: Piece<Tile<'_>>| {
            let len = piece.range.end - piece.range.start;
            self.verify_piece(window, piece, &findings)?;
            progress(done.fetch_add(len, Ordering::Relaxed) + len, total);
            Ok(())
        };
        visit_all(tiles(&listing), self.manner(), visit)?;
        let mut findings = findings.into_inner().unwrap_or_else(PoisonError::into_inner);
        self.verify_files(&listing, &mut findings);
        let order = |file: &str| listing.files.iter().position(|row| row.entry.name == file);
        findings.damage.sort_by_cached_key(|d| (order(&d.file), d.range.start, d.range.end, d.tensor.clone()));
        let misleading = self.verify_for_stock_loaders(&listing, &findings.damage)?;
        let (files, tensors) = (listing.files.len(), self.opened.index.tensors());
        Ok(Report { files, tensors, bytes: total, damage: findings.damage, misleading })
    }

    /// Checks every page of the tables. Nothing else is known of a step whose tables are damaged.
    fn verify_tables(&self) -> Result<Vec<Damage>> {
        let what = "a page of a table is not what was written";
        match self.opened.index.damaged() {
            Ok(damaged) => Ok(damaged
                .into_iter()
                .map(|(file, page)| Damage { digests: page.digests, ..Damage::at(file, page.range, what) })
                .collect()),
            Err(error) => Ok(vec![self.contradiction(&error)]),
        }
    }

    /// Returns an error of a table as damage.
    fn contradiction(&self, error: &Error) -> Damage {
        let file = error.path().and_then(|path| path.file_name()).map(|name| name.to_string_lossy().into_owned());
        let (file, what) = (file.unwrap_or_else(|| MANIFEST.into()), format!("{error:#}"));
        Damage { unreadable: error.kind() != ErrorKind::Corrupt, ..Damage::at(file, 0..0, what) }
    }

    /// Returns every file, and every tensor that holds bytes, checked together.
    fn listing(&self) -> Result<Listing<'_>> {
        let index = &self.opened.index;
        let files = index.all_files()?;
        let mut tensors = Vec::with_capacity(index.tensors());
        for (number, tensor) in index.some(0..index.tensors())?.into_iter().enumerate() {
            if !index.is_alias(number)? {
                tensors.push(tensor);
            }
        }
        let entries: Vec<_> = files.iter().map(|file| &file.entry).collect();
        check_layout(&entries, &tensors)?;
        let manifest = index.manifest();
        let of_files = files.iter().map(|file| file.entry.length + file.rows.map_or(0, |(length, _)| length));
        let found: u64 = of_files.chain(manifest.tables.iter().map(|table| table.length)).sum();
        if found != manifest.bytes {
            let what = "the manifest says another length of all files than they have";
            let wrong = Error::corrupt(format!("{what} expected_bytes={} found_bytes={found}", manifest.bytes));
            return Err(wrong.with_path(self.path().join(MANIFEST)));
        }
        Ok(Listing { files, tensors })
    }

    /// Returns what stock loaders would read differently from the manifest. They use names, and the index if
    /// there is one.
    fn verify_for_stock_loaders(&self, listing: &Listing<'_>, damage: &[Damage]) -> Result<Vec<Damage>> {
        let mut misleading = Vec::new();
        let mut wrong = |file: &str, range: Range<u64>, what: String| {
            misleading.push(Damage::at(file, range, what));
        };
        let index = listing.files.iter().position(|file| file.entry.name == INDEX);
        if let Some(at) = index
            && !damage.iter().any(|damage| damage.file == INDEX)
        {
            let file = file_at(&self.opened.files, at)?;
            let mut bytes = zeroed::<u8>(file.len() as usize).map_err(|e| self.located(e))?;
            file.read_at(0, &mut bytes).map_err(|e| self.located(e))?;
            if let Err(error) = agreement::check_index(listing, &bytes) {
                wrong(INDEX, 0..file.len(), error.message().to_owned());
            }
        }
        let mut names = self.opened.reading.list().map_err(|e| self.located(e))?;
        names.sort_unstable();
        for name in names {
            let known = listing.files.iter().any(|file| file.entry.name == name);
            if !known && (name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json")) {
                wrong(&name, 0..0, "a file that the manifest does not name, and stock loaders would read".into());
            }
        }
        Ok(misleading)
    }

    /// Checks the header of a shard, and returns its length in bytes.
    fn verify_header(&self, listing: &Listing<'_>, index: usize, findings: &mut Findings) -> Result<u64> {
        let (Some(FileRow { entry, .. }), file) = (listing.files.get(index), file_at(&self.opened.files, index)?)
        else {
            return Ok(0);
        };
        if entry.data == 0 {
            return Ok(0);
        }
        let mut wrong = |what: String| findings.damage.push(self.damage(index, None, &(0..entry.data), what));
        if entry.data > MAX_HEADER {
            wrong("the header is longer than the safetensors format allows".into());
            return Ok(entry.data);
        }
        let mut bytes = zeroed::<u8>(entry.data as usize).map_err(|e| self.located(e))?;
        if let Err(error) = file.read_at(0, &mut bytes) {
            let what = format!("the header cannot be read: {error:#}");
            let unreadable = error.kind() != ErrorKind::Corrupt;
            findings.damage.push(Damage { unreadable, ..self.damage(index, None, &(0..entry.data), what) });
            return Ok(entry.data);
        }
        let mut digest = Digest::of(&bytes);
        if !matches(digest, entry.header) && self.manner().again && file.read_at(0, &mut bytes).is_ok() {
            digest = Digest::of(&bytes);
        }
        if !matches(digest, entry.header) {
            let what = format!("the header is not what was written expected={} found={digest}", entry.header);
            let digests = Some((entry.header, digest));
            findings.damage.push(Damage { digests, ..self.damage(index, None, &(0..entry.data), what) });
        } else if let Err(error) =
            Header::parse(&bytes, entry.length).and_then(|header| agreement::check_header(listing, index, &header))
        {
            let what = format!("the header contradicts the manifest: {error:#}");
            findings.damage.push(self.damage(index, None, &(0..entry.data), what));
        }
        findings.digests.push((index, 0..entry.data, digest));
        Ok(entry.data)
    }

    fn verify_piece(&self, window: &mut Window, mut piece: Piece<Tile<'_>>, findings: &Mutex<Findings>) -> Result<()> {
        let file = file_at(&self.opened.files, piece.file)?;
        let again = self.manner().again;
        let mut found: Vec<Result<Digest>> = match pass(window, file, &mut piece) {
            Ok(()) => piece.parts.iter().map(|tile| Ok(tile.found)).collect(),
            // Read tile by tile, so that a bad sector is reported only for its own tile.
            Err(_) => piece.parts.iter().map(|tile| digest(window, file, &tile.range)).collect(),
        };
        for (tile, found) in piece.parts.iter().zip(&mut found).filter(|_| again) {
            if let (Ok(first), Some((written, _))) = (&found, tile.written)
                && !matches(*first, written)
            {
                *found = digest(window, file, &tile.range);
            }
        }
        let mut findings = findings.lock().unwrap_or_else(PoisonError::into_inner);
        for (tile, found) in piece.parts.into_iter().zip(found) {
            let tensor = tile.written.map(|(_, tensor)| tensor);
            match (&found, tile.written) {
                (Err(error), _) => {
                    let damage = self.damage(tile.file, tensor, &tile.range, format!("cannot be read: {error:#}"));
                    findings.damage.push(Damage { unreadable: error.kind() != ErrorKind::Corrupt, ..damage });
                }
                (Ok(found), Some((written, _))) if !matches(*found, written) => {
                    let what = format!("not what was written expected={written} found={found}");
                    let digests = Some((written, *found));
                    findings.damage.push(Damage { digests, ..self.damage(tile.file, tensor, &tile.range, what) });
                }
                _ => {}
            }
            findings.digests.extend(found.ok().map(|found| (tile.file, tile.range, found)));
        }
        Ok(())
    }

    /// Checks the digest of each file without other damage, from the digests of its tiles.
    fn verify_files(&self, listing: &Listing<'_>, findings: &mut Findings) {
        findings.digests.sort_by_key(|(file, range, _)| (*file, range.start, range.end));
        let mut window = Window::new(self.manner().window);
        let mut digests = findings.digests.as_slice();
        for (index, FileRow { entry, .. }) in listing.files.iter().enumerate() {
            let (mine, rest) = digests.split_at(digests.partition_point(|(file, ..)| *file <= index));
            digests = rest;
            let whole = Digest::concat(mine.iter().map(|(_, range, digest)| (*digest, range.end - range.start)));
            if matches(whole, entry.digest) || findings.damage.iter().any(|damage| damage.file == entry.name) {
                continue;
            }
            // Bytes that have no digest of their own were read once.
            let range = 0..entry.length;
            let found = if self.manner().again {
                file_at(&self.opened.files, index).and_then(|file| digest(&mut window, file, &range))
            } else {
                Ok(whole)
            };
            match found {
                Ok(found) if !matches(found, entry.digest) => {
                    let what = format!("the file is not what was written expected={} found={found}", entry.digest);
                    let digests = Some((entry.digest, found));
                    findings.damage.push(Damage { digests, ..self.damage(index, None, &range, what) });
                }
                Ok(_) => {}
                Err(error) => {
                    let damage = self.damage(index, None, &range, format!("cannot be read: {error:#}"));
                    findings.damage.push(Damage { unreadable: error.kind() != ErrorKind::Corrupt, ..damage });
                }
            }
        }
    }

    fn damage(&self, file: usize, tensor: Option<&TensorEntry>, range: &Range<u64>, what: String) -> Damage {
        let file = self.opened.index.file(file).map_or_else(|_| String::new(), |file| file.entry.name.clone());
        Damage { tensor: tensor.map(|tensor| tensor.name.clone()), ..Damage::at(file, range.clone(), what) }
    }

    /// Returns the first damage of a report as an error. The kind is `Unavailable` if all damage is bytes
    /// that cannot be read at present.
    pub(crate) fn damaged(&self, report: &Report) -> Option<Error> {
        let first = report.damage.iter().find(|damage| !damage.unreadable).or(report.damage.first())?;
        let Damage { file, tensor, range, what, unreadable, .. } = first;
        let (count, tensor) = (report.damage.len(), tensor.as_deref().unwrap_or_default());
        let (kind, how) = if *unreadable {
            (ErrorKind::Unavailable, "a checkpoint cannot be read completely")
        } else {
            (ErrorKind::Corrupt, "a checkpoint is damaged")
        };
        let what = format!("{how}: {what} tensor={tensor:?} range={range:?} places={count}");
        Some(Error::new(kind, what).with_step(self.step()).with_path(self.path().join(file)))
    }
}

/// Returns all bytes of the files after their headers, split where digests begin and end.
fn tiles<'c>(listing: &Listing<'c>) -> Vec<Tile<'c>> {
    let slices = listing.tensors.iter().flat_map(|&tensor| tensor.slices.iter().map(move |slice| (tensor, slice)));
    let mut tiles: Vec<_> = slices
        .flat_map(|(tensor, slice)| {
            let tile = |(range, digest)| Tile {
                file: slice.file,
                range,
                written: Some((digest, tensor)),
                found: Digest::EMPTY,
            };
            blocks(slice).map(tile)
        })
        .collect();
    for (file, FileRow { entry, .. }) in listing.files.iter().enumerate().filter(|(_, file)| file.entry.data == 0) {
        // A file that is not a shard has only a digest of the whole file.
        let starts = (0..entry.length).step_by(BLOCK as usize);
        tiles.extend(starts.map(|start| Tile {
            file,
            range: start..entry.length.min(start + BLOCK),
            written: None,
            found: Digest::EMPTY,
        }));
    }
    tiles
}

fn digest(window: &mut Window, file: &dyn FileReading, range: &Range<u64>) -> Result<Digest> {
    let mut digest = Digest::EMPTY;
    stream(window, file, range, |_, bytes| {
        digest = digest.then(Digest::of(bytes), bytes.len() as u64);
        Ok(())
    })?;
    Ok(digest)
}

struct Findings {
    damage: Vec<Damage>,
    /// File, range and digest of each tile.
    digests: Vec<(usize, Range<u64>, Digest)>,
}

/// A range of a file that is digested as one.
struct Tile<'c> {
    file: usize,
    range: Range<u64>,
    /// The tile's expected digest and its tensor; None if only the whole file has a digest.
    written: Option<(Digest, &'c TensorEntry)>,
    /// The digest of the bytes read so far.
    found: Digest,
}

impl Part for Tile<'_> {
    fn file(&self) -> usize {
        self.file
    }

    fn range(&self) -> Range<u64> {
        self.range.clone()
    }

    fn take(&mut self, _: u64, bytes: &[u8]) -> Result<()> {
        self.found = self.found.then(Digest::of(bytes), bytes.len() as u64);
        Ok(())
    }

    fn again(&mut self) {
        self.found = Digest::EMPTY;
    }
}
