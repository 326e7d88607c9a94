//! The training loop with checkpoints, as a user would write it, and the same loop without checkpoints.

use super::PATIENCE;
use super::resident::Resident;
use super::text::Corpus;
use super::training::{Gradients, Training};
use crate::gpu::Gpu;
use ashore::{CheckpointExecutor, Committed, Error, ErrorKind, Result, StateDict};
use indicatif::ProgressBar;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A model that trains: on the host, or with its state and optimizer on a GPU.
pub struct Trainer<'a> {
    training: Training,
    gradients: Gradients,
    resident: Option<Resident>,
    corpus: &'a Corpus,
    threads: usize,
}

impl<'a> Trainer<'a> {
    /// # Errors
    /// `Device`, of a GPU.
    pub fn new(training: Training, gpu: Option<&Arc<Gpu>>, corpus: &'a Corpus, threads: usize) -> Result<Self> {
        let resident = gpu.map(|gpu| Resident::new(gpu, &training)).transpose()?;
        Ok(Self { gradients: training.gradients(), training, resident, corpus, threads })
    }

    /// Returns a trainer of `training` on the host.
    pub fn on_host(&self, training: Training) -> Self {
        let gradients = training.gradients();
        Self { training, gradients, resident: None, corpus: self.corpus, threads: self.threads }
    }

    /// Trains up to the step `to` without saves. Returns the losses.
    pub fn advance(&mut self, to: u64) -> Result<Vec<f32>> {
        let mut losses = Vec::new();
        while self.training.step < to {
            losses.push(self.compute());
            self.update()?;
        }
        Ok(losses)
    }

    /// Returns a copy of the complete training, on the host.
    pub fn settled(&mut self) -> Result<Training> {
        if let Some(resident) = &mut self.resident {
            resident.settle(&mut self.training)?;
        }
        Ok(self.training.copied())
    }

    /// Returns the training; on a GPU, its moments are old.
    pub fn training(&self) -> &Training {
        &self.training
    }

    fn compute(&mut self) -> f32 {
        self.training.compute(self.corpus, &mut self.gradients, self.threads);
        self.gradients.loss
    }

    fn update(&mut self) -> Result<()> {
        match &mut self.resident {
            None => self.training.update(&self.gradients, self.threads),
            Some(resident) => resident.update(&mut self.training, &self.gradients),
        }
    }

    fn state(&self) -> Result<StateDict<'static>> {
        match &self.resident {
            None => self.training.state(),
            Some(resident) => resident.state(&self.training),
        }
    }

    fn fence(&self, executor: &CheckpointExecutor) -> Result<()> {
        match &self.resident {
            None => executor.fence(),
            Some(resident) => executor.fence_on(&[resident.stream().device_stream()]),
        }
    }
}

/// A model that trains and saves.
pub struct Run<'a> {
    pub trainer: Trainer<'a>,
    /// Every save so far.
    pub saved: Vec<Saved>,
    /// The blocks, one for each call of `advance`, for the picture.
    pub blocks: Vec<Block>,
    executor: &'a CheckpointExecutor,
    /// True when the step `start` was restored.
    resumed: bool,
    start: u64,
    every: u64,
    goal: u64,
}

/// A save, and how long it blocked training: building the state dict, `save`, and the fences until the next
/// save.
pub struct Saved {
    pub blocked: Duration,
    pub committed: Committed,
}

/// The activity of the training thread in a part of a step.
#[derive(Clone, Copy)]
pub enum Activity {
    Compute,
    Update,
    Save,
    Fence,
}

/// A part of a step, in times from the start of its block.
pub struct Part {
    pub activity: Activity,
    pub from: Duration,
    pub to: Duration,
}

/// One call of `advance`: its steps, and the first save in it.
pub struct Block {
    began: Instant,
    pub parts: Vec<Part>,
    pub save: Option<BlockSave>,
}

/// A save of a block. Its call is timed from the start of the block.
pub struct BlockSave {
    pub called: Duration,
    pub committed: Committed,
}

impl Block {
    /// Runs a part of a step and records it.
    fn part<T>(&mut self, activity: Activity, run: impl FnOnce() -> T) -> T {
        let from = self.began.elapsed();
        let result = run();
        self.parts.push(Part { activity, from, to: self.began.elapsed() });
        result
    }
}

impl<'a> Run<'a> {
    pub fn new(executor: &'a CheckpointExecutor, trainer: Trainer<'a>, every: u64, goal: u64) -> Self {
        let (start, resumed) = (trainer.training.step, trainer.training.step > 0);
        Self { trainer, saved: Vec::new(), blocks: Vec::new(), executor, resumed, start, every, goal }
    }

    /// Returns the number of threads that write.
    pub fn writers(&self) -> usize {
        self.executor.settings().writers
    }

    /// Trains up to the step `to`. Returns the losses, and the time until the last save in it was durable.
    pub fn advance(&mut self, to: u64, bar: &ProgressBar) -> Result<(Vec<f32>, Duration)> {
        let mut block = Block { began: Instant::now(), parts: Vec::new(), save: None };
        let mut losses = Vec::new();
        let mut in_flight = Vec::new();
        while self.trainer.training.step < to {
            let step = self.trainer.training.step;
            if step > self.start && step <= self.goal && (step.is_multiple_of(self.every) || step == self.goal) {
                let called = block.began.elapsed();
                let save = block.part(Activity::Save, || self.executor.save(step, self.trainer.state()?))?;
                in_flight.push((save, called, block.began.elapsed() - called));
            }
            let loss = block.part(Activity::Compute, || self.trainer.compute());
            let called = Instant::now();
            block.part(Activity::Fence, || self.trainer.fence(self.executor))?;
            if let Some((_, _, blocked)) = in_flight.last_mut() {
                *blocked += called.elapsed();
            }
            block.part(Activity::Update, || self.trainer.update())?;
            losses.push(loss);
            let durable = match self.saved.last() {
                Some(saved) => format!("step {} is durable", saved.committed.step),
                None if self.resumed => format!("step {} is durable", self.start),
                None => "nothing durable yet".to_owned(),
            };
            bar.set_message(format!("loss {loss:.3}, {durable}"));
            bar.set_position((step + 1).min(self.goal));
        }
        for (save, called, blocked) in in_flight {
            let skipped = || Error::new(ErrorKind::Internal, "a save was skipped").with_step(save.step());
            let committed = save.wait(PATIENCE)?.committed().ok_or_else(skipped)?;
            block.save.get_or_insert(BlockSave { called, committed: committed.clone() });
            self.saved.push(Saved { blocked, committed });
        }
        let time = block.began.elapsed();
        self.blocks.push(block);
        Ok((losses, time))
    }
}
