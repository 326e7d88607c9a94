//! The report of a save benchmark: a self-contained HTML page without scripts, fonts or network access.

pub mod charts;
pub mod ink;
#[cfg(test)]
mod tests;

use super::pairs::{AT_LEAST, Estimate};
use crate::out::{median, quantile};
use crate::size;
use ashore::{Error, Result};
use ink::Ink;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::path::Path;

/// The phase during which training waits.
const CALL: &str = "save call";
/// The minimum comparisons of the machine with itself that determine the noise.
const NOISE: usize = 3;
/// Larger figures are errors of a clock or a division.
const SANE: f64 = 1e9;
/// Between a number and its unit, which must stay on one line.
const NBSP: char = '\u{a0}';

/// The contents of a report.
pub struct Report<'a> {
    /// What was measured.
    pub title: &'a str,
    /// The command line of the benchmark.
    pub command: String,
    /// The machine that ran it.
    pub machine: String,
    /// The conclusion.
    pub verdict: String,
    /// The rows of the table: a name, and a value with its unit.
    pub figures: Vec<(String, String)>,
    /// One per round.
    pub saves: Vec<Timeline>,
    /// Ours over the limit, one per pair.
    pub ratios: Vec<f64>,
    /// The limit over the limit: how much a ratio varies by itself on this machine.
    pub noise: Vec<f64>,
}

/// One save over time, in seconds since its call.
pub struct Timeline {
    /// Its name, such as `round 3`.
    pub label: String,
    /// Its phases. Staging and writing overlap.
    pub phases: Vec<Phase>,
    /// Its progress.
    pub samples: Vec<Sample>,
    /// Its length in bytes.
    pub bytes: u64,
}

/// A phase of a save.
pub struct Phase {
    /// `save call`, `staging`, `writing` or `commit`.
    pub name: &'static str,
    /// When it began.
    pub from: f64,
    /// When it ended.
    pub to: f64,
}

/// The progress of a save at one time.
pub struct Sample {
    /// The moment.
    pub at: f64,
    /// Bytes copied into the arena by then.
    pub staged: u64,
    /// Bytes written to disk by then.
    pub written: u64,
}

impl Report<'_> {
    /// Writes the page.
    ///
    /// # Errors
    /// With the path, when the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.html()).map_err(|e| Error::io("cannot write the report", e).with_path(path))
    }

    fn html(&self) -> String {
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { (self.title) }
                    style { (PreEscaped(ink::rules())) (PreEscaped(include_str!("report/page.css"))) }
                }
                body {
                    main {
                        (self.heading())
                        (self.tiles())
                        (self.phases())
                        (self.bytes())
                        (self.limit())
                        (self.table())
                    }
                }
            }
        };
        page.into_string()
    }

    /// Writes the cost, in one sentence, at the top of the page.
    fn heading(&self) -> Markup {
        let (held, whole) = (median(self.spent(CALL)), median(self.lengths()));
        html! {
            header {
                h1 { (self.title) }
                p.quiet { code { (self.command) } }
                p.quiet { (self.machine) }
                @if held > 0.0 && whole > held {
                    p.lead {
                        "A save blocks training for " (time(held)) " of the " (time(whole)) " until it is durable: "
                        (percent(held / whole)) ". The longest of " (self.saves.len()) " blocked it for "
                        (time(quantile(self.spent(CALL), 1.0))) "."
                    }
                    p { "Against the machine\u{2019}s limit: " (self.verdict) }
                } @else {
                    p.lead { (self.verdict) }
                }
            }
        }
    }

    fn tiles(&self) -> Markup {
        let (calls, lengths, ratios) = (self.spent(CALL), self.lengths(), sane(&self.ratios));
        let longest = |times: &[f64]| format!("median; longest {}", time(quantile(times.iter().copied(), 1.0)));
        let bytes = self.saves.iter().map(|save| save.bytes);
        html! {
            dl.tiles {
                @if !calls.is_empty() {
                    (tile(ink::CALL, "The training thread waits", time(median(calls.iter().copied())), &longest(&calls)))
                }
                @if !lengths.is_empty() {
                    (tile(ink::COMMIT, "Durable after", time(median(lengths.iter().copied())), &longest(&lengths)))
                }
                @if !ratios.is_empty() {
                    @let (value, note) = beside_limit(&ratios);
                    (tile(ink::WRITING, "Beside the machine\u{2019}s limit", value, &note))
                }
                (tile(ink::LIMIT, "Saves", self.saves.len().to_string(),
                    &bytes.max().map(|most| format!("of {}", size::shown(most))).unwrap_or_default()))
            }
        }
    }

    fn phases(&self) -> Markup {
        let names = self.phase_names();
        html! {
            section {
                h2 { "Where the time goes" }
                @if names.is_empty() {
                    p.quiet { "No phases were measured." }
                } @else {
                    p.quiet { "Only the save call blocks the training thread; the rest runs in parallel. Phases overlap, so their shares do not add up to one." }
                    table.phases {
                        thead { tr { th { "Phase" } th.number { "Median" } th.number { "Longest" } th.share { "Share of the save" } } }
                        tbody {
                            @for name in names {
                                @let (spent, share) = (self.spent(name), median(self.shares(name)));
                                tr style=(format!("--ink:{}", Ink::of_phase(name).var())) {
                                    th scope="row" { span.key {} (name) }
                                    td.number { (time(median(spent.iter().copied()))) }
                                    td.number { (time(quantile(spent, 1.0))) }
                                    td.share title=(percent(share)) {
                                        span.bar style=(format!("width:{:.1}%", share.clamp(0.0, 1.0) * 100.0)) {}
                                    }
                                }
                            }
                        }
                    }
                    (chart("The phases of each save over time", |of| charts::phases(&self.saves, of)))
                    @if self.saves.len() > charts::ROWS {
                        p.quiet { (charts::ROWS) " of " (self.saves.len()) " saves: the slowest, the median and the fastest." }
                    }
                }
            }
        }
    }

    fn bytes(&self) -> Markup {
        html! {
            section {
                h2 { "Bytes staged and written" }
                @if self.saves.iter().all(|save| save.samples.is_empty()) {
                    p.quiet { "No samples were taken." }
                } @else {
                    p.quiet.keys {
                        (key(ink::STAGING, "staged")) (key(ink::WRITING, "written"))
                        "Bold: the median save. The distance between its two lines is the data in the arena."
                    }
                    (chart("Bytes staged and written over time", |of| charts::bytes(&self.saves, of)))
                }
            }
        }
    }

    fn limit(&self) -> Markup {
        let (ratios, noise) = (sane(&self.ratios), sane(&self.noise));
        let lost = self.ratios.len() + self.noise.len() - ratios.len() - noise.len();
        html! {
            section {
                h2 { "Against the machine\u{2019}s limit" }
                @if ratios.is_empty() && noise.is_empty() {
                    p.quiet { "No pairs were measured." }
                } @else {
                    p.quiet {
                        "One dot for each pair of a save and the limit, measured alternately. At 1 a save is as fast as the disk. "
                        "Shaded: the middle half; vertical line: the median."
                        @if noise.len() >= NOISE { " Below, the machine against itself: smaller differences are noise." }
                        @else { " The machine was too rarely compared with itself to say what is noise." }
                    }
                    @let shown = if noise.len() >= NOISE { &noise[..] } else { &[] };
                    (chart("The ratio to the limit of every pair", |of| charts::ratios(&ratios, shown, of)))
                }
                @if lost > 0 { p.quiet { "Omitted, not valid ratios: " (lost) "." } }
            }
        }
    }

    fn table(&self) -> Markup {
        html! {
            section {
                h2 { "Figures" }
                @if self.figures.is_empty() { p.quiet { "None." } }
                dl.figures {
                    @for (name, value) in &self.figures { dt { (name) } dd { (value) } }
                }
            }
        }
    }

    fn phase_names(&self) -> Vec<&'static str> {
        charts::phase_names(self.saves.iter())
    }

    /// Returns the length of each save.
    fn lengths(&self) -> Vec<f64> {
        self.saves.iter().map(Timeline::length).filter(|length| *length > 0.0).collect()
    }

    /// Returns the length of a phase in each save that has it.
    fn spent(&self, name: &str) -> Vec<f64> {
        self.saves.iter().filter_map(|save| save.spent(name)).collect()
    }

    /// Returns a phase's share of each save.
    fn shares(&self, name: &str) -> Vec<f64> {
        let share = |save: &Timeline| Some(save.spent(name)? / save.length()).filter(|share| share.is_finite());
        self.saves.iter().filter_map(share).collect()
    }
}

impl Timeline {
    /// Returns the phases with plausible times.
    fn phases(&self) -> impl Iterator<Item = &Phase> {
        self.phases.iter().filter(|p| (0.0..SANE).contains(&p.from) && (p.from..SANE).contains(&p.to))
    }

    fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(|s| (0.0..SANE).contains(&s.at))
    }

    /// Returns the end of the last phase or sample.
    fn length(&self) -> f64 {
        self.phases().map(|p| p.to).chain(self.samples().map(|s| s.at)).fold(0.0, f64::max)
    }

    fn spent(&self, name: &str) -> Option<f64> {
        self.phases().filter(|p| p.name == name).map(|p| p.to - p.from).reduce(|a, b| a + b)
    }
}

fn sane(ratios: &[f64]) -> Vec<f64> {
    ratios.iter().copied().filter(|ratio| (0.0..SANE).contains(ratio)).collect()
}

fn tile(ink: Ink, name: &str, value: String, note: &str) -> Markup {
    html! {
        div.tile style=(format!("--ink:{}", ink.var())) {
            dt { (name) }
            dd.value { (value) }
            dd.quiet { (note) }
        }
    }
}

fn key(ink: Ink, name: &str) -> Markup {
    html! { span { i.key style=(format!("--ink:{}", ink.var())) {} (name) } }
}

/// A chart in both sizes, of which the style sheet shows one.
pub fn chart(name: &str, draw: impl Fn(charts::Size) -> charts::Drawn<String>) -> Markup {
    html! {
        @for (of, class) in [(charts::WIDE, "chart wide"), (charts::NARROW, "chart narrow")] {
            @match draw(of) {
                Ok(svg) => div class=(class) role="img" aria-label=(name) { (PreEscaped(svg)) },
                Err(e) => p.quiet { "This chart could not be drawn: " (e) },
            }
        }
    }
}

/// Returns the speed relative to the limit, and a note. If there are too few pairs to decide, only the
/// interval is a result.
fn beside_limit(ratios: &[f64]) -> (String, String) {
    let estimate = Estimate::of(ratios);
    let Estimate { median, low, high } = estimate;
    if ratios.len() >= AT_LEAST && estimate.is_decided() {
        return (percent(median), format!("of it; middle half {}", middle_half(ratios)));
    }
    let interval = format!("{:.0} to {:.0}{NBSP}%", low * 100.0, high * 100.0);
    if ratios.len() < AT_LEAST {
        return ("undecided".into(), format!("{} pairs are too few; they were {interval}", ratios.len()));
    }
    ("undecided".into(), format!("95{NBSP}% interval {interval} of it"))
}

fn middle_half(ratios: &[f64]) -> String {
    let [from, to] = [0.25, 0.75].map(|q| quantile(ratios.iter().copied(), q) * 100.0);
    format!("{from:.1} to {to:.1}{NBSP}%")
}

/// Formats a time with three digits, in a suitable unit.
fn time(seconds: f64) -> String {
    let (scaled, unit) = match seconds {
        s if s < 999.5e-6 => (s * 1e6, "\u{b5}s"),
        s if s < 0.9995 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    let digits = [9.995, 99.95].iter().filter(|bound| scaled < **bound).count();
    format!("{scaled:.digits$}{NBSP}{unit}")
}

/// Formats a share in percent, with two decimals if small, as the cost of a save is.
fn percent(share: f64) -> String {
    match share * 100.0 {
        p if p > 0.0 && p < 0.01 => format!("below 0.01{NBSP}%"),
        p if p < 1.0 => format!("{p:.2}{NBSP}%"),
        p => format!("{p:.1}{NBSP}%"),
    }
}
