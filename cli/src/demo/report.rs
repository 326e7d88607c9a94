//! The demo's output, as text and as JSON.

use super::blocks::Block;
use super::{Proof, Trained};
use crate::device::Home;
use crate::limit::Limit;
use crate::out::{self, median, ms, quantile};
use crate::size;
use crate::words::{counted, grouped};
use ashore::IoMode;
use serde_json::{Value, json};
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// The facts that are known before training begins.
pub struct Opening<'a> {
    pub root: &'a Path,
    pub home: &'a Home,
    pub arena: u64,
    pub chunk: u64,
    pub bytes: u64,
    pub parameters: u64,
    pub start: u64,
    pub goal: u64,
    pub every: u64,
    pub resumed: bool,
}

/// The times measured during training.
#[derive(Default)]
pub struct Measured {
    /// Steps, and their time without and with saves: full blocks after the first.
    pairs: Vec<Pair>,
    /// Other blocks with a save, used if there are no full ones.
    short: Vec<Pair>,
    warm: bool,
    pub limits: Vec<Limit>,
}

#[derive(Clone, Copy)]
struct Pair {
    steps: u64,
    without: Duration,
    with: Duration,
}

/// The final report.
pub struct Report<'a> {
    pub opening: Opening<'a>,
    pub trained: Trained,
    pub proof: Proof,
}

impl Measured {
    /// Records a block that was trained both ways.
    pub fn pair(&mut self, block: &Block, without: Duration, with: Duration, full: u64) {
        let pair = Pair { steps: block.len(), without, with };
        if std::mem::replace(&mut self.warm, true) {
            if block.len() == full { self.pairs.push(pair) } else { self.short.push(pair) }
        }
    }

    fn pairs(&self) -> &[Pair] {
        if self.pairs.is_empty() { &self.short } else { &self.pairs }
    }

    fn step_ms(&self, time: impl Fn(&Pair) -> Duration) -> f64 {
        median(self.pairs().iter().map(|pair| ms(time(pair)) / pair.steps as f64))
    }

    /// Returns the median cost of saves, as a fraction of the time of a step without saves.
    fn overhead(&self) -> f64 {
        median(self.overheads())
    }

    /// Returns the distance of the middle half of the pairs from their median; for few pairs, the distance of
    /// any pair.
    fn noise(&self) -> f64 {
        let q = if self.pairs().len() < 4 { 0.0 } else { 0.25 };
        let (low, high) = (quantile(self.overheads(), q), quantile(self.overheads(), 1.0 - q));
        (high - self.overhead()).max(self.overhead() - low)
    }

    fn overheads(&self) -> impl Iterator<Item = f64> + Clone {
        self.pairs().iter().map(|pair| pair.with.as_secs_f64() / pair.without.as_secs_f64() - 1.0)
    }
}

impl Report<'_> {
    /// True if every check succeeded.
    pub fn verified(&self) -> bool {
        let Proof { bytes_equal, curve_continues, recomputed, .. } = self.proof;
        bytes_equal && curve_continues && recomputed != Some(false) && self.trained.undisturbed
    }

    /// Returns the last line.
    pub fn verdict(&self) -> String {
        format!("\n{}\n", if self.verified() { "verified" } else { "NOT VERIFIED" })
    }

    /// Returns the JSON object that `--json` prints.
    pub fn json(&self) -> Value {
        let last_loss = self.trained.curve.last().copied();
        let step_ms = |time: fn(&Pair) -> Duration| self.opening.timed(self.trained.measured.step_ms(time));
        json!({
            "steps": self.opening.goal,
            "saves": self.trained.saves.len(),
            "bytes": self.opening.bytes,
            "step_ms_without": step_ms(|pair| pair.without),
            "step_ms_with": step_ms(|pair| pair.with),
            "overhead_fraction": self.opening.timed(median(self.trained.measured.overheads())),
            "noise_fraction": self.opening.timed(self.trained.measured.noise()),
            "blocked_ms_p50": self.opening.timed(self.trained.blocked(0.5)),
            "blocked_ms_p99": self.opening.timed(self.trained.blocked(0.99)),
            "restored_step": self.proof.restored,
            "verified": self.verified(),
            "bytes_equal": self.proof.bytes_equal,
            "curve_continues": self.proof.curve_continues,
            "recomputed": self.proof.recomputed,
            "undisturbed": self.trained.undisturbed,
            "resumed_from": self.opening.resumed.then_some(self.opening.start),
            "trained_steps": self.trained.curve.len(),
            "measured_blocks": self.trained.measured.pairs().len(),
            "final_loss": last_loss,
            "final_loss_bits": last_loss.map(f32::to_bits),
            "durable_ms_p50": self.opening.timed(self.trained.durable_ms()),
            "durable_bytes_per_second": self.opening.timed(self.trained.durable_rate()),
            "disk_limit_bytes_per_second": self.opening.timed(self.trained.limit_rate()),
            "restore_ms": self.opening.timed(ms(self.proof.restored_in)),
            "io": self.trained.mode(),
            "device": self.opening.home.to_string(),
            "simulated": self.opening.home.simulated(),
            "arena": self.opening.arena,
            "chunk": self.opening.chunk,
            "path": self.proof.path.display().to_string(),
        })
    }
}

impl Trained {
    fn blocked(&self, q: f64) -> f64 {
        quantile(self.saves.iter().map(|save| ms(save.blocked)), q)
    }

    fn durable_ms(&self) -> f64 {
        median(self.saves.iter().map(|save| ms(save.committed.durable)))
    }

    fn durable_rate(&self) -> f64 {
        median(self.saves.iter().map(|save| save.committed.bytes as f64 / save.committed.durable.as_secs_f64()))
    }

    fn limit_rate(&self) -> f64 {
        median(self.measured.limits.iter().map(Limit::bytes_per_second))
    }

    fn mode(&self) -> Option<IoMode> {
        self.saves.last().map(|save| save.committed.mode)
    }

    /// Formats the measurements.
    fn figures(&self, bytes: u64) -> String {
        let Measured { limits, .. } = &self.measured;
        let (without, with) = (self.measured.step_ms(|pair| pair.without), self.measured.step_ms(|pair| pair.with));
        let (n, steps) = (self.measured.pairs().len(), self.measured.pairs().first().map_or(0, |pair| pair.steps));
        let mut text = line(
            "a step",
            &format!(
                "{without:.2} ms without saves; {with:.2} ms with, including the wait until the last byte is durable"
            ),
        );
        let pairs = format!("{n} pairs of blocks of {steps} steps, alternating with saves and without");
        text +=
            &line("cost", &format!("{}; medians of {pairs}", cost(self.measured.overhead(), self.measured.noise())));
        let (p50, p99) = (self.blocked(0.5), self.blocked(0.99));
        text += &line(
            "stall",
            &format!("p50 {p50:.2} ms, p99 {p99:.2} ms a save: building the state dict, `save` and the fences"),
        );
        let mode = match self.mode() {
            Some(IoMode::Direct) => "direct I/O",
            _ => "through the page cache",
        };
        let (saves, durable) = (counted(self.saves.len(), "save"), self.durable_ms());
        text += &line("saves", &format!("{saves} of {}, durable after {durable:.1} ms, {mode}", size::shown(bytes)));
        let rate = |rate: f64| size::shown(rate as u64) + "/s";
        let loops = counted(limits.len(), "loop");
        text += &line(
            "rate",
            &format!("{} while training; the disk's limit is {}", rate(self.durable_rate()), rate(self.limit_rate())),
        );
        text += &line(
            "",
            &format!(
                "(medians; the limit is that of {loops} of bare writes and one fsync, of the same bytes and chunks, \
                 with no training beside)"
            ),
        );
        text
    }
}

/// Describes the cost of saves per step, if it can be told from noise: `no cost visible within +-15 %`.
fn cost(overhead: f64, noise: f64) -> String {
    // Saving cannot make training faster: a negative cost is noise, too.
    let noise = noise.max(-overhead);
    if overhead <= noise {
        format!("no cost visible within \u{b1}{:.1} %, the noise of this measurement", 100.0 * noise)
    } else {
        format!("{:.1} % of a step, \u{b1}{:.1} %", 100.0 * overhead, 100.0 * noise)
    }
}

/// Formats one item after its name, at the width of the screen.
fn line(name: &str, text: &str) -> String {
    out::wrapped(&format!("{name:<11}"), text)
}

/// Formats the result of a check.
pub fn tick(held: bool, what: &str) -> String {
    out::wrapped(if held { "[x] " } else { "[ ] FAILED " }, what)
}

impl Opening<'_> {
    /// Returns a time or a figure from times, or None if times mean nothing.
    fn timed(&self, figure: f64) -> Option<f64> {
        (!self.home.simulated()).then_some(figure)
    }

    /// Formats the training and its measurements.
    pub fn trained(&self, trained: &Trained) -> String {
        let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len().max(1) as f32;
        let end = trained.curve.len().min(10);
        let (first, last) = (mean(&trained.curve[..end]), mean(&trained.curve[trained.curve.len() - end..]));
        let mut text =
            line("loss", &format!("{first:.3} -> {last:.3} (means of the first and last {end} steps)")) + "\n";
        text += &if self.home.simulated() {
            let saves = counted(trained.saves.len(), "save");
            line("saves", &format!("{saves}; times are omitted: the driver is simulated"))
        } else {
            trained.figures(self.bytes)
        };
        text + "\n"
    }

    /// Formats the step that was restored.
    pub fn restored(&self, step: u64, time: Duration, path: &Path) -> String {
        let time = self.timed(ms(time)).map_or_else(String::new, |ms| format!(" in {ms:.1} ms"));
        let path =
            path.file_name().map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned());
        line("restored", &format!("step {step}{time}, from {}", out::printable(&path)))
    }
}

impl fmt::Display for Opening<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, parameters, start, goal, every, arena, chunk, .. } = self;
        let (chunks, times) = (bytes.div_ceil(*chunk), *bytes as f64 / *arena as f64);
        let (state, arena, chunk) = (size::shown(*bytes), size::exact(*arena), size::exact(*chunk));
        let parameters = grouped(*parameters);
        let from = match self.resumed {
            true => format!("resumed from step {start}, the newest durable one"),
            false => "from the beginning".to_owned(),
        };
        f.write_str(&line("model", &format!("{parameters} parameters; with the AdamW moments a state of {state}")))?;
        f.write_str(&line("device", &self.home.told()))?;
        let chunks = format!("the state is {chunks} chunks, {times:.1} times the arena");
        f.write_str(&line("arena", &format!("{arena} in chunks of {chunk}; {chunks}")))?;
        let root = out::printable(&self.root.display().to_string());
        f.write_str(&line("directory", &format!("{root} (the newest two checkpoints are kept)")))?;
        f.write_str(&line("training", &format!("{from}, to step {goal}; a save every {every} steps and at the end")))?;
        f.write_str("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_is_never_negative_and_never_below_the_noise() {
        assert_eq!(cost(-0.068, 0.15), "no cost visible within \u{b1}15.0 %, the noise of this measurement");
        assert_eq!(cost(-0.2, 0.01), "no cost visible within \u{b1}20.0 %, the noise of this measurement");
        assert_eq!(cost(0.05, 0.01), "5.0 % of a step, \u{b1}1.0 %");
    }
}
