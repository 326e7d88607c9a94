//! `ashore watch`: reports events in a directory of checkpoints as they happen.
//!
//! `watch` lists the directory again and again, and needs no help from the program that saves. A save that
//! begins and ends between two looks is only seen as a step that appeared.

use crate::steps::{Kind, Row, Steps};
use crate::{Common, age, out, size, when};
use ashore::Result;
use indicatif::ProgressStyle;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

/// The flags of `watch`.
#[derive(clap::Args)]
pub struct Args {
    /// The directory of checkpoints (same as --dir)
    #[arg(value_name = "DIR")]
    root: Option<PathBuf>,
    /// How often to look
    #[arg(long, value_name = "AGE", value_parser = age::parse, default_value = "1s")]
    every: Duration,
    /// End after this time; without it, watch until interrupted
    #[arg(long = "for", value_name = "AGE", value_parser = age::parse)]
    span: Option<Duration>,
}

/// An event; with `--json` one event on each line.
#[derive(Debug, PartialEq, Serialize)]
struct Event {
    event: Happened,
    step: u64,
    bytes: u64,
    /// Seconds from the first file to the manifest.
    took_seconds: Option<f64>,
    /// Why a step is damaged, or which process writes it.
    why: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Happened {
    /// The step was there when the watch began.
    Found,
    Begun,
    Complete,
    /// An attempt is gone, and did not become a step.
    Failed,
    Damaged,
    Deleted,
}

/// The state of the directory at the last look.
#[derive(Default)]
struct Seen {
    steps: BTreeMap<u64, (Kind, u64)>,
    attempts: BTreeMap<PathBuf, (u64, u64)>,
    failures: u64,
    last_failure: Option<(u64, SystemTime)>,
}

/// Watches until the time is over.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let root = common.root_at(args.root.as_deref())?;
    let catalog = common.catalog(&root)?;
    let bar = out::progress(0);
    bar.set_style(ProgressStyle::with_template("{msg}").unwrap_or_else(|_| ProgressStyle::default_bar()));
    let (began, mut seen, mut looked) = (Instant::now(), Seen::default(), None::<Instant>);
    loop {
        let rows = Steps::of(&catalog, &root)?.rows;
        let before = seen.attempts.clone();
        for event in seen.look(&rows, looked.is_none()) {
            bar.suspend(|| tell(common, &event))?;
        }
        bar.set_message(status(&rows, &seen, &before, looked.map(|at| at.elapsed())));
        looked = Some(Instant::now());
        let left = args.span.map_or(args.every, |span| span.saturating_sub(began.elapsed()).min(args.every));
        if left.is_zero() && args.span.is_some() {
            break;
        }
        std::thread::sleep(left.max(Duration::from_millis(10)));
    }
    bar.finish_and_clear();
    Ok(ExitCode::SUCCESS)
}

impl Seen {
    /// Compares the directory with the last look.
    fn look(&mut self, rows: &[Row], first: bool) -> Vec<Event> {
        let mut events = Vec::new();
        let (mut steps, mut attempts) = (BTreeMap::new(), BTreeMap::new());
        for row in rows {
            match row.state {
                Kind::InFlight => {
                    attempts.insert(row.path.clone(), (row.step, row.bytes));
                    if !self.attempts.contains_key(&row.path) {
                        events.push(Event::of(Happened::Begun, row));
                    }
                }
                Kind::Foreign => {}
                kind => {
                    let known = self.steps.get(&row.step);
                    let happened = if kind == Kind::Complete { Happened::Complete } else { Happened::Damaged };
                    let happened = if first && kind == Kind::Complete { Happened::Found } else { happened };
                    if known.is_none_or(|(known, _)| *known != kind) {
                        events.push(Event::of(happened, row));
                    }
                    steps.insert(row.step, (kind, row.bytes));
                }
            }
        }
        for (path, (step, bytes)) in &self.attempts {
            let published = steps.contains_key(step) && !self.steps.contains_key(step);
            if !attempts.contains_key(path) && !published && !rewritten(rows, *step, &self.steps) {
                let (event, step, bytes) = (Happened::Failed, *step, *bytes);
                let why = "the save failed, was cancelled, or its process died".to_owned();
                events.push(Event { event, step, bytes, took_seconds: None, why: Some(why) });
                self.failures += 1;
                self.last_failure = Some((step, SystemTime::now()));
            }
        }
        for (step, (_, bytes)) in self.steps.iter().filter(|(step, _)| !steps.contains_key(step)) {
            let (event, step, bytes) = (Happened::Deleted, *step, *bytes);
            events.push(Event { event, step, bytes, took_seconds: None, why: None });
        }
        (self.steps, self.attempts) = (steps, attempts);
        events
    }
}

/// True when a step that was there before has just been written: its attempt has replaced it.
fn rewritten(rows: &[Row], step: u64, before: &BTreeMap<u64, (Kind, u64)>) -> bool {
    let recent = |row: &Row| row.step == step && row.complete && row.age_seconds.is_some_and(|age| age < 60);
    before.contains_key(&step) && rows.iter().any(recent)
}

impl Event {
    fn of(event: Happened, row: &Row) -> Self {
        let why = row.said.clone().or_else(|| row.why.clone());
        Self { event, step: row.step, bytes: row.bytes, took_seconds: row.took_seconds, why }
    }

    fn shown(&self) -> String {
        let (step, bytes) = (self.step, size::shown(self.bytes));
        let took = self.took_seconds.map_or_else(String::new, |took| format!(", took {}", when::span(took)));
        let why = self.why.as_deref().unwrap_or_default();
        match self.event {
            Happened::Found => format!("step {step} is there, {bytes}"),
            Happened::Begun => format!("step {step} is {why}"),
            Happened::Complete => format!("step {step} is complete, {bytes}{took}"),
            Happened::Failed => format!("step {step} was given up after {bytes}: {why}"),
            Happened::Damaged => format!("DAMAGED: {why}"),
            Happened::Deleted => format!("step {step} was deleted, {bytes}"),
        }
    }
}

fn tell(common: &Common, event: &Event) -> Result<()> {
    if common.json {
        return out::json(event);
    }
    out::print(&out::wrapped(&format!("{}  ", when::clock(SystemTime::now())), &event.shown()))
}

/// Describes the saves in flight, the newest step and the last failure, for the last line of a terminal.
/// `before` has the bytes that the attempts had at the last look, `elapsed` ago.
fn status(rows: &[Row], seen: &Seen, before: &BTreeMap<PathBuf, (u64, u64)>, elapsed: Option<Duration>) -> String {
    let newest = rows.iter().rfind(|row| row.complete);
    let mut parts = Vec::new();
    for row in rows.iter().filter(|row| row.state == Kind::InFlight) {
        // The length of the newest step predicts the length of this attempt.
        let whole = newest.map_or(0, |newest| newest.bytes).max(1);
        let percent = (100 * row.bytes / whole).min(99);
        let grown = before.get(&row.path).map(|(_, bytes)| row.bytes.saturating_sub(*bytes));
        let rate = grown.zip(elapsed).map(|(grown, elapsed)| grown as f64 / elapsed.as_secs_f64().max(1e-3));
        let rate = rate.map_or_else(String::new, |rate| format!(" {}/s", size::shown(rate as u64)));
        parts.push(format!("step {} {percent} %{rate}", row.step));
    }
    let newest = newest.map_or_else(
        || "no step yet".to_owned(),
        |row| {
            let age =
                row.age_seconds.map_or_else(String::new, |s| format!(", {} ago", age::shown(Duration::from_secs(s))));
            format!("newest: step {}{age}", row.step)
        },
    );
    parts.push(newest);
    parts.push(match seen.last_failure {
        None => "failures: none".to_owned(),
        Some((step, at)) => format!("failures: {}, last of step {step} at {}", seen.failures, when::clock(at)),
    });
    parts.join("   ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64, state: Kind, bytes: u64) -> Row {
        let (path, complete, age_seconds) = (format!("step-{step}").into(), state == Kind::Complete, Some(180));
        let (saved, took_seconds, mark, why, said) = (None, None, None, None, None);
        let shared_bytes = 0;
        Row { step, path, bytes, shared_bytes, complete, state, saved, age_seconds, took_seconds, mark, why, said }
    }

    #[test]
    fn the_line_of_a_terminal_has_progress_rate_age_and_the_last_failure() {
        let mut seen = Seen::default();
        let rows = [row(10, Kind::Complete, 1000), row(20, Kind::InFlight, 200)];
        let nothing = BTreeMap::new();
        assert_eq!(status(&[], &seen, &nothing, None), "no step yet   failures: none");
        let first = status(&rows, &seen, &nothing, None);
        assert_eq!(first, "step 20 20 %   newest: step 10, 3 min ago   failures: none");
        assert_eq!(seen.look(&rows, true).len(), 2);
        let (before, rows) = (seen.attempts.clone(), [row(10, Kind::Complete, 1000), row(20, Kind::InFlight, 700)]);
        let second = status(&rows, &seen, &before, Some(Duration::from_millis(500)));
        assert!(second.starts_with("step 20 70 % 1.0 kB/s   newest: step 10"), "{second}");
        assert_eq!(
            seen.look(&rows[..1], false).iter().map(|event| event.event).collect::<Vec<_>>(),
            [Happened::Failed]
        );
        assert!(status(&rows[..1], &seen, &before, None).contains("failures: 1, last of step 20 at "));
    }
}
