//! A benchmark of saves as one page of HTML that needs nothing else: no script, no font, no network.

pub mod charts;
pub mod ink;
#[cfg(test)]
mod tests;

use crate::out::{median, quantile};
use crate::size;
use ashore::{Error, Result};
use ink::Ink;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::path::Path;

/// What training waits for.
const CALL: &str = "save call";
/// A figure that is larger than this is none: a clock or a division went wrong.
const SANE: f64 = 1e9;
/// Between a number and its unit, which belong in one line.
const NBSP: char = '\u{a0}';

/// What a report shows.
pub struct Report<'a> {
    /// What was measured.
    pub title: &'a str,
    /// The command line that made it.
    pub command: String,
    /// Where it was measured.
    pub machine: String,
    /// What the figures say.
    pub verdict: String,
    /// The rows of the table: a name, and a value with its unit.
    pub figures: Vec<(String, String)>,
    /// One for each round.
    pub saves: Vec<Timeline>,
    /// Ours over the limit, one for each pair.
    pub ratios: Vec<f64>,
    /// The limit over the limit: what the machine does to a ratio by itself.
    pub noise: Vec<f64>,
}

/// One save over time, in seconds since it was called.
pub struct Timeline {
    /// Which one it was, such as `round 3`.
    pub label: String,
    /// What it did. Staging and writing overlap.
    pub phases: Vec<Phase>,
    /// How far it was.
    pub samples: Vec<Sample>,
    /// How much it saved.
    pub bytes: u64,
}

/// What a save did from one moment to another.
pub struct Phase {
    /// `save call`, `staging`, `writing` or `commit`.
    pub name: &'static str,
    /// When it began.
    pub from: f64,
    /// When it ended.
    pub to: f64,
}

/// How far a save was at one moment.
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

    /// What it costs, in one sentence, before anything else.
    fn heading(&self) -> Markup {
        let (held, whole) = (median(self.spent(CALL)), median(self.lengths()));
        html! {
            header {
                h1 { (self.title) }
                p.quiet { code { (self.command) } }
                p.quiet { (self.machine) }
                @if held > 0.0 && whole > held {
                    p.lead {
                        "A save holds the training thread for " (time(held)) " of the " (time(whole)) " until it is durable: "
                        (percent(held / whole)) "."
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
                    (tile(ink::WRITING, "Of the machine\u{2019}s limit", percent(median(ratios.iter().copied())),
                        &format!("median; middle half {}", middle_half(&ratios))))
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
                    p.quiet { "Only the save call holds the training thread; the rest runs beside it. Phases overlap, so their shares do not add up to one." }
                    table {
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
                    (chart("The phases of each save over time", charts::phases(&self.saves)))
                    @if self.saves.len() > charts::ROWS {
                        p.quiet { (charts::ROWS) " of " (self.saves.len()) " saves: the slowest, the middle and the fastest." }
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
                        "Bold: the middle save. Between its two lines lies what waits in the arena."
                    }
                    (chart("Bytes staged and written over time", charts::bytes(&self.saves)))
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
                        "One dot for each pair of a save and the limit, measured in turn. At 1 the disk could do no more. "
                        "Shaded: the middle half; upright: the median."
                        @if !noise.is_empty() { " Below, the machine against itself: no difference smaller than this is one." }
                    }
                    (chart("The ratio to the limit of every pair", charts::ratios(&ratios, &noise)))
                }
                @if lost > 0 { p.quiet { "Left out, because not a ratio: " (lost) "." } }
            }
        }
    }

    fn table(&self) -> Markup {
        html! {
            section {
                h2 { "Figures" }
                @if self.figures.is_empty() { p.quiet { "None." } }
                table { tbody {
                    @for (name, value) in &self.figures {
                        tr { th scope="row" { (name) } td.number { (value) } }
                    }
                } }
            }
        }
    }

    fn phase_names(&self) -> Vec<&'static str> {
        charts::phase_names(self.saves.iter())
    }

    /// How long each save took.
    fn lengths(&self) -> Vec<f64> {
        self.saves.iter().map(Timeline::length).filter(|length| *length > 0.0).collect()
    }

    /// How long a phase took in each save that has it.
    fn spent(&self, name: &str) -> Vec<f64> {
        self.saves.iter().filter_map(|save| save.spent(name)).collect()
    }

    /// The same, as a share of the save.
    fn shares(&self, name: &str) -> Vec<f64> {
        let share = |save: &Timeline| Some(save.spent(name)? / save.length()).filter(|share| share.is_finite());
        self.saves.iter().filter_map(share).collect()
    }
}

impl Timeline {
    /// The phases that a clock can have measured.
    fn phases(&self) -> impl Iterator<Item = &Phase> {
        self.phases.iter().filter(|p| (0.0..SANE).contains(&p.from) && (p.from..SANE).contains(&p.to))
    }

    fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(|s| (0.0..SANE).contains(&s.at))
    }

    /// When it was over: the end of the last phase or sample.
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

fn chart(name: &str, drawn: charts::Drawn<String>) -> Markup {
    html! {
        @match drawn {
            Ok(svg) => div.chart role="img" aria-label=(name) { (PreEscaped(svg)) },
            Err(e) => p.quiet { "This chart could not be drawn: " (e) },
        }
    }
}

fn middle_half(ratios: &[f64]) -> String {
    let [from, to] = [0.25, 0.75].map(|q| quantile(ratios.iter().copied(), q) * 100.0);
    format!("{from:.1} to {to:.1}{NBSP}%")
}

/// Three digits, in the unit that suits them.
fn time(seconds: f64) -> String {
    let (scaled, unit) = match seconds {
        s if s < 999.5e-6 => (s * 1e6, "\u{b5}s"),
        s if s < 0.9995 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    let digits = [9.995, 99.95].iter().filter(|bound| scaled < **bound).count();
    format!("{scaled:.digits$}{NBSP}{unit}")
}

/// Down to a hundredth, because what a save costs is small.
fn percent(share: f64) -> String {
    match share * 100.0 {
        p if p > 0.0 && p < 0.01 => format!("below 0.01{NBSP}%"),
        p if p < 1.0 => format!("{p:.2}{NBSP}%"),
        p => format!("{p:.1}{NBSP}%"),
    }
}
