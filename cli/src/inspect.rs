//! `ashore inspect`: shows the contents of a checkpoint, and on request the statistics of its tensors.

use crate::ls::{shown as shown_table, table, table_of};
use crate::stats::Stats;
use crate::which::{Meant, Which, newest};
use crate::words::counted;
use crate::{Common, element, out, size, when};
use ashore::{Checkpoint, Result, TensorInfo};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;

/// The flags of `inspect`.
#[derive(clap::Args)]
pub struct Args {
    /// A step of --dir, the path of a checkpoint, a directory of checkpoints (shows the newest), or a
    /// directory and a step
    #[arg(value_name = "STEP|PATH", num_args = 0..=2)]
    what: Vec<String>,
    /// Only tensors whose names match, such as 'layers.0.*'
    #[arg(long, value_name = "PATTERN", default_value = "*")]
    tensor: String,
    /// Read these tensors: norm, least and greatest element, and how many are NaN
    #[arg(long)]
    stats: bool,
}

/// Shows files, tensors, values and metadata.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let checkpoint = match Which::find(Which::of(&args.what)?.as_ref(), common)? {
        Meant::One(checkpoint) => *checkpoint,
        Meant::Directory(root) => newest(common, &root)?,
    };
    let mut stats = BTreeMap::new();
    if args.stats {
        let bar = out::progress(checkpoint.bytes());
        for tensor in checkpoint.tensors()?.filter(|tensor| matches(&args.tensor, tensor.name)) {
            bar.set_message(out::printable(tensor.name));
            if let Some(found) = Stats::of(&checkpoint, tensor)? {
                stats.insert(tensor.name.to_owned(), found);
            }
            bar.inc(tensor.bytes);
        }
        bar.finish_and_clear();
    }
    if common.json {
        out::json(&described(&checkpoint, args, &stats)?)?
    } else {
        out::print(&shown(&checkpoint, args, &stats)?)?
    }
    Ok(ExitCode::SUCCESS)
}

fn described(checkpoint: &Checkpoint, args: &Args, stats: &BTreeMap<String, Stats>) -> Result<Value> {
    let (manifest, contents) = (checkpoint.manifest(), checkpoint.contents()?);
    let listed = checkpoint.tensors()?.zip(&contents.tensors).filter(|(info, _)| matches(&args.tensor, info.name));
    let tensors: Vec<Value> = listed
        .map(|(info, entry)| {
            let slices: Vec<Value> = entry
                .slices
                .iter()
                .map(|slice| {
                    let file = contents.files.get(slice.file).map(|file| &file.name);
                    json!({"file": file, "offset": slice.offset, "length": slice.length, "digest": slice.digest})
                })
                .collect();
            let (name, bytes) = (info.name, info.bytes);
            let mut tensor =
                json!({"name": name, "dtype": info.dtype, "shape": info.shape, "bytes": bytes, "slices": slices});
            if args.stats {
                tensor["stats"] = json!(stats.get(name));
            }
            tensor
        })
        .collect();
    Ok(json!({
        "version": manifest.version,
        "step": checkpoint.step(),
        "attempt": checkpoint.attempt(),
        "path": checkpoint.path().display().to_string(),
        "bytes": checkpoint.bytes(),
        "elements": elements(checkpoint)?,
        "world": checkpoint.world(),
        "files": contents.files,
        "tables": manifest.tables,
        "tensors": tensors,
        "values": manifest.values,
        "metadata": manifest.metadata,
    }))
}

/// Counts the elements of all tensors except aliases, whose bytes another tensor holds.
fn elements(checkpoint: &Checkpoint) -> Result<u64> {
    let mut sum = 0;
    for (number, tensor) in checkpoint.tensors()?.enumerate() {
        if !checkpoint.is_alias(number)? {
            sum += tensor.shape.iter().map(|&extent| extent as u64).product::<u64>();
        }
    }
    Ok(sum)
}

fn shown(checkpoint: &Checkpoint, args: &Args, stats: &BTreeMap<String, Stats>) -> Result<String> {
    let (manifest, contents) = (checkpoint.manifest(), checkpoint.contents()?);
    let mut text = header(checkpoint, contents.files.len())?;

    let mut files = table(["file", "size"]);
    for file in &contents.files {
        files.add_row([out::printable(&file.name), size::shown(file.length)]);
    }
    let _ = write!(text, "\n{}", shown_table(&mut files, &[1]));

    let chosen: Vec<TensorInfo<'_>> = checkpoint.tensors()?.filter(|info| matches(&args.tensor, info.name)).collect();
    let mut head = vec!["tensor", "dtype", "shape", "size"];
    let mut right = vec![3];
    if args.stats {
        head.extend(["norm", "min..max", "NaN"]);
        right.extend([4, 6]);
    }
    let mut tensors = table_of(&head);
    for info in &chosen {
        let mut row =
            vec![out::printable(info.name), info.dtype.to_string(), shape(info.shape), size::shown(info.bytes)];
        if args.stats {
            row.extend(statistics(stats.get(info.name)));
        }
        tensors.add_row(row);
    }
    if chosen.is_empty() {
        let _ = write!(text, "\nno tensor matches {}\n", out::printable(&args.tensor));
    } else {
        let _ = write!(text, "\n{}", shown_table(&mut tensors, &right));
    }
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

fn header(checkpoint: &Checkpoint, files: usize) -> Result<String> {
    let mut of_dtype = BTreeMap::<String, u64>::new();
    for (number, tensor) in checkpoint.tensors()?.enumerate() {
        if !checkpoint.is_alias(number)? {
            *of_dtype.entry(tensor.dtype.to_string()).or_default() += tensor.bytes;
        }
    }
    let mut dtypes: Vec<_> = of_dtype.into_iter().collect();
    dtypes.sort_by_key(|(_, bytes)| std::cmp::Reverse(*bytes));
    let dtypes: Vec<_> = dtypes.iter().map(|(dtype, bytes)| format!("{dtype} {}", size::shown(*bytes))).collect();
    let (step, elements) = (checkpoint.step(), many(elements(checkpoint)?));
    let (bytes, files) = (size::shown(checkpoint.bytes()), counted(files, "file"));
    let mut text = out::wrapped("", &format!("step {step}: {elements}, {bytes} in {files}: {}", dtypes.join(", ")));
    let ranks = match checkpoint.world() {
        1 => "written by one process".to_owned(),
        ranks => format!("written by {ranks} ranks"),
    };
    let saved = checkpoint.modified().map_or_else(String::new, |time| format!(", {}", when::shown(time)));
    text += &format!("{ranks}{saved}\nattempt {}\n", checkpoint.attempt());
    text += &format!("{}\n", out::printable(&checkpoint.path().display().to_string()));
    Ok(text)
}

fn statistics(stats: Option<&Stats>) -> [String; 3] {
    let Some(stats) = stats else { return ["-".to_owned(), "-".to_owned(), "-".to_owned()] };
    let range = stats.min.zip(stats.max).map(|(min, max)| format!("{}..{}", element::float(min), element::float(max)));
    let infinite = if stats.infinite > 0 { format!(" +{} inf", stats.infinite) } else { String::new() };
    [element::float(stats.norm), range.unwrap_or_else(|| "-".to_owned()), format!("{}{infinite}", stats.nan)]
}

/// Shows a shape: `2048 x 2048`; `scalar` without dimensions.
pub fn shape(shape: &[usize]) -> String {
    let extents: Vec<_> = shape.iter().map(usize::to_string).collect();
    if extents.is_empty() { "scalar".to_owned() } else { extents.join(" x ") }
}

/// Shows a number of elements: `2.47 B elements`.
fn many(count: u64) -> String {
    let units = [(1e12, "T"), (1e9, "B"), (1e6, "M")];
    let unit = units.iter().find(|(unit, _)| count as f64 >= *unit);
    unit.map_or_else(
        || format!("{count} elements"),
        |(unit, name)| format!("{:.2} {name} elements", count as f64 / unit),
    )
}

/// True when `name` matches `pattern`, in which `*` is any text and `?` any character.
pub fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<char>, Vec<char>) = (pattern.chars().collect(), name.chars().collect());
    let (mut p, mut n, mut star) = (0, 0, None);
    while n < name.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, n));
                p += 1;
            }
            Some(c) if *c == '?' || *c == name[n] => (p, n) = (p + 1, n + 1),
            _ => match star {
                // The last `*` matches one more character.
                Some((at, taken)) => {
                    star = Some((at, taken + 1));
                    (p, n) = (at + 1, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p.min(pattern.len())..].iter().all(|c| *c == '*')
}

/// Cuts a long value for the screen; `--json` prints all of it.
pub fn shortened(text: &str) -> String {
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
    fn names_match_patterns() {
        for (pattern, name, matched) in [
            ("*", "", true),
            ("layers.*.weight", "layers.10.weight", true),
            ("layers.*.weight", "layers.10.bias", false),
            ("*.w*t", "a.weight", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("", "a", false),
            ("a*b*c", "a-b-b-c", true),
            ("ab", "abc", false),
        ] {
            assert_eq!(matches(pattern, name), matched, "{pattern} {name}");
        }
        assert_eq!([shape(&[]), shape(&[7]), shape(&[2, 3])], ["scalar", "7", "2 x 3"]);
        assert_eq!([many(2_470_000_000), many(12)], ["2.47 B elements", "12 elements"]);
    }

    #[test]
    fn long_values_are_cut_for_the_screen() {
        assert_eq!(shortened("7"), "7");
        assert!(shortened(&"\u{e9}".repeat(500)).ends_with("... (500 characters)"));
    }
}
