//! `ashore repair`: writes the flipped bits of a step back, if exactly one explanation of its damage exists.
//!
//! No file is changed in place. Steps that share a damaged file get the repaired file. A sweep deletes the
//! remains of a killed repair.

mod writing;

use crate::damage::{self, Found};
use crate::sharers;
use crate::verify::shown_path;
use crate::which::{Meant, Which, step_of};
use crate::words::{counted, grouped};
use crate::{Common, DAMAGED, out, words};
use ashore::catalog::Sharing;
use ashore::internal::format::entries::MANIFEST;
use ashore::storage::Storage;
use ashore::{Checkpoint, Error, ErrorKind, Result};
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use writing::{give, home, write};

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
    /// Damage that no single flipped bit or byte explains. If there is any, nothing is repaired.
    uncertain: Vec<String>,
    /// Other steps that share a damaged file, and get the repaired file.
    shared: Vec<Shared>,
}

/// A step that shares damaged files.
#[derive(Serialize)]
struct Shared {
    step: u64,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    /// The damaged files, by their names in this step.
    #[serde(serialize_with = "names", rename = "files")]
    pairs: Vec<Pair>,
    /// True when the step has the repaired files.
    repaired: bool,
    /// The reason why the step does not have them.
    why: Option<String>,
}

/// A file that two steps share.
struct Pair {
    /// The file's name in the step that shares it.
    file: String,
    /// The file's name in the step that is repaired.
    repaired: String,
}

fn names<S: serde::Serializer>(pairs: &[Pair], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_seq(pairs.iter().map(|pair| &pair.file))
}

/// A byte to write back.
#[derive(Serialize)]
struct Change {
    file: String,
    offset: u64,
    read: u8,
    written: u8,
    /// A description for people.
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
        shared: Vec::new(),
    };
    repair.find_sharers()?;
    if args.yes && repair.is_possible() {
        write(&repair, checkpoint.bytes(), Some(checkpoint.attempt()))?;
        repair.repaired = true;
        repair.give_to_sharers();
    }
    tell(common, &repair)
}

/// Repairs the manifest. Until the manifest is repaired, nothing else of the step can be checked.
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
    let (path, changes, uncertain, shared) = (dir.to_owned(), vec![change], Vec::new(), Vec::new());
    let mut repair = Repair { dry_run: !args.yes, step, path, repaired: false, changes, uncertain, shared };
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
    let is_given = repair.shared.iter().all(|shared| shared.repaired);
    let is_sound = repair.repaired && is_given || repair.changes.is_empty() && repair.uncertain.is_empty();
    Ok(if is_sound { ExitCode::SUCCESS } else { ExitCode::from(DAMAGED) })
}

impl Repair {
    fn is_possible(&self) -> bool {
        !self.changes.is_empty() && self.uncertain.is_empty()
    }

    /// Finds the steps that share the repaired files. If the repair left them out, they would keep the
    /// damaged files.
    fn find_sharers(&mut self) -> Result<()> {
        let mut found = BTreeMap::<(u64, PathBuf), Vec<Pair>>::new();
        let mut files: Vec<_> = self.changes.iter().map(|change| &change.file).collect();
        files.dedup();
        for repaired in files {
            for Sharing { step, path, file, .. } in sharers::of(&self.path, repaired)? {
                found.entry((step, path)).or_default().push(Pair { file, repaired: repaired.clone() });
            }
        }
        let shared = |((step, path), pairs)| Shared { step, path, pairs, repaired: false, why: None };
        self.shared = found.into_iter().map(shared).collect();
        Ok(())
    }

    /// Gives the repaired files to the steps that share them. If one step cannot have them, the others still
    /// get them.
    fn give_to_sharers(&mut self) {
        for shared in &mut self.shared {
            let given = give(&self.path, shared);
            shared.repaired = given.is_ok();
            shared.why = given.err().map(|error| words::of(&error));
        }
    }

    /// Describes the result for each step that shares the damaged files.
    fn shown_sharers(&self, head: &str) -> String {
        let mut text = String::new();
        for Shared { step, repaired, why, .. } in &self.shared {
            text += &match why {
                Some(why) => {
                    out::wrapped(head, &format!("step {step} shares the damaged file, and still has it: {why}"))
                }
                None if *repaired => {
                    out::wrapped(head, &format!("step {step} shared the damaged file, and has the repaired one"))
                }
                None => {
                    out::wrapped(head, &format!("step {step} shares the damaged file, and would get the repaired one"))
                }
            };
        }
        text
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
        if self.is_possible() {
            text += &self.shown_sharers(&head);
        }
        for uncertain in &self.uncertain {
            text += &out::wrapped(&head, &format!("cannot repair {uncertain}"));
        }
        if !self.uncertain.is_empty() {
            let count = counted(self.uncertain.len(), "damaged range");
            return text
                + &out::wrapped("", &format!("nothing was written: the original bytes of {count} are not certain"));
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
    /// Returns the wrong byte of `found`, whose flip is certain.
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
