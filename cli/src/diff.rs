//! `ashore diff`: how two checkpoints differ. Tensors with the same digests are equal, so `diff` does not
//! read them.

use crate::inspect::{matches, shape, shortened};
use crate::ls::{shown as shown_table, table};
use crate::stats::Difference;
use crate::which::{Meant, Which, newest};
use crate::words::counted;
use crate::{Common, element, out};
use ashore::{Checkpoint, Error, ErrorKind, Result};
use serde::Serialize;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;

/// How many changed tensors are shown; `--json` has all of them.
const SHOWN: usize = 40;

/// The flags of `diff`.
#[derive(clap::Args)]
#[command(override_usage = "ashore diff [OPTIONS] STEP|PATH STEP|PATH\n       ashore diff [OPTIONS] DIR STEP STEP")]
pub struct Args {
    /// Two steps of --dir or paths of checkpoints, or a directory and two steps
    #[arg(value_name = "A B", num_args = 2..=3, required = true)]
    arguments: Vec<String>,
    /// Only tensors whose names match, such as 'layers.0.*'
    #[arg(long, value_name = "PATTERN", default_value = "*")]
    tensor: String,
    /// Compare digests only, and read no tensor
    #[arg(long)]
    quick: bool,
}

#[derive(Serialize)]
struct Report {
    steps: [u64; 2],
    tensors: usize,
    same: usize,
    changed: Vec<Changed>,
    added: Vec<String>,
    removed: Vec<String>,
    values: Vec<Entry>,
    metadata: Vec<Entry>,
}

#[derive(Serialize)]
struct Changed {
    name: String,
    /// The difference, if the tensors cannot be compared element by element.
    why: Option<String>,
    difference: Option<Difference>,
}

/// A value or metadata of both checkpoints; None for a checkpoint that does not have it.
#[derive(Serialize)]
struct Entry {
    name: String,
    a: Option<Value>,
    b: Option<Value>,
}

/// Compares two checkpoints.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let [a, b] = both(common, &args.arguments)?;
    let report = compared(&a, &b, args)?;
    if common.json {
        out::json(&report)?;
    } else {
        out::print(&report.shown())?;
    }
    Ok(ExitCode::SUCCESS)
}

fn both(common: &Common, arguments: &[String]) -> Result<[Checkpoint; 2]> {
    let open = |arguments: &[String]| match Which::find(Which::of(arguments)?.as_ref(), common)? {
        Meant::One(checkpoint) => Ok(*checkpoint),
        Meant::Directory(root) => newest(common, &root),
    };
    match arguments {
        [a, b] => Ok([open(std::slice::from_ref(a))?, open(std::slice::from_ref(b))?]),
        [dir, a, b] => Ok([open(&[dir.clone(), a.clone()])?, open(&[dir.clone(), b.clone()])?]),
        _ => Err(Error::new(ErrorKind::Invalid, "give two checkpoints, or a directory and two steps")),
    }
}

fn compared(a: &Checkpoint, b: &Checkpoint, args: &Args) -> Result<Report> {
    let names = |checkpoint: &Checkpoint| -> Result<BTreeSet<String>> {
        let names = checkpoint.tensors()?.map(|tensor| tensor.name.to_owned());
        Ok(names.filter(|name| matches(&args.tensor, name)).collect())
    };
    let (mine, theirs) = (names(a)?, names(b)?);
    let digests = [digests(a)?, digests(b)?];
    let mut report = Report {
        steps: [a.step(), b.step()],
        tensors: mine.union(&theirs).count(),
        same: 0,
        changed: Vec::new(),
        added: theirs.difference(&mine).cloned().collect(),
        removed: mine.difference(&theirs).cloned().collect(),
        values: entries(&a.manifest().values, &b.manifest().values),
        metadata: entries(&a.manifest().metadata, &b.manifest().metadata),
    };
    let bar = out::progress(mine.len() as u64);
    for name in mine.intersection(&theirs) {
        bar.set_message(out::printable(name));
        let (x, y) = (a.tensor(name)?, b.tensor(name)?);
        let why = if x.dtype != y.dtype {
            Some(format!("{} is {}", x.dtype, y.dtype))
        } else if x.shape != y.shape {
            Some(format!("{} is {}", shape(x.shape), shape(y.shape)))
        } else {
            None
        };
        let known = digests[0].get(name).zip(digests[1].get(name));
        if why.is_none() && known.is_some_and(|(a, b)| a == b) {
            report.same += 1;
        } else if why.is_some() || args.quick {
            report.changed.push(Changed { name: name.clone(), why, difference: None });
        } else {
            let difference = Difference::of((a, x), (b, y))?;
            let read_alike = || -> Result<bool> { Ok(a.read(name)? == b.read(name)?) };
            // Tensors that are cut into other boxes have other digests.
            let alike = difference.map_or_else(read_alike, |difference| Ok(difference.changed == 0))?;
            if alike {
                report.same += 1;
            } else {
                report.changed.push(Changed { name: name.clone(), why: None, difference });
            }
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(report)
}

/// Returns for each tensor its boxes and their digests, as text.
fn digests(checkpoint: &Checkpoint) -> Result<BTreeMap<String, String>> {
    let contents = checkpoint.contents()?;
    let of = |tensor: &&ashore::internal::format::entries::TensorEntry| {
        let boxes = tensor.slices.iter().map(|slice| format!("{:?} {:?} {}", slice.at, slice.shape, slice.digest));
        (tensor.name.clone(), boxes.collect::<Vec<_>>().join(";"))
    };
    Ok(contents.tensors.iter().map(of).collect())
}

fn entries(a: &BTreeMap<String, Value>, b: &BTreeMap<String, Value>) -> Vec<Entry> {
    let names: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    let differ = names.into_iter().filter(|name| a.get(*name) != b.get(*name));
    differ.map(|name| Entry { name: name.clone(), a: a.get(name).cloned(), b: b.get(name).cloned() }).collect()
}

impl Report {
    fn shown(&self) -> String {
        let [a, b] = self.steps;
        let (changed, added, removed) = (self.changed.len(), self.added.len(), self.removed.len());
        let counts = format!("{changed} changed, {} same, {added} added, {removed} removed", self.same);
        let mut text =
            out::wrapped("", &format!("step {a} to step {b}: {}: {counts}", counted(self.tensors, "tensor")));
        for (title, entries) in [("value", &self.values), ("metadata", &self.metadata)] {
            for entry in entries {
                let shown = |value: &Option<Value>| {
                    value.as_ref().map_or_else(|| "none".to_owned(), |value| shortened(&value.to_string()))
                };
                let change =
                    format!("{} {}: {} -> {}", title, out::printable(&entry.name), shown(&entry.a), shown(&entry.b));
                text += &out::wrapped("", &change);
            }
        }
        for (verb, names) in [("added", &self.added), ("removed", &self.removed)] {
            for name in names.iter().take(SHOWN) {
                text += &format!("{verb} {}\n", out::printable(name));
            }
        }
        if self.changed.is_empty() {
            return text;
        }
        let mut rows = table(["tensor", "change / norm", "greatest change", "elements changed"]);
        for changed in self.changed.iter().take(SHOWN) {
            let none = || "-".to_owned();
            let (relative, greatest, count) = match &changed.difference {
                None => (none(), none(), changed.why.clone().unwrap_or_else(none)),
                Some(difference) => (
                    difference.relative.map_or_else(none, element::float),
                    element::float(difference.greatest),
                    format!("{:.1} %", 100.0 * difference.changed as f64 / difference.elements.max(1) as f64),
                ),
            };
            rows.add_row([out::printable(&changed.name), relative, greatest, count]);
        }
        text += &format!("\n{}", shown_table(&mut rows, &[1, 2, 3]));
        if self.changed.len() > SHOWN {
            text += &format!("... and {} more; --json shows all\n", self.changed.len() - SHOWN);
        }
        text
    }
}
