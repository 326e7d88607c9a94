//! `ashore repair`: writes the flipped bits of a step back, if exactly one explanation of its damage exists.
//!
//! **Protocol.** The files of the step are copied beside it into an attempt, with the flips undone. The copy
//! is read from the medium and compared with every digest. Then one rename gives it the step's name, as when
//! a step is overwritten. **Crash.** The step is the old one or the repaired one, both whole; what is left of
//! a killed repair goes in a sweep.

use crate::damage::{self, Found};
use crate::verify::shown_path;
use crate::which::{Meant, Which, step_of};
use crate::words::{counted, grouped};
use crate::{Common, DAMAGED, out};
use ashore::internal::format::entries::MANIFEST;
use ashore::internal::storage::is_url;
use ashore::memory::AlignedBuffer;
use ashore::storage::local::{Local, Resumable};
use ashore::storage::{FileReading, Reading, Storage};
use ashore::{ALIGNMENT, Attempt, Checkpoint, Error, ErrorKind, Result};
use serde::Serialize;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The bytes that are copied at once.
const WINDOW: usize = 4 << 20;

/// Shorter files are written whole.
const SMALL: u64 = 64 << 10;

/// The flags of `repair`.
#[derive(clap::Args)]
pub struct Args {
    /// A step of --dir, the path of a checkpoint, or a directory and a step
    #[arg(value_name = "STEP|PATH", num_args = 1..=2, required = true)]
    what: Vec<String>,
    /// Repair; without this, only show what would be written
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
    /// Only show what would be written (the default)
    #[arg(long)]
    dry_run: bool,
}

#[derive(Serialize)]
struct Repair {
    dry_run: bool,
    step: u64,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    /// The step was damaged and is sound now.
    repaired: bool,
    changes: Vec<Change>,
    /// Damage that no single flipped bit or byte explains; with any of it nothing is repaired.
    uncertain: Vec<String>,
}

/// A byte to write back.
#[derive(Serialize)]
struct Change {
    file: String,
    offset: u64,
    read: u8,
    written: u8,
    /// What it is, for people.
    what: String,
}

/// Repairs a step, or shows what a repair would write.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let checkpoint = match Which::find(Which::of(&args.what)?.as_ref(), common) {
        Ok(Meant::One(checkpoint)) => *checkpoint,
        Err(error) if error.kind() == ErrorKind::Corrupt => return of_manifest(common, args, error),
        Err(error) => return Err(error),
        Ok(Meant::Directory(root)) => {
            let what = "name the step to repair: `ashore verify` says which are damaged";
            return Err(Error::new(ErrorKind::Invalid, what).with_path(root));
        }
    };
    let bar = out::progress(checkpoint.bytes());
    bar.set_message(format!("bytes of step {}", checkpoint.step()));
    let report = checkpoint.verify_with(|done, _| bar.set_position(done))?;
    bar.finish_and_clear();
    let found = damage::located(&checkpoint, report.damage);
    let (certain, uncertain): (Vec<_>, Vec<_>) = found.iter().partition(|found| found.is_certain());
    let mut repair = Repair {
        dry_run: !args.yes,
        step: checkpoint.step(),
        path: checkpoint.path().to_owned(),
        repaired: false,
        changes: certain.iter().map(|found| Change::of(&checkpoint, found)).collect::<Result<_>>()?,
        uncertain: uncertain.iter().map(|found| format!("{}: {}", found.place(), found.reason())).collect(),
    };
    if args.yes && repair.is_possible() {
        write(&repair, checkpoint.bytes(), Some(checkpoint.attempt()))?;
        repair.repaired = true;
    }
    tell(common, &repair)
}

/// Repairs the manifest, without which nothing else of the step can be checked before.
fn of_manifest(common: &Common, args: &Args, error: Error) -> Result<ExitCode> {
    let path = error.path().unwrap_or(Path::new(""));
    let (Some(flip), Some(dir)) = (damage::of_manifest(path), path.parent()) else {
        return Err(error);
    };
    let Some(step) = error.step().or_else(|| step_of(dir)) else {
        return Err(error);
    };
    let bytes = std::fs::read(path).map_err(|e| Error::io("cannot read the manifest", e).with_path(path))?;
    let read = usize::try_from(flip.offset).ok().and_then(|offset| bytes.get(offset).copied()).unwrap_or_default();
    let written = read ^ flip.mask_at(flip.offset);
    let change = Change { file: MANIFEST.to_owned(), offset: flip.offset, read, written, what: String::new() };
    let (path, changes, uncertain) = (dir.to_owned(), vec![change], Vec::new());
    let mut repair = Repair { dry_run: !args.yes, step, path, repaired: false, changes, uncertain };
    if args.yes {
        write(&repair, 0, None)?;
        repair.repaired = true;
    }
    tell(common, &repair)
}

fn tell(common: &Common, repair: &Repair) -> Result<ExitCode> {
    if common.json {
        out::json(repair)?
    } else {
        out::print(&repair.shown())?
    }
    let is_sound = repair.repaired || repair.changes.is_empty() && repair.uncertain.is_empty();
    Ok(if is_sound { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}

impl Repair {
    fn is_possible(&self) -> bool {
        !self.changes.is_empty() && self.uncertain.is_empty()
    }

    fn shown(&self) -> String {
        let head = format!("step {}: ", self.step);
        if self.changes.is_empty() && self.uncertain.is_empty() {
            return format!("{head}sound, nothing to repair\n");
        }
        let verb = if self.repaired { "repaired" } else { "would repair" };
        let mut text = String::new();
        for change in &self.changes {
            let Change { file, offset, read, written, what } = change;
            let place = format!("{} byte {}", out::printable(file), grouped(*offset));
            text += &out::wrapped(&head, &format!("{verb} {place}: {read:#04x} back to {written:#04x}{what}"));
        }
        for uncertain in &self.uncertain {
            text += &out::wrapped(&head, &format!("cannot repair {uncertain}"));
        }
        if !self.uncertain.is_empty() {
            let count = counted(self.uncertain.len(), "damaged range");
            return text
                + &out::wrapped("", &format!("nothing was written: of {count} it is not certain what was there"));
        }
        text += &out::wrapped(
            "",
            "Other damage looks like one flipped bit once in 2^38 cases, like one byte once in 2^34.",
        );
        if self.repaired {
            text + &out::wrapped(
                "",
                "The repaired copy was read from the disk and compared with every digest before it took the step's name.",
            )
        } else {
            let path = shown_path(&self.path);
            text + &out::wrapped(
                "",
                &format!(
                    "nothing was written: ashore repair {path} --yes writes a copy beside the step, verifies it, \
                     and gives it the step's name"
                ),
            )
        }
    }
}

impl Change {
    /// The byte that `found`, which is certain, says is wrong.
    fn of(checkpoint: &Checkpoint, found: &Found) -> Result<Self> {
        let none = || Error::new(ErrorKind::Internal, "certain damage has no flip");
        let flip = found.located.as_ref().and_then(|located| located.flip).ok_or_else(none)?;
        let (local, name) = home(checkpoint.path())?;
        let mut byte = [0];
        local.open(&name)?.open(&found.damage.file)?.read_at(flip.offset, &mut byte)?;
        let tensor = found.damage.tensor.as_ref();
        let what = tensor.map_or_else(String::new, |tensor| {
            let element = found.located.as_ref().and_then(|located| located.elements.first());
            let index = element.filter(|element| !element.index.is_empty());
            let index = index.map_or_else(String::new, |element| format!("{:?}", element.index));
            let changes = found.changes();
            let changes = if changes.is_empty() { changes } else { format!(", {changes}") };
            format!(" (tensor {}{index}{changes})", out::printable(tensor))
        });
        let file = found.damage.file.clone();
        Ok(Self { file, offset: flip.offset, read: byte[0], written: byte[0] ^ flip.mask_at(flip.offset), what })
    }
}

/// Returns the storage in which the step is, and its name.
fn home(path: &Path) -> Result<(Local, String)> {
    let none = || Error::new(ErrorKind::Invalid, "only a step in a directory can be repaired").with_path(path);
    if is_url(path) {
        let what = "repair writes into a directory, and this is a store: a sound copy of the step in another root \
                    replaces this one by `ashore copy ROOT STORE --step N`";
        return Err(Error::new(ErrorKind::Invalid, what).with_path(path));
    }
    let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(none)?;
    Ok((Local::at(path.parent().ok_or_else(none)?)?, name.to_owned()))
}

/// Writes a repaired copy beside the step, verifies it, and gives it the step's name. `saved` is the attempt
/// that it must be, if its manifest could be read.
fn write(repair: &Repair, bytes: u64, saved: Option<Attempt>) -> Result<()> {
    let (local, name) = home(&repair.path)?;
    // It stays open until the publish, which compares identities.
    let from = local.open(&name)?;
    let attempt = local.begin_replacement(&name, Attempt::new())?;
    let done = copy(repair, from.as_ref(), &name, &attempt, bytes, saved).and_then(|()| attempt.replace(from.as_ref()));
    match done {
        Ok(()) => attempt.writing().settle(),
        Err(error) => {
            let _ = attempt.writing().abandon();
            Err(error)
        }
    }
}

fn copy(
    repair: &Repair,
    from: &dyn Reading,
    name: &str,
    attempt: &Resumable,
    bytes: u64,
    saved: Option<Attempt>,
) -> Result<()> {
    let bar = out::progress(2 * bytes);
    bar.set_message("bytes of the repaired copy");
    let mut buffer = AlignedBuffer::new(WINDOW);
    for file in from.list()? {
        let source = from.open(&file)?;
        let of_file = repair.changes.iter().filter(|change| change.file == file);
        copy_file(source.as_ref(), &file, attempt, &mut buffer, &of_file.collect::<Vec<_>>())?;
        bar.inc(source.len());
        // Retention takes the step that was written last for the head of the run: a repair is not a new save.
        if let Some(modified) = source.modified() {
            let path = attempt.path().join(&file);
            let set = File::options().write(true).open(&path).and_then(|file| file.set_modified(modified));
            set.map_err(|e| Error::io("cannot set the time of a file", e).with_path(path))?;
        }
    }
    let repaired = Checkpoint::from_reading(attempt.as_step()?, name, &attempt.path())?;
    let report = repaired.verify_with(|done, _| bar.set_position(bytes + done))?;
    bar.finish_and_clear();
    let is_same = repaired.step() == repair.step && saved.is_none_or(|saved| repaired.attempt() == saved);
    if !is_same || !report.is_intact() {
        let what = "the repaired copy is not what was saved, or the step was replaced meanwhile; the step is as it was";
        return Err(Error::new(ErrorKind::Corrupt, what).with_step(repair.step).with_path(&repair.path));
    }
    Ok(())
}

/// Copies a file, with its changes.
fn copy_file(
    source: &dyn FileReading,
    file: &str,
    attempt: &Resumable,
    buffer: &mut AlignedBuffer,
    changes: &[&Change],
) -> Result<()> {
    let length = source.len();
    let to = if length > SMALL { Some(attempt.writing().create(file, length)?) } else { None };
    let mut at = 0;
    loop {
        let count = (length - at).min(WINDOW as u64) as usize;
        let padded = count.next_multiple_of(ALIGNMENT);
        let bytes = &mut buffer[..padded];
        bytes[count..].fill(0);
        source.read_at(at, &mut bytes[..count])?;
        for change in changes {
            let place = change.offset.checked_sub(at).and_then(|place| usize::try_from(place).ok());
            if let Some(byte) = place.and_then(|place| bytes[..count].get_mut(place)) {
                if *byte != change.read {
                    let what = "the step was changed while it was repaired";
                    return Err(Error::new(ErrorKind::Conflict, what));
                }
                *byte = change.written;
            }
        }
        match &to {
            Some(to) => to.write_at(at, bytes)?,
            None => return attempt.writing().put(file, &bytes[..count]),
        }
        at += count as u64;
        if at >= length {
            break;
        }
    }
    to.map_or(Ok(()), |to| to.seal())
}
