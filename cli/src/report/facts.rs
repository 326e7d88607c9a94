//! Facts from the logs of a run: counts, quantiles, the work at risk, and settings that would help.

use super::words::{saves, thousands, time};
use crate::out::quantile;
use ashore::internal::run_log::{Ended, Head, Run, SaveLine};

/// Waits below this are not worth a warning, in microseconds.
const WORTH: u64 = 1000;

/// The facts about a run, from its logs alone. Times are in seconds.
#[derive(Debug, Default)]
pub struct Facts {
    /// The first line of the newest log.
    pub head: Head,
    /// All saves, by the time of their call.
    pub saves: Vec<SaveLine>,
    /// Number of executors, and how many of them ended without a last line.
    pub sessions: usize,
    pub unclosed: usize,
    /// True when the newest executor has ended in order.
    pub closed: bool,
    /// How long the executors ran in total.
    pub active: f64,
    /// The times of the first and the last sign of the run, in microseconds since 1970.
    pub from: u64,
    pub to: u64,
    /// How long training waited in total.
    pub stalled: f64,
    /// The median time between the calls of two saves.
    pub interval: f64,
    /// The maximum training time that was not durable at any moment.
    pub worst: f64,
    /// Lines that could not be read, or were never written.
    pub unread: u64,
}

/// A warning: the observation, and the setting that helps.
#[derive(Debug, PartialEq, Eq)]
pub struct Warning {
    pub what: String,
    pub advice: String,
}

pub fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

/// Joins the logs of a run, oldest first.
pub fn gather(runs: Vec<Run>) -> Facts {
    let mut facts = Facts::default();
    let (mut intervals, mut last_session) = (Vec::new(), String::new());
    for run in runs {
        let Run { head, mut saves, closed, unread, .. } = run;
        let head = head.unwrap_or_default();
        let same = !head.session.is_empty() && head.session == last_session;
        facts.unclosed += usize::from(!same && facts.sessions > 0 && !facts.closed);
        facts.sessions += usize::from(!same);
        facts.unread += unread + saves.iter().map(|save| save.lost).sum::<u64>();
        saves.sort_by_key(|save| save.at);
        let began = saves.first().map_or(head.at, |save| if head.at == 0 || same { save.at } else { head.at });
        let ended = saves.iter().map(end).max().unwrap_or(began).max(closed.unwrap_or(0));
        facts.active += seconds(ended.saturating_sub(began));
        facts.from = if facts.from == 0 { began } else { facts.from.min(began) };
        facts.to = facts.to.max(ended);
        facts.closed = closed.is_some();
        facts.stalled += saves.iter().map(|save| seconds(save.stall())).sum::<f64>();
        intervals.extend(saves.windows(2).map(|two| seconds(two[1].at - two[0].at)));
        facts.worst = facts.worst.max(at_risk(&saves));
        last_session.clone_from(&head.session);
        facts.head = head;
        facts.saves.extend(saves);
    }
    facts.unclosed += usize::from(facts.sessions > 0 && !facts.closed);
    facts.interval = quantile(intervals, 0.5);
    facts
}

/// Returns the time when a save ended, in microseconds since 1970.
pub fn end(save: &SaveLine) -> u64 {
    save.at.saturating_add(save.ended)
}

/// Returns the longest time from the call of a durable save until the next save was durable. A crash right
/// before that moment would have lost this much training.
fn at_risk(saves: &[SaveLine]) -> f64 {
    let durable: Vec<_> = saves.iter().filter(|save| save.end == Ended::Durable).collect();
    let lost = durable.windows(2).map(|two| end(two[1]).saturating_sub(two[0].at));
    seconds(lost.chain(durable.first().map(|first| first.ended)).max().unwrap_or(0))
}

impl Facts {
    pub fn durable(&self) -> impl DoubleEndedIterator<Item = &SaveLine> + Clone {
        self.saves.iter().filter(|save| save.end == Ended::Durable)
    }

    pub fn count(&self, end: Ended) -> usize {
        self.saves.iter().filter(|save| save.end == end).count()
    }

    pub fn failed(&self) -> usize {
        self.count(Ended::Failed) + self.count(Ended::Indeterminate)
    }

    /// The durable save with the newest state.
    pub fn newest(&self) -> Option<&SaveLine> {
        self.durable().next_back()
    }

    /// The saves that began.
    pub fn begun(&self) -> impl Iterator<Item = &SaveLine> + Clone {
        self.saves.iter().filter(|save| !matches!(save.end, Ended::Superseded | Ended::Skipped))
    }

    /// The quantile of how long training waited for a save.
    pub fn stall(&self, q: f64) -> f64 {
        quantile(self.begun().map(|save| seconds(save.stall())), q)
    }

    /// The quantile of the time until a step was durable.
    pub fn until_durable(&self, q: f64) -> f64 {
        quantile(self.durable().map(|save| seconds(save.ended)), q)
    }

    /// The share of the run's time that training waited.
    pub fn cost(&self) -> Option<f64> {
        (self.active > 0.0 && self.saves.len() > 1).then(|| self.stalled / self.active)
    }

    /// The durable save of median length.
    pub fn typical(&self) -> Option<&SaveLine> {
        let mut durable: Vec<_> = self.durable().collect();
        durable.sort_by_key(|save| save.ended);
        durable.get(durable.len().saturating_sub(1) / 2).copied()
    }

    /// Returns the least stall of a save that is listed separately: ten times the median, and at least 10 ms.
    pub fn outlier(&self) -> f64 {
        (self.stall(0.5) * 10.0).max(0.01)
    }

    /// The saves with the longest stalls, longest first.
    pub fn outliers(&self) -> Vec<&SaveLine> {
        let least = self.outlier();
        let mut found: Vec<_> = self.begun().filter(|save| seconds(save.stall()) >= least).collect();
        found.sort_by_key(|save| std::cmp::Reverse(save.stall()));
        found
    }

    /// Returns how much of its limit each part of a save uses, as shares of time. The part nearest to 1 is
    /// the bottleneck.
    pub fn loads(&self) -> Vec<(&'static str, f64, String)> {
        let writers = self.head.settings.as_ref().map_or(1, |settings| settings.writers).max(1) as f64;
        let median = |share: &dyn Fn(&SaveLine) -> (u64, f64)| {
            let shares = self.durable().filter_map(|save| {
                let (part, whole) = share(save);
                (whole > 0.0).then(|| (part as f64 / whole).clamp(0.0, 1.0))
            });
            quantile(shares, 0.5)
        };
        let window = |save: &SaveLine| save.written.saturating_sub(save.write_at) as f64 * writers;
        let whole = if self.interval > 0.0 { self.until_durable(0.5) / self.interval } else { 0.0 };
        let of = |part: &str| format!("of the {part}");
        vec![
            ("A save is under way", whole.min(1.0), of("time between two saves")),
            (
                "Writers wait for the disk",
                median(&|save| (save.write, window(save))),
                of("time in which a save is written"),
            ),
            ("Writers digest", median(&|save| (save.digest, window(save))), of("time in which a save is written")),
            (
                "Copies wait for the arena",
                median(&|save| (save.arena, save.staged.saturating_sub(save.stage_at) as f64)),
                of("time in which a save is copied"),
            ),
            ("Training waits", self.cost().unwrap_or(0.0).min(1.0), of("run")),
        ]
    }

    /// Returns problems and possible improvements, each with the setting that helps.
    pub fn warnings(&self) -> Vec<Warning> {
        let mut found = Vec::new();
        let mut warn = |what: String, advice: &str| found.push(Warning { what, advice: advice.to_owned() });
        let steps = |of: &dyn Fn(&SaveLine) -> bool| -> Vec<u64> {
            self.saves.iter().filter(|save| of(save)).map(|save| save.step).collect()
        };
        let failed = steps(&|save| matches!(save.end, Ended::Failed | Ended::Indeterminate));
        if !failed.is_empty() {
            let kinds = |kind: &str| self.saves.iter().filter(|save| save.kind == kind).count();
            let advice = match () {
                () if kinds("nospace") > 0 => {
                    "The disk was full: keep fewer steps (ASHORE_KEEP_LAST), or move the run."
                }
                () if kinds("deadline") > 0 => {
                    "The storage was too slow for the deadline: save less often, or set save_timeout."
                }
                () if kinds("device") > 0 => "The GPU reported an error: see the messages of the driver.",
                () => "The reasons are in the table of saves that failed.",
            };
            warn(format!("{} failed ({})", saves(failed.len()), listed(&failed)), advice);
        }
        let starved = steps(&|save| save.starved() >= WORTH);
        if !starved.is_empty() {
            let most = self.saves.iter().map(SaveLine::starved).max().unwrap_or(0);
            let larger = self.head.arena.saturating_mul(2);
            let advice = format!(
                "A larger arena avoids that: ASHORE_ARENA={larger} ({}), twice as much as now.",
                crate::size::exact(larger)
            );
            let what = format!(
                "{} waited for the arena, for up to {} ({})",
                saves(starved.len()),
                time(seconds(most)),
                listed(&starved)
            );
            warn(what, &advice);
        }
        let queued = steps(&|save| save.queue >= WORTH);
        if !queued.is_empty() {
            let what = format!("{} waited for earlier saves in the call ({})", saves(queued.len()), listed(&queued));
            warn(what, "Saves come faster than the disk writes them: save less often, or set overlap = \"latest\".");
        }
        let left_out = self.count(Ended::Superseded) + self.count(Ended::Skipped);
        if left_out > 0 {
            let what = format!("{} never began, because another one was unfinished", saves(left_out));
            warn(what, "The overlap policy did that: save less often if each of them matters.");
        }
        let retried: u64 = self.saves.iter().map(|save| save.tries).sum();
        if retried > 0 {
            warn(format!("{retried} attempts were tried again"), "The storage failed for a moment; see its log.");
        }
        if self.head.device.contains("cuda") && !self.head.pinned {
            let what = "The arena is not pinned, so copies from the GPU are slow".to_owned();
            warn(what, "Raise the limit of locked memory (ulimit -l), or take a smaller arena.");
        }
        if self.unread > 0 {
            let what = format!("{} lines of the log cannot be read or were never written", self.unread);
            warn(what, "The figures lack them.");
        }
        found
    }
}

/// The first few steps of a list.
fn listed(steps: &[u64]) -> String {
    let first: Vec<_> = steps.iter().take(3).map(|step| thousands(*step)).collect();
    let more = if steps.len() > 3 { " and others" } else { "" };
    format!("step {}{more}", first.join(", "))
}
