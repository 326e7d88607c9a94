//! `ashore inspect`: shows the contents of a checkpoint, without reading tensor data.

use crate::Common;
use crate::ls::{shown as shown_table, table};
use crate::{out, size};
use ashore::id::parse_step_name;
use ashore::internal::format::entries::MANIFEST;
use ashore::{Catalog, Checkpoint, Error, ErrorKind, Result};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The flags of `inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A step of --dir, the path of a checkpoint, or a directory of checkpoints (shows the newest)
    #[arg(value_name = "STEP|PATH")]
    what: Option<Which>,
}

/// Names a checkpoint: all digits are a step of `--dir`, anything else is a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    Step(u64),
    Path(PathBuf),
}

impl std::str::FromStr for Which {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        Ok(match text.parse() {
            Ok(step) if digits => Self::Step(step),
            _ => Self::Path(text.into()),
        })
    }
}

/// What a [`Which`] resolves to.
pub enum Meant {
    One(Box<Checkpoint>),
    /// A directory of checkpoints.
    Directory(PathBuf),
}

impl Which {
    /// Opens the checkpoint, or finds the directory of them.
    pub fn find(which: Option<&Self>, common: &Common) -> Result<Meant> {
        let one = |checkpoint| Ok(Meant::One(Box::new(checkpoint)));
        match which {
            None => Ok(Meant::Directory(common.root())),
            Some(Self::Step(step)) => one(Catalog::open(common.root())?.checkpoint(*step)?),
            Some(Self::Path(path)) if is_checkpoint(path) => one(Checkpoint::open(path)?),
            Some(Self::Path(path)) => Ok(Meant::Directory(common.root_at(Some(path))?)),
        }
    }
}

/// True for a directory with a manifest or the name of a step.
fn is_checkpoint(path: &Path) -> bool {
    let named = path.file_name().and_then(|name| name.to_str()).is_some_and(|name| parse_step_name(name).is_some());
    named || path.join(MANIFEST).symlink_metadata().is_ok()
}

/// Opens the newest checkpoint of a directory, and no older one instead.
pub fn newest(root: &Path) -> Result<Checkpoint> {
    let catalog = Catalog::open(root)?;
    let (entries, problems) = catalog.survey()?;
    let whole = entries.last().map(|entry| entry.step);
    if let Some(newer) = problems.last().filter(|problem| Some(problem.step) > whole) {
        let (step, what) = (newer.step, newer.error.message());
        let older = whole.map_or_else(String::new, |step| format!("; step {step} is the newest that is complete"));
        let what = format!("the newest step, {step}, cannot be shown: {what}{older}");
        return Err(Error::new(newer.error.kind(), what).with_path(&newer.path));
    }
    let none = || Error::new(ErrorKind::NotFound, "there is no checkpoint").with_path(root);
    whole.map_or_else(|| Err(none()), |step| catalog.checkpoint(step))
}

/// Shows files, tensors, values and metadata.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let checkpoint = match Which::find(args.what.as_ref(), common)? {
        Meant::One(checkpoint) => *checkpoint,
        Meant::Directory(root) => newest(&root)?,
    };
    if common.json {
        out::json(&described(&checkpoint)?)?
    } else {
        out::print(&shown(&checkpoint)?)?
    }
    Ok(ExitCode::SUCCESS)
}

fn described(checkpoint: &Checkpoint) -> Result<Value> {
    let (manifest, contents) = (checkpoint.manifest(), checkpoint.contents()?);
    let tensors: Vec<Value> = checkpoint
        .tensors()?
        .zip(&contents.tensors)
        .map(|(info, entry)| {
            let slices: Vec<Value> = entry
                .slices
                .iter()
                .map(|slice| {
                    let file = contents.files.get(slice.file).map(|file| &file.name);
                    json!({"file": file, "offset": slice.offset, "length": slice.length, "digest": slice.digest})
                })
                .collect();
            json!({"name": info.name, "dtype": info.dtype, "shape": info.shape, "bytes": info.bytes, "slices": slices})
        })
        .collect();
    Ok(json!({
        "version": manifest.version,
        "step": checkpoint.step(),
        "attempt": checkpoint.attempt(),
        "path": checkpoint.path().display().to_string(),
        "bytes": checkpoint.bytes(),
        "world": checkpoint.world(),
        "files": contents.files,
        "tables": manifest.tables,
        "tensors": tensors,
        "values": manifest.values,
        "metadata": manifest.metadata,
    }))
}

fn shown(checkpoint: &Checkpoint) -> Result<String> {
    let (manifest, contents) = (checkpoint.manifest(), checkpoint.contents()?);
    let mut files = table(["file", "size", "digest"]);
    for file in &contents.files {
        files.add_row([out::printable(&file.name), size::shown(file.length), file.digest.to_string()]);
    }
    let files = shown_table(&mut files, &[1]);
    let mut tensors = table(["tensor", "dtype", "shape", "size", "digest"]);
    for (info, entry) in checkpoint.tensors()?.zip(&contents.tensors) {
        let digests: Vec<String> = entry.slices.iter().map(|slice| slice.digest.to_string()).collect();
        tensors.add_row([
            out::printable(info.name),
            info.dtype.to_string(),
            format!("{:?}", info.shape),
            size::shown(info.bytes),
            digests.join(" "),
        ]);
    }
    let tensors = shown_table(&mut tensors, &[3]);

    let mut text = String::new();
    let path = out::printable(&checkpoint.path().display().to_string());
    let (step, attempt, bytes) = (checkpoint.step(), checkpoint.attempt(), size::shown(checkpoint.bytes()));
    let _ =
        write!(text, "step     {step}\nattempt  {attempt}\npath     {path}\nsize     {bytes}\n\n{files}\n{tensors}");
    for (title, entries) in [("values", &manifest.values), ("metadata", &manifest.metadata)] {
        if !entries.is_empty() {
            let _ = writeln!(text, "\n{title}");
        }
        for (name, value) in entries {
            let _ = writeln!(text, "{} = {}", out::printable(name), shortened(&value.to_string()));
        }
    }
    Ok(text)
}

/// Cuts a long value for the screen; `--json` prints all of it.
fn shortened(text: &str) -> String {
    const MOST: usize = 200;
    let text = out::printable(text);
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}... ({} characters)", &text[..end], text.chars().count()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_a_step_and_all_else_a_path() {
        for (text, which) in [
            ("120", Which::Step(120)),
            ("00000120", Which::Step(120)),
            ("./120", Which::Path("./120".into())),
            ("+7", Which::Path("+7".into())),
            ("runs/step-00000120", Which::Path("runs/step-00000120".into())),
            ("99999999999999999999999", Which::Path("99999999999999999999999".into())),
        ] {
            assert_eq!(text.parse(), Ok(which), "{text}");
        }
    }

    #[test]
    fn long_values_are_cut_for_the_screen() {
        assert_eq!(shortened("7"), "7");
        assert!(shortened(&"\u{e9}".repeat(500)).ends_with("... (500 characters)"));
    }
}
