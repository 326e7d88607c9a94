//! The page of a run: one file without scripts, fonts or network access.

use super::charts;
use super::facts::{Facts, Warning, end, seconds};
use super::words::{NBSP, capital, date, percent, saves, thousands, time};
use crate::bench::report::chart;
use crate::bench::report::ink::{self, Ink};
use crate::size;
use ashore::internal::run_log::SaveLine;
use maud::{DOCTYPE, Markup, PreEscaped, html};

/// The maximum rows of a list.
const ROWS: usize = 12;
/// The share of the run's time that the verdict calls affordable.
const AFFORDABLE: f64 = 0.01;

pub struct Page<'a> {
    /// The run, as the user named it.
    pub name: String,
    /// The time when the page is made, in microseconds since 1970.
    pub now: u64,
    pub facts: &'a Facts,
}

impl Page<'_> {
    /// Returns the conclusion, in one or two sentences.
    pub fn verdict(&self) -> String {
        let facts = self.facts;
        let durable = facts.durable().count();
        if durable == 0 {
            return format!("No step became durable: {} ended otherwise.", saves(facts.saves.len()));
        }
        let Some(cost) = facts.cost() else {
            let (stall, whole) = (time(facts.stall(0.5)), time(facts.until_durable(0.5)));
            return format!("Training waited {stall} for a save that was durable after {whole}.");
        };
        let every = facts.interval;
        let each = facts.stalled / facts.begun().count().max(1) as f64;
        let least = (each / AFFORDABLE).max(facts.until_durable(0.5));
        let mut verdict = format!("Checkpointing costs {} of the run\u{2019}s time", percent(cost));
        if every > 0.0 {
            verdict += &format!(", with a save every {}", time(every));
        }
        verdict.push('.');
        let failed = facts.failed();
        if failed > 0 {
            verdict += &format!(" {} failed.", capital(&saves(failed)));
        }
        if every > 0.0 && least < every * 0.8 {
            let by = if each / AFFORDABLE > facts.until_durable(0.5) {
                format!("would cost {} of it", percent(AFFORDABLE))
            } else {
                "is as often as the disk allows".to_owned()
            };
            verdict += &format!(" Saving every {} {by}.", time(least));
        }
        verdict
    }

    pub fn html(&self) -> String {
        let style = [ink::rules(), include_str!("page.css").to_owned()].concat();
        let page = html! {
            (DOCTYPE)
            html lang="en" {
                head {
                    meta charset="utf-8";
                    meta name="viewport" content="width=device-width, initial-scale=1";
                    title { (self.name) ": ashore report" }
                    style { (PreEscaped(style)) }
                }
                body { main {
                    (self.heading())
                    (self.cards())
                    @for warning in self.facts.warnings() { (shown(&warning)) }
                    (self.one_save())
                    (self.stalls())
                    (self.failures())
                    (self.loads())
                    (self.settings())
                } }
            }
        };
        page.into_string()
    }

    fn heading(&self) -> Markup {
        let (facts, head) = (self.facts, &self.facts.head);
        let ranks = if head.world == 1 { "1 rank".to_owned() } else { format!("{} ranks", head.world) };
        // The reason for its choice is among the settings.
        let device = head.device.split(" (").next().unwrap_or_default();
        let largest = facts.durable().map(|save| save.bytes).max().unwrap_or(0);
        let durable = facts.durable().count();
        html! {
            header {
                h1 { (self.name) " \u{b7} " (ranks) " \u{b7} " (device) " \u{b7} " (date(facts.from)) " to " (date(facts.to)) }
                p.lead { (self.verdict()) }
                p.quiet {
                    (capital(&saves(facts.saves.len()))) " of " (size::shown(largest)) ", "
                    @if durable == facts.saves.len() { "all durable. " } @else { (thousands(durable as u64)) " of them durable. " }
                    (self.lost_now())
                }
            }
        }
    }

    /// Describes the work that a crash would lose now.
    fn lost_now(&self) -> String {
        let facts = self.facts;
        let Some(newest) = facts.newest() else { return "Nothing could be restored.".to_owned() };
        let (step, at) = (thousands(newest.step), date(newest.at));
        let since = time(seconds(self.now.saturating_sub(newest.at)));
        let last = time(seconds(facts.to.saturating_sub(newest.at)));
        if facts.closed {
            return format!("The run has ended in order. Its newest durable step is {step}, the state of {at}.");
        }
        let quiet = seconds(self.now.saturating_sub(facts.to));
        if facts.interval > 0.0 && quiet > 10.0 * facts.interval.max(1.0) {
            return format!(
                "The log stops at {} without its last line: the run was killed, or hangs. Step {step} is the newest durable \
                 one; at least {last} of training after it are lost.",
                date(facts.to)
            );
        }
        format!("If this machine dies now, {since} of training are lost: step {step}, the state of {at}, is durable.")
    }

    fn cards(&self) -> Markup {
        let facts = self.facts;
        let [p50, p99, most] = [0.5, 0.99, 1.0].map(|q| time(facts.stall(q)));
        let retried: u64 = facts.saves.iter().map(|save| save.tries).sum();
        let where_failed: Vec<_> = facts.saves.iter().filter(|save| !save.kind.is_empty() || save.tries > 0).collect();
        let note = match &where_failed[..] {
            [] => "none".to_owned(),
            [one] => format!("at step {}", thousands(one.step)),
            [first, .., last] => format!("at steps {} to {}", thousands(first.step), thousands(last.step)),
        };
        html! {
            div.cards {
                (card(ink::CALL, "Training waited per save", &p50, &format!("99th of 100: {p99}; longest {most}")))
                (card(ink::WRITING, "Durable after", &time(facts.until_durable(0.5)),
                    &format!("longest {}", time(facts.until_durable(1.0)))))
                (card(ink::STAGING, "Not yet durable, worst", &time(facts.worst), "of training at risk"))
                (card(ink::LIMIT, "Failed, tried again", &format!("{}, {retried}", facts.failed()), &note))
            }
        }
    }

    fn one_save(&self) -> Markup {
        let facts = self.facts;
        let Some(save) = facts.typical() else { return html! {} };
        let digest = seconds(save.digest);
        html! {
            section {
                h2 { "One save beside training" }
                p.quiet.keys {
                    (key(ink::GRID, "training")) (key(ink::CALL, "waiting")) (key(ink::STAGING, "copy"))
                    (key(ink::WRITING, "write")) (key(ink::COMMIT, "commit"))
                }
                (chart("One save beside training", |size| charts::one_save(save, facts.interval, size)))
                p.quiet {
                    "The durable save of median length, step " (thousands(save.step)) ". Copy ends when nothing reads the tensors any more."
                    @if digest > 0.0 { " Writers digested for " (time(digest)) " in all." }
                    @if save.late > 0 { " A fence copied " (save.late) " chunks on the GPU." }
                }
            }
        }
    }

    fn stalls(&self) -> Markup {
        let facts = self.facts;
        if facts.begun().next().is_none() {
            return html! {};
        }
        let (outliers, least) = (facts.outliers(), time(facts.outlier()));
        html! {
            section {
                h2 { "What training waited for, save by save" }
                (chart("How long training waited for each save", |size| charts::stalls(facts, size)))
                p.quiet {
                    "Over the time since the run began, on a log scale: the call of save and the fences. "
                    @if outliers.is_empty() { "None took " (least) " or more." }
                    @else { "Red: " (least) " or more, " (saves(outliers.len())) "; the longest are below." }
                }
                @if !outliers.is_empty() {
                    table {
                        thead { tr { th { "Step" } th.number { "Waited" } th { "For" } } }
                        tbody { @for save in outliers.iter().take(ROWS) {
                            tr { td { (thousands(save.step)) } td.number { (time(seconds(save.stall()))) } td { (cause(save)) } }
                        } }
                    }
                }
            }
        }
    }

    fn failures(&self) -> Markup {
        let failed: Vec<&SaveLine> = self.facts.saves.iter().filter(|save| !save.kind.is_empty()).collect();
        if failed.is_empty() {
            return html! {};
        }
        html! {
            section {
                h2 { "Saves that failed" }
                table {
                    thead { tr { th { "Step" } th { "When" } th { "Why" } } }
                    tbody { @for save in failed.iter().rev().take(ROWS) {
                        tr { td { (thousands(save.step)) } td { (date(end(save))) } td.why { (save.kind) ": " (save.why) } }
                    } }
                }
                @if failed.len() > ROWS { p.quiet { "The newest " (ROWS) " of " (failed.len()) "." } }
            }
        }
    }

    fn loads(&self) -> Markup {
        let facts = self.facts;
        let Some(typical) = facts.typical() else { return html! {} };
        let loads = facts.loads();
        let decides = loads.iter().take(4).max_by(|a, b| a.1.total_cmp(&b.1)).map(|(name, ..)| *name);
        let rate = |bytes: u64, from: u64, to: u64| {
            let spent = seconds(to.saturating_sub(from));
            if spent > 0.0 { format!("{}/s", size::shown((bytes as f64 / spent) as u64)) } else { "-".to_owned() }
        };
        let best = facts.durable().filter(|save| save.written > save.write_at);
        let best = best.max_by(|a, b| speed(a).total_cmp(&speed(b))).unwrap_or(typical);
        html! {
            section {
                h2 { "What is near its limit" }
                dl.loads { @for (name, share, of) in &loads {
                    div style=(format!("--ink:{}", if decides == Some(*name) { ink::CALL } else { ink::WRITING }.var())) {
                        dt { (name) ", " span.quiet { (of) } }
                        dd { span.bar style=(format!("width:{:.1}%", share * 100.0)) {} span.value { (percent(*share)) } }
                    }
                } }
                p.quiet {
                    "Medians. What is nearest to 100" (NBSP) "% decides how often this run can save. Copied at "
                    (rate(typical.staged_bytes, typical.stage_at, typical.staged)) ", written at "
                    (rate(typical.written_bytes, typical.write_at, typical.written)) ", at best "
                    (rate(best.written_bytes, best.write_at, best.written))
                    ". The log does not know the machine\u{2019}s limits: " code { "ashore bench limits" } " measures them."
                }
            }
        }
    }

    fn settings(&self) -> Markup {
        let (facts, head) = (self.facts, &self.facts.head);
        let mut rows: Vec<(&str, String)> = vec![
            ("host, process", format!("{}, {}", head.host, head.pid)),
            ("version", head.version.clone()),
            (
                "executors",
                match facts.unclosed {
                    0 => facts.sessions.to_string(),
                    unclosed => format!("{}, of which {unclosed} without an orderly end", facts.sessions),
                },
            ),
            ("device", head.device.clone()),
            ("arena", format!("{}, {}", size::exact(head.arena), if head.pinned { "pinned" } else { "not pinned" })),
            ("files are written by", head.engine.clone()),
        ];
        if let Some(set) = &head.settings {
            let kept = set.keep_last.map_or("all".to_owned(), |last| format!("the last {last}"));
            let every = set.keep_every.map(|every| format!(", every {}th", thousands(every))).unwrap_or_default();
            rows.extend([
                ("chunk", size::exact(set.chunk)),
                ("writers", format!("{}, {}", set.writers, if set.direct { "direct" } else { "buffered" })),
                ("overlap", format!("{:?}", set.overlap)),
                ("keep", kept + &every),
                ("save timeout", time(set.save_timeout.as_secs_f64())),
            ]);
        }
        html! {
            section {
                h2 { "Settings and machine" }
                dl.settings { @for (name, value) in rows { dt { (name) } dd { (value) } } }
            }
        }
    }
}

fn speed(save: &SaveLine) -> f64 {
    save.written_bytes as f64 / seconds(save.written - save.write_at)
}

/// Returns the part of a save for which training waited longest.
fn cause(save: &SaveLine) -> &'static str {
    let parts = [
        (save.queue, "earlier saves, in the call"),
        (save.call.saturating_sub(save.queue), "the call of save itself"),
        (save.starved(), "a free slab, in the fence"),
        (save.fence.saturating_sub(save.starved()), "copies, in the fence"),
    ];
    parts.into_iter().max_by_key(|(time, _)| *time).map_or("", |(_, cause)| cause)
}

fn shown(warning: &Warning) -> Markup {
    html! { section.warn { h2 { (warning.what) } p { (warning.advice) } } }
}

fn card(ink: Ink, name: &str, value: &str, note: &str) -> Markup {
    html! {
        div.card style=(format!("--ink:{}", ink.var())) {
            span.quiet { (name) }
            b { (value) }
            span.quiet { (note) }
        }
    }
}

fn key(ink: Ink, name: &str) -> Markup {
    html! { span { i.key style=(format!("--ink:{}", ink.var())) {} (name) } }
}
