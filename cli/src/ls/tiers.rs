//! `ashore ls A B`: which of several directories has which step.

use super::{shown, table};
use crate::{Common, out, size, words};
use ashore::{Attempt, Result};
use comfy_table::Table;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

/// A step, in every directory.
#[derive(Serialize)]
struct Row {
    step: u64,
    /// True when the directories have different attempts: the step was saved again elsewhere.
    fork: bool,
    copies: Vec<Copy>,
}

/// A step in one directory.
#[derive(Serialize)]
struct Copy {
    #[serde(serialize_with = "out::path")]
    root: PathBuf,
    /// None if the step is not there, or cannot be opened.
    attempt: Option<Attempt>,
    bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
    /// The reason in words.
    #[serde(skip)]
    said: Option<String>,
}

/// Lists the steps of all `roots`, newest last.
pub fn run(common: &Common, roots: &[PathBuf]) -> Result<ExitCode> {
    let mut steps: BTreeMap<u64, Vec<Copy>> = BTreeMap::new();
    let blank = || -> Vec<Copy> {
        let none = |root: &PathBuf| Copy { root: root.clone(), attempt: None, bytes: 0, why: None, said: None };
        roots.iter().map(none).collect()
    };
    for (number, root) in roots.iter().enumerate() {
        let (entries, problems) = common.catalog(root)?.survey()?;
        for entry in entries {
            if let Some(copy) = steps.entry(entry.step).or_insert_with(blank).get_mut(number) {
                (copy.attempt, copy.bytes) = (Some(entry.attempt), entry.bytes);
            }
        }
        for problem in problems {
            if let Some(copy) = steps.entry(problem.step).or_insert_with(blank).get_mut(number) {
                copy.why.get_or_insert(format!("{:#}", problem.error));
                copy.said.get_or_insert(words::of(&problem.error));
            }
        }
    }
    let rows: Vec<Row> = steps.into_iter().map(|(step, copies)| Row { step, fork: forked(&copies), copies }).collect();
    if common.json {
        out::json(&rows)?;
    } else {
        let mut table: Table = table([]);
        let heads = roots.iter().map(|root| out::printable(&root.display().to_string()));
        table.set_header(["step".to_owned()].into_iter().chain(heads).chain(["fork".to_owned()]));
        for Row { step, fork, copies } in &rows {
            let cells = copies.iter().map(|copy| match (&copy.why, copy.attempt) {
                (Some(_), _) => "NO".to_owned(),
                (None, Some(_)) => size::shown(copy.bytes),
                (None, None) => "-".to_owned(),
            });
            let fork = if *fork { "FORK: different attempts" } else { "" };
            table.add_row([step.to_string()].into_iter().chain(cells).chain([fork.to_owned()]));
        }
        let mut text = shown(&mut table, &[0]);
        for said in rows.iter().flat_map(|row| &row.copies).filter_map(|copy| copy.said.as_ref()) {
            text += &out::wrapped("  ", said);
        }
        out::print(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn forked(copies: &[Copy]) -> bool {
    let mut attempts = copies.iter().filter_map(|copy| copy.attempt);
    let first = attempts.next();
    attempts.any(|attempt| Some(attempt) != first)
}
