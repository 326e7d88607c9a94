//! `ashore ls`: lists the checkpoints of a directory, or of several beside each other.

mod tiers;

use crate::steps::{Kind, Row, Steps};
use crate::words::counted;
use crate::{Common, age, out, remnants, size, when};
use ashore::catalog::Mark;
use ashore::storage::Sweep;
use ashore::{Catalog, Result};
use comfy_table::{CellAlignment, Table, presets};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// The flags of `ls`.
#[derive(clap::Args)]
pub struct Args {
    /// The directory of checkpoints (same as --dir); of several, such as the tiers of a job, it shows which
    /// has which step
    #[arg(value_name = "DIR")]
    roots: Vec<PathBuf>,
}

/// Lists checkpoints, newest last, including damaged checkpoints and directories that are not steps.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    if args.roots.len() > 1 {
        common.root_at(args.roots.first().map(PathBuf::as_path))?;
        return tiers::run(common, &args.roots);
    }
    let root = common.root_at(args.roots.first().map(PathBuf::as_path))?;
    let catalog = common.catalog(&root)?;
    let steps = Steps::of(&catalog, &root)?;
    if common.json {
        out::json(&steps.rows)?;
    } else {
        out::print(&shown_list(&steps, &root))?;
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

fn shown_list(steps: &Steps, root: &Path) -> String {
    let Steps { rows, left_out } = steps;
    let mut text = String::new();
    if rows.is_empty() {
        text += &out::wrapped("", &format!("no checkpoints in {}", out::printable(&root.display().to_string())));
    } else {
        let shares = rows.iter().any(|row| row.shared_bytes > 0);
        let (mut header, mut right) = (vec!["step", "saved", "age", "size"], vec![0, 2, 3]);
        if shares {
            header.push("shared");
            right.push(4);
        }
        right.push(header.len());
        header.extend(["took", "state"]);
        let mut table = table_of(&header);
        for row in rows {
            let none = || "-".to_owned();
            let saved = match row.state {
                Kind::InFlight => "now".to_owned(),
                _ => row.saved.map_or_else(none, when::shown),
            };
            let age = row.age_seconds.map(|age| age::shown(Duration::from_secs(age)));
            let mut cells = vec![row.step.to_string(), saved, age.unwrap_or_else(none), size::shown(row.bytes)];
            if shares {
                cells.push(if row.shared_bytes > 0 { size::shown(row.shared_bytes) } else { none() });
            }
            cells.extend([row.took_seconds.map_or_else(none, when::span), state(row)]);
            table.add_row(cells);
        }
        text += &shown(&mut table, &right);
        for row in rows {
            text += &row.said.as_ref().map_or_else(String::new, |said| out::wrapped("  ", said));
        }
        text += &out::wrapped("", &summary(rows));
    }
    if !left_out.is_empty() {
        let names: Vec<_> = left_out.iter().take(6).map(|name| out::printable(name) + "/").collect();
        let more = if left_out.len() > names.len() { ", ..." } else { "" };
        text += &out::wrapped("", &format!("left out, no steps: {}{more}", names.join(", ")));
    }
    text
}

fn state(row: &Row) -> String {
    let state = match row.state {
        Kind::Complete => "complete",
        Kind::Damaged => "DAMAGED",
        Kind::Conflict => "CONFLICT",
        Kind::Unreadable => "unreadable",
        Kind::Foreign => "foreign",
        Kind::InFlight => return row.why.clone().unwrap_or_default(),
    };
    match row.mark {
        Some(Mark::Bad) => format!("{state}, marked bad"),
        Some(Mark::Keep) => format!("{state}, kept"),
        _ => state.to_owned(),
    }
}

/// Counts the checkpoints: `3 complete, 1 damaged; 55.6 GB; newest complete: step 4900`.
fn summary(rows: &[Row]) -> String {
    let kinds = [
        (Kind::Complete, "complete"),
        (Kind::Damaged, "damaged"),
        (Kind::Conflict, "in conflict"),
        (Kind::Unreadable, "unreadable"),
        (Kind::InFlight, "in flight"),
        (Kind::Foreign, "foreign"),
    ];
    let of = |kind| rows.iter().filter(|row| row.state == kind).count();
    let counts = kinds.map(|(kind, name)| (of(kind), name));
    let counts: Vec<_> = counts.iter().filter(|(n, _)| *n > 0).map(|(n, name)| format!("{n} {name}")).collect();
    let bytes = size::shown(rows.iter().map(|row| row.bytes).sum());
    let newest = rows.iter().rfind(|row| row.complete && row.mark != Some(Mark::Bad));
    let newest =
        newest.map_or_else(|| "none is complete".to_owned(), |row| format!("newest complete: step {}", row.step));
    let marked = rows.iter().filter(|row| row.mark == Some(Mark::Bad)).count();
    let marked = if marked == 0 { String::new() } else { format!("; {} marked bad", counted(marked, "step")) };
    format!("{}; {bytes}; {newest}{marked}", counts.join(", "))
}

/// Reports the remains of interrupted saves, because they use disk space.
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
    table_of(&header)
}

/// Makes a plain table with these columns.
pub fn table_of(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_header(header.iter().copied());
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
