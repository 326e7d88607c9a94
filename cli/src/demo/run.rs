//! The training loop with checkpointing on, as a user would write it, and the same without.

use super::PATIENCE;
use super::text::Corpus;
use super::training::{Gradients, Training};
use ashore::{CheckpointExecutor, Committed, Error, ErrorKind, Result};
use indicatif::ProgressBar;
use std::time::{Duration, Instant};

/// A model that trains and saves.
pub struct Run<'a> {
    pub training: Training,
    /// Every save so far.
    pub saved: Vec<Saved>,
    executor: &'a CheckpointExecutor,
    corpus: &'a Corpus,
    threads: usize,
    gradients: Gradients,
    start: u64,
    every: u64,
    goal: u64,
}

/// A save and how long it held up training: building the state dict, `save`, and the fences until the next save.
pub struct Saved {
    pub blocked: Duration,
    pub committed: Committed,
}

impl<'a> Run<'a> {
    pub fn new(
        executor: &'a CheckpointExecutor,
        corpus: &'a Corpus,
        threads: usize,
        training: Training,
        every: u64,
        goal: u64,
    ) -> Self {
        let (gradients, start) = (training.gradients(), training.step);
        Self { training, saved: Vec::new(), executor, corpus, threads, gradients, start, every, goal }
    }

    /// How many threads write.
    pub fn writers(&self) -> usize {
        self.executor.settings().writers
    }

    /// Trains up to the step `to`. Gives the losses, and the time until the last save in it was durable.
    pub fn advance(&mut self, to: u64, bar: &ProgressBar) -> Result<(Vec<f32>, Duration)> {
        let began = Instant::now();
        let mut losses = Vec::new();
        let mut flights = Vec::new();
        while self.training.step < to {
            let step = self.training.step;
            if step > self.start && step <= self.goal && (step.is_multiple_of(self.every) || step == self.goal) {
                let called = Instant::now();
                let save = self.executor.save(step, self.training.state()?)?;
                flights.push((save, called.elapsed()));
            }
            self.training.compute(self.corpus, &mut self.gradients, self.threads);
            let called = Instant::now();
            self.executor.fence()?;
            if let Some((_, blocked)) = flights.last_mut() {
                *blocked += called.elapsed();
            }
            self.training.update(&self.gradients, self.threads)?;
            losses.push(self.gradients.loss);
            let durable = self.saved.last().map_or(self.start, |saved| saved.committed.step);
            bar.set_message(format!("loss {:.3}, durable up to step {durable}", self.gradients.loss));
            bar.set_position(self.training.step.min(self.goal));
        }
        for (save, blocked) in flights {
            let skipped = || Error::new(ErrorKind::Internal, "a save was skipped").with_step(save.step());
            let committed = save.wait(PATIENCE)?.committed().ok_or_else(skipped)?;
            self.saved.push(Saved { blocked, committed });
        }
        Ok((losses, began.elapsed()))
    }
}

/// A model that trains without saves.
pub struct Twin<'a> {
    pub training: Training,
    pub gradients: Gradients,
    pub corpus: &'a Corpus,
    pub threads: usize,
}

impl Twin<'_> {
    /// Trains up to the step `to`. Gives the losses.
    pub fn advance(&mut self, to: u64) -> Result<Vec<f32>> {
        let mut losses = Vec::new();
        while self.training.step < to {
            self.training.compute(self.corpus, &mut self.gradients, self.threads);
            self.training.update(&self.gradients, self.threads)?;
            losses.push(self.gradients.loss);
        }
        Ok(losses)
    }
}
