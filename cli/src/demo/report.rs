//! The demo's output, as text and as JSON.

use super::blocks::Block;
use super::{Proof, Trained};
use crate::device::Home;
use crate::limit::Limit;
use crate::out::{median, ms, quantile};
use crate::size;
use ashore::IoMode;
use serde_json::{Value, json};
use std::fmt;
use std::path::Path;
use std::time::Duration;

/// What is known before training begins.
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

/// What was timed during training.
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

    fn blocked(&self, q: f64) -> f64 {
        quantile(self.trained.saves.iter().map(|save| ms(save.blocked)), q)
    }

    fn durable_ms(&self) -> f64 {
        median(self.trained.saves.iter().map(|save| ms(save.committed.durable)))
    }

    fn durable_rate(&self) -> f64 {
        median(self.trained.saves.iter().map(|save| save.committed.bytes as f64 / save.committed.durable.as_secs_f64()))
    }

    fn limit_rate(&self) -> f64 {
        median(self.trained.measured.limits.iter().map(Limit::bytes_per_second))
    }

    fn mode(&self) -> Option<IoMode> {
        self.trained.saves.last().map(|save| save.committed.mode)
    }

    /// Writes the measured figures.
    fn figures(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (without, with) =
            (self.trained.measured.step_ms(|pair| pair.without), self.trained.measured.step_ms(|pair| pair.with));
        let percent = |q: f64| 100.0 * quantile(self.trained.measured.overheads(), q);
        let n = self.trained.measured.pairs().len();
        let steps = self.trained.measured.pairs().first().map_or(0, |pair| pair.steps);
        writeln!(f, "step without checkpointing   {without:.2} ms")?;
        writeln!(f, "step with checkpointing      {with:.2} ms, including the wait until the last byte is durable")?;
        writeln!(
            f,
            "overhead                     {:+.1} % (quartiles {:+.1} % and {:+.1} %)",
            percent(0.5),
            percent(0.25),
            percent(0.75)
        )?;
        writeln!(f, "    medians of {n} pairs of blocks of {steps} steps, alternating with saves and without")?;
        writeln!(f, "stall per save               p50 {:.2} ms, p99 {:.2} ms", self.blocked(0.5), self.blocked(0.99))?;
        writeln!(f, "    all waiting time of training: building the state dict, `save` and the fences\n")?;

        let (rate, limit) = (self.durable_rate(), self.limit_rate());
        let (saves, bytes) = (self.trained.saves.len(), size::shown(self.opening.bytes));
        let mode = match self.mode() {
            Some(IoMode::Direct) => "direct I/O",
            _ => "through the page cache",
        };
        writeln!(
            f,
            "saves                        {saves} of {bytes}, durable after {:.1} ms, {mode}",
            self.durable_ms()
        )?;
        writeln!(f, "rate                         {:.2} GB/s while training", rate / 1e9)?;
        writeln!(
            f,
            "the disk's limit             {:.2} GB/s: a bare loop of writes and one fsync, with no training beside it",
            limit / 1e9
        )?;
        writeln!(
            f,
            "    medians; the same bytes and chunks, {} loops between the blocks\n",
            self.trained.measured.limits.len()
        )
    }

    /// Returns a time or a figure from times, or None if times mean nothing.
    fn timed(&self, figure: f64) -> Option<f64> {
        (!self.opening.home.simulated()).then_some(figure)
    }

    /// Returns the JSON object that `--json` prints.
    pub fn json(&self) -> Value {
        let last_loss = self.trained.curve.last().copied();
        let step_ms = |time: fn(&Pair) -> Duration| self.timed(self.trained.measured.step_ms(time));
        json!({
            "steps": self.opening.goal,
            "saves": self.trained.saves.len(),
            "bytes": self.opening.bytes,
            "step_ms_without": step_ms(|pair| pair.without),
            "step_ms_with": step_ms(|pair| pair.with),
            "overhead_fraction": self.timed(median(self.trained.measured.overheads())),
            "blocked_ms_p50": self.timed(self.blocked(0.5)),
            "blocked_ms_p99": self.timed(self.blocked(0.99)),
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
            "durable_ms_p50": self.timed(self.durable_ms()),
            "durable_bytes_per_second": self.timed(self.durable_rate()),
            "disk_limit_bytes_per_second": self.timed(self.limit_rate()),
            "restore_ms": self.timed(ms(self.proof.restored_in)),
            "io": self.mode(),
            "device": self.opening.home.to_string(),
            "simulated": self.opening.home.simulated(),
            "arena": self.opening.arena,
            "chunk": self.opening.chunk,
            "path": self.proof.path.display().to_string(),
        })
    }
}

impl fmt::Display for Opening<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, parameters, start, goal, every, arena, chunk, .. } = self;
        let (chunks, times) = (bytes.div_ceil(*chunk), *bytes as f64 / *arena as f64);
        let (state, arena, chunk) = (size::shown(*bytes), size::exact(*arena), size::exact(*chunk));
        writeln!(f, "model      {parameters} parameters; with the AdamW moments a state of {state}")?;
        writeln!(f, "device     {}", self.home)?;
        writeln!(
            f,
            "arena      {arena} in chunks of {chunk}; the state is {chunks} chunks, {times:.1} times the arena"
        )?;
        writeln!(f, "directory  {} (the newest two checkpoints are kept)", self.root.display())?;
        let from = match self.resumed {
            true => format!("resumed from step {start}, the newest durable one"),
            false => "from the beginning".to_owned(),
        };
        writeln!(f, "training   {from}, to step {goal}; a save every {every} steps and at the end\n")
    }
}

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len().max(1) as f32;
        let end = self.trained.curve.len().min(10);
        let (first, last) =
            (mean(&self.trained.curve[..end]), mean(&self.trained.curve[self.trained.curve.len() - end..]));
        writeln!(
            f,
            "loss                         {first:.3} -> {last:.3} (means of the first and last {end} steps)\n"
        )?;

        if self.opening.home.simulated() {
            writeln!(
                f,
                "saves                        {}; times are omitted: the driver is simulated\n",
                self.trained.saves.len()
            )?;
        } else {
            self.figures(f)?;
        }

        let says = |held: bool| if held { "yes" } else { "NO" };
        writeln!(
            f,
            "restored                     step {}{}, from {}",
            self.proof.restored,
            self.timed(ms(self.proof.restored_in)).map_or_else(String::new, |ms| format!(" in {ms:.1} ms")),
            self.proof.path.display()
        )?;
        writeln!(f, "restored bytes identical     {}", says(self.proof.bytes_equal))?;
        if let Some(recomputed) = self.proof.recomputed {
            let said = "all steps repeated without the GPU give the same state";
            writeln!(f, "recomputed on the host       {} ({said})", says(recomputed))?;
        }
        writeln!(
            f,
            "training continues the same  {} ({} steps from the restored state, losses and state bit for bit)",
            says(self.proof.curve_continues),
            self.proof.steps
        )?;
        writeln!(
            f,
            "saving changed nothing       {} (the twin that never saved has the same losses and state)",
            says(self.trained.undisturbed)
        )?;
        writeln!(f, "\n{}", if self.verified() { "verified" } else { "NOT VERIFIED" })
    }
}
