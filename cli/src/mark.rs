//! `ashore mark`: marks a step bad, or as one to keep.

use crate::which::Which;
use crate::{Common, out};
use ashore::Result;
use ashore::catalog::Mark;
use serde_json::json;
use std::process::ExitCode;

/// The flags of `mark`.
#[derive(clap::Args)]
#[command(override_usage = "ashore mark [OPTIONS] STEP|PATH bad|keep|none\n       \
                            ashore mark [OPTIONS] DIR STEP bad|keep|none")]
pub struct Args {
    /// A step of --dir, the path of a step, or a directory and a step; and the mark. bad: a restart passes
    /// over it and retention does not count it; keep: it is never pruned; none: no mark
    #[arg(value_name = "STEP MARK", num_args = 2..=3, required = true)]
    arguments: Vec<String>,
}

/// Sets the mark of a step.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let (mark, what) = args.arguments.split_last().map_or(("", &[][..]), |(mark, what)| (mark.as_str(), what));
    let mark = match mark {
        "bad" => Some(Mark::Bad),
        "keep" => Some(Mark::Keep),
        "none" => None,
        other => {
            let what = format!("a mark is bad, keep or none, not {other:?}");
            return Err(ashore::Error::new(ashore::ErrorKind::Invalid, what));
        }
    };
    let (catalog, step) = Which::step(Which::of(what)?.as_ref(), common)?;
    catalog.mark(step, mark)?;
    if common.json {
        out::json(&json!({"step": step, "mark": mark}))?;
    } else {
        let said = match mark {
            Some(Mark::Bad) => "marked bad: a restart passes over it, and retention does not count it",
            Some(Mark::Keep) => "marked keep: it is never pruned",
            _ => "no mark",
        };
        out::print(&format!("step {step}: {said}\n"))?;
    }
    Ok(ExitCode::SUCCESS)
}
