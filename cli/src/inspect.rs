//! `ashore inspect`: shows the contents of a checkpoint, without reading tensor data.

use crate::Common;
use crate::ls::{shown as shown_table, table};
use crate::which::{Meant, Which, newest};
use crate::{out, size};
use ashore::{Checkpoint, Result};
use serde_json::{Value, json};
use std::fmt::Write;
use std::process::ExitCode;

/// The flags of `inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A step of --dir, the path of a checkpoint, a directory of checkpoints (shows the newest), or a
    /// directory and a step
    #[arg(value_name = "STEP|PATH", num_args = 0..=2)]
    what: Vec<String>,
}

/// Shows files, tensors, values and metadata.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let checkpoint = match Which::find(Which::of(&args.what)?.as_ref(), common)? {
        Meant::One(checkpoint) => *checkpoint,
        Meant::Directory(root) => newest(common, &root)?,
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
    fn long_values_are_cut_for_the_screen() {
        assert_eq!(shortened("7"), "7");
        assert!(shortened(&"\u{e9}".repeat(500)).ends_with("... (500 characters)"));
    }
}
