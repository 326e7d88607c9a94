//! A training loop on the GPU, with saves or without, in blocks that all begin in the same state.

use super::state::State;
use crate::bench::PATIENCE;
use crate::gpu::{Event, Graph, Span, Stream, allocate, timed};
use ashore::{CheckpointExecutor, Committed, Error, ErrorKind, Result};
use std::time::Instant;

/// How many steps the host may be ahead of the GPU.
const AHEAD: usize = 2;
/// Minimum steps of a block.
const STEPS_MIN: u64 = 20;

/// The training loop.
pub struct Training<'a> {
    executor: &'a CheckpointExecutor,
    pub state: &'a State,
    pub stream: Stream,
    out: Span,
    /// Rounds of the compute kernel.
    rounds: u64,
    graphs: Option<[Graph; 2]>,
    pub every: u64,
    pub steps: u64,
    saves: u64,
}

/// A number of steps, and their times by events.
pub struct Block {
    pub seconds: f64,
    pub steps: Vec<f64>,
    pub saves: Vec<Saved>,
}

/// A save, and its cost for the training thread.
pub struct Saved {
    /// The library's step, different for every save.
    pub number: u64,
    /// The number of steps before it in its block.
    pub after: u64,
    pub called: Instant,
    /// Seconds spent making the state dict, in `save`, and in the next `fence_on`.
    pub dict: f64,
    pub save: f64,
    pub fence: f64,
    pub committed: Committed,
}

/// Returns the number of steps of a block: a multiple of the interval.
pub fn steps(every: u64) -> u64 {
    STEPS_MIN.div_ceil(every) * every
}

/// Returns the steps of a block that saves precede: half an interval from its ends, so that their cost falls
/// within it.
pub fn save_points(every: u64) -> impl Iterator<Item = u64> {
    (0..steps(every)).filter(move |step| step % every == every / 2)
}

impl<'a> Training<'a> {
    /// Calibrates the compute kernel so that a step takes about `seconds`.
    pub fn new(
        executor: &'a CheckpointExecutor,
        state: &'a State,
        stream: &Stream,
        every: u64,
        seconds: f64,
        graph: bool,
    ) -> Result<Self> {
        let out = allocate(stream, 4)?;
        let (stream, steps) = (stream.clone(), steps(every));
        let mut training = Self { executor, state, stream, out, rounds: 1, graphs: None, every, steps, saves: 0 };
        training.state.reset(&training.stream)?;
        training.optimize(0)?;
        training.rounds = training.rounds_in(seconds - timed(&training.stream.clone(), || training.optimize(1))?)?;
        if graph {
            let Self { stream, state, .. } = &training;
            let compute = stream.capture(vec![training.out.clone()], || training.compute())?;
            let update = stream.capture(state.spans(), || state.update(stream))?;
            training.graphs = Some([compute, update]);
        }
        Ok(training)
    }

    fn optimize(&self, step: u64) -> Result<()> {
        self.state.feed(&self.stream, step)?;
        self.state.update(&self.stream)
    }

    /// Returns how many rounds of the compute kernel take `seconds`.
    fn rounds_in(&self, seconds: f64) -> Result<u64> {
        if self.stream.gpu().simulated() {
            return Ok(1);
        }
        let mut rounds = 10_000;
        for _ in 0..3 {
            let took = timed(&self.stream, || self.stream.busy(&self.out, rounds))?;
            rounds = ((rounds as f64 * seconds / took) as u64).clamp(1, 1 << 40);
        }
        Ok(rounds)
    }

    fn compute(&self) -> Result<()> {
        self.stream.busy(&self.out, self.rounds)
    }

    /// Queues computation for `seconds`, estimated from the length of a step.
    pub fn compute_for(&self, seconds: f64, step_seconds: f64) -> Result<()> {
        let times = (seconds / step_seconds).clamp(0.01, 1e4);
        self.stream.busy(&self.out, (self.rounds as f64 * times) as u64 + 1)
    }

    /// Saves the current state, `after` steps.
    pub fn save(&mut self, after: u64) -> Result<Pending> {
        self.saves += 1;
        save(self.executor, self.state, self.saves, after)
    }

    /// Trains a block from the initial state.
    pub fn block(&mut self, saving: bool) -> Result<Block> {
        let events: Vec<Event> = (0..=self.steps).map(|_| Event::new(self.stream.gpu())).collect::<Result<_>>()?;
        self.state.reset(&self.stream)?;
        self.stream.wait()?;
        let mut pending: Vec<Pending> = Vec::new();
        for step in 0..self.steps {
            events[step as usize].record(&self.stream)?;
            if let Some(before) = (step as usize).checked_sub(AHEAD) {
                events[before].wait()?;
            }
            let saves = saving && step % self.every == self.every / 2;
            if saves {
                pending.push(self.save(step)?);
            }
            self.state.feed(&self.stream, step)?;
            match &self.graphs {
                None => self.compute()?,
                Some([compute, _]) => compute.replay()?,
            }
            let began = Instant::now();
            self.executor.fence_on(&[self.stream.device_stream()])?;
            if let (true, Some(pending)) = (saves, pending.last_mut()) {
                pending.fence = began.elapsed().as_secs_f64();
            }
            match &self.graphs {
                None => self.state.update(&self.stream)?,
                Some([_, update]) => update.replay()?,
            }
        }
        let last = &events[self.steps as usize];
        last.record(&self.stream)?;
        last.wait()?;
        let steps = events.windows(2).map(|pair| pair[1].since(&pair[0])).collect::<Result<_>>()?;
        let saves = pending.into_iter().map(Pending::ended).collect::<Result<_>>()?;
        Ok(Block { seconds: last.since(&events[0])?, steps, saves })
    }
}

/// Saves the current state as step `number`, `after` steps.
pub fn save(executor: &CheckpointExecutor, state: &State, number: u64, after: u64) -> Result<Pending> {
    let began = Instant::now();
    let dict = state.dict()?;
    let called = Instant::now();
    let save = executor.save(number, dict)?;
    let took = called.elapsed().as_secs_f64();
    Ok(Pending { save, number, after, called, dict: (called - began).as_secs_f64(), took, fence: 0.0 })
}

/// A save in progress.
pub struct Pending {
    save: ashore::Save,
    number: u64,
    after: u64,
    called: Instant,
    dict: f64,
    took: f64,
    fence: f64,
}

impl Pending {
    /// Waits until it ends.
    pub fn ended(self) -> Result<Saved> {
        let Self { save, number, after, called, dict, took, fence } = self;
        let skipped = || Error::new(ErrorKind::Internal, "a save was skipped").with_step(number);
        let committed = save.wait(PATIENCE)?.committed().ok_or_else(skipped)?;
        Ok(Saved { number, after, called, dict, save: took, fence, committed })
    }
}
