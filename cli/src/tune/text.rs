//! The output of `ashore tune`.

use super::advice::{By, Interval, Setting, disk};
use super::{Report, Wanted};
use crate::out::{self, wrapped_at};
use crate::size;
use crate::when::span;
use crate::words::{counted, grouped};

/// Columns of names and values, before their reasons.
const NAME: usize = 9;
const VALUE: usize = 12;

pub fn text(report: &Report, wanted: &Wanted, width: usize) -> String {
    let said = |name: &str, what: &str| wrapped_at(width, &format!("{name:<11}"), what);
    let row = |name: &str, value: &str, why: &str| wrapped_at(width, &format!("  {name:<NAME$}{value:<VALUE$}"), why);
    let Report { state, measured, .. } = report;
    let mut text = said("directory", &out::printable(&report.path.display().to_string()));
    let part = if state.saved_bytes < state.bytes {
        format!("; {} of it saved for this, and scaled up", size::shown(state.saved_bytes))
    } else {
        String::new()
    };
    let (bytes, tensors) = (size::shown(state.bytes), grouped(state.tensors));
    text += &said("state", &format!("{bytes} in {tensors} tensors, {}{part}", state.source));
    let simulated = if report.simulated { ": times below mean nothing" } else { "" };
    text += &said("device", &format!("{}{simulated}", report.device));
    let (took, written) = (span(measured.seconds), size::shown(measured.written_bytes));
    text += "\n";
    text += &wrapped_at(width, "", &format!("Measured in {took}; {written} were written and deleted."));
    let rate = |rate: f64| format!("{}/s", size::shown(rate as u64));
    let loops = "files written, synced and renamed";
    text += &row("disk", &rate(measured.loops[0].bytes_per_second), &format!("{loops}, by the default loop"));
    for one in &measured.loops[1..] {
        text += &row("", "", &disk(one));
    }
    let digest = format!("one thread that copies; one that digests: {}", rate(measured.digest_bytes_per_second));
    text += &row("memory", &rate(measured.copy_bytes_per_second), &digest);
    match &measured.bus {
        Some(bus) => {
            let (chunks, long) = (rate(bus.chunked_bytes_per_second), rate(bus.long_bytes_per_second));
            text += &row("bus", &chunks, &format!("from the GPU to pinned memory by chunks; {long} by 64 MiB at once"));
        }
        None => text += &row("bus", "-", "not measured: the state is in host memory"),
    }
    let commits = counted(measured.commits, "commit");
    let tail = span(measured.commit_seconds);
    text += &row("commit", &tail, &format!("the longest of {commits}, from the last byte until durable"));
    let (call, staged) = (brief(measured.call_seconds), brief(measured.staged_seconds));
    let durable = span(measured.durable_seconds);
    let save = format!("in the call; tensors may be written after {staged}, the step is durable after {durable}");
    text += &row("save", &call, &save);
    text += "\nSettings\n";
    for Setting { name, shown, why, .. } in &report.settings {
        text += &row(name, shown, why);
    }
    text += &format!("\n  {}\n", report.code);
    for one in report.environment.split(' ') {
        text += &format!("  {one}\n");
    }
    text + &often(&report.interval, wanted, width, &row)
}

fn often(interval: &Interval, wanted: &Wanted, width: usize, row: &impl Fn(&str, &str, &str) -> String) -> String {
    let every = span(interval.seconds);
    let steps = interval.steps.map_or_else(String::new, |steps| format!(", every {}", counted(steps as usize, "step")));
    let mut text = format!("\nHow often to save: every {every}{steps}\n");
    let (stall, percent) = (brief(interval.stall_seconds), 100.0 * wanted.cost);
    let waits = match wanted.step {
        Some(_) => format!("training waits {stall} for a save"),
        None => format!("training waits {stall} for a save if it fences at once (--step-ms says when it does)"),
    };
    text += &row("budget", &span(interval.budget_seconds), &format!("{waits}: {percent} % of the time"));
    match (interval.young_seconds, wanted.fails_every) {
        (Some(young), Some(between)) => {
            let between = span(between);
            let why =
                format!("the square root of 2 x {stall} x {between}: saves and repeated work cost least together");
            text += &row("Young", &span(young), &why);
        }
        _ => text += &row("Young", "-", "not known: --fails-every says how often the job fails"),
    }
    let daily = match (interval.daily_seconds, wanted.daily) {
        (Some(seconds), Some(daily)) if seconds >= interval.disk_seconds => {
            format!("a save each {} writes {} a day", span(seconds), size::shown(daily))
        }
        _ => "a step is durable before the next save begins".to_owned(),
    };
    text += &row("disk", &span(interval.disk_seconds), &daily);
    let by = match interval.decided {
        By::Budget => "the cost budget",
        By::Young => "Young's optimum",
        By::Disk => "the disk",
    };
    text += &wrapped_at(width, "  ", &format!("The longest decides: {by}."));
    let (share, lost) = (100.0 * interval.stall_seconds / interval.seconds, span(interval.lost_seconds));
    let then = format!("Saves then take {share:.2} % of the time, and a failure loses {lost} of work on average.");
    text + &wrapped_at(width, "  ", &then)
}

/// Shows a span that may be far below a millisecond, such as that of a call.
fn brief(seconds: f64) -> String {
    if seconds < 0.01 { format!("{:.2} ms", seconds * 1e3) } else { span(seconds) }
}
