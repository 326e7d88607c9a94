//! `ashore ls`: lists the checkpoints of a directory.

use crate::{Common, out, remnants, size};
use ashore::storage::Sweep;
use ashore::{Catalog, Result};
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// The flags of `ls`.
#[derive(clap::Args)]
pub struct Args {
    /// The directory of checkpoints (same as --dir)
    #[arg(value_name = "DIR")]
    root: Option<PathBuf>,
}

/// A row. `complete` is what can be known without reading tensor data: the manifest is valid, and every file
/// exists, has its length, and belongs to this save. `verify` checks the bytes.
#[derive(Serialize)]
struct Row {
    step: u64,
    #[serde(serialize_with = "out::path")]
    path: PathBuf,
    bytes: u64,
    complete: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

/// Lists checkpoints, newest last, including damaged ones.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let root = common.root_at(args.root.as_deref())?;
    let catalog = common.catalog(&root)?;
    let (entries, problems) = catalog.survey()?;
    let complete =
        entries.into_iter().map(|e| Row { step: e.step, path: e.path, bytes: e.bytes, complete: true, why: None });
    let others = problems.into_iter().map(|p| {
        let bytes = bytes_in(&p.path);
        Row { step: p.step, path: p.path, bytes, complete: false, why: Some(format!("{:#}", p.error)) }
    });
    let mut rows: Vec<Row> = complete.chain(others).collect();
    rows.sort_by(|a, b| (a.step, &a.path).cmp(&(b.step, &b.path)));

    if common.json {
        out::json(&rows)?;
    } else if rows.is_empty() {
        out::print(&format!("no checkpoints in {}\n", root.display()))?;
    } else {
        let mut table = table(["step", "size", "complete", "path"]);
        for row in &rows {
            let complete = match &row.why {
                None => "yes".to_owned(),
                Some(why) => format!("NO: {}", out::printable(why)),
            };
            let path = out::printable(&row.path.display().to_string());
            table.add_row([row.step.to_string(), size::shown(row.bytes), complete, path]);
        }
        out::print(&shown(&mut table, &[0, 1]))?;
    }
    complain_of_remnants(&catalog)?;
    if let Some((last, newest)) = catalog.branched()? {
        let (last, newest) = (last.step, newest.step);
        out::complain(&format!(
            "step {last} was written after step {newest}: the run went back, but a restart still finds step {newest}; \
             to continue from STEP, delete the later steps with `prune --after STEP`"
        ));
    }
    Ok(ExitCode::SUCCESS)
}

/// Reports what interrupted saves left behind, which uses disk space.
fn complain_of_remnants(catalog: &Catalog) -> Result<()> {
    let swept = catalog.sweep(Sweep::default().dry_run())?;
    for dead in remnants::not_alive(swept.removed) {
        out::complain(&format!("the next sweep deletes {}", dead.shown()));
    }
    let left = remnants::not_alive(swept.left);
    left.iter().for_each(|left| out::complain(&format!("unfinished {}", left.shown())));
    if !left.is_empty() {
        out::complain(remnants::ADVICE);
    }
    Ok(())
}

/// Makes a plain table: no frame, no colours, no wrapping.
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header);
    table
}

/// Formats a table whose columns `right` contain numbers.
pub fn shown(table: &mut Table, right: &[usize]) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    for &column in right {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table.lines().map(|line| line.trim_end().to_owned() + "\n").collect()
}

fn bytes_in(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).filter(|meta| meta.is_file()).map(|meta| meta.len()).sum()
}
