//! `ashore bench staging`: copies and digests a state into the arena, beside one plain copy of it.

use super::pairs::{self, Turn};
use super::usage::{Cpu, per_gb};
use super::{Bench, Figures, PATIENCE, null};
use crate::limit::Memory;
use crate::out::median;
use ashore::{Error, ErrorKind, Result};
use std::sync::Arc;
use std::time::Instant;

pub fn run(bench: &Bench<'_>) -> Result<Figures> {
    let state = bench.state();
    let executor = bench.builder().storage(Arc::new(null::Sink::default())).build()?;
    let mut memory = Memory::new(executor.arena().report().bytes);
    let (mut step, mut staged, mut cpu) = (0, Vec::new(), Vec::new());
    let mut sample = |turn| {
        if turn == Turn::Limit {
            let began = Instant::now();
            memory.copy_all(state.tensors().map(|(_, bytes)| bytes));
            return Ok(began.elapsed().as_secs_f64());
        }
        step += 1;
        let dict = state.dict()?;
        let before = Cpu::now();
        let Some(committed) = executor.save(step, dict)?.wait(PATIENCE)?.committed() else {
            return Err(Error::new(ErrorKind::Internal, "a save was skipped"));
        };
        cpu.push(per_gb(Cpu::now().since(before).stage, state.bytes));
        staged.push(committed.staged.as_secs_f64());
        Ok(committed.staged.as_secs_f64())
    };
    sample(Turn::Ours)?;
    sample(Turn::Limit)?;
    let pairs = pairs::run(bench.args.rounds, bench.seed(), sample)?;
    let arena = executor.arena().report().bytes;
    executor.shutdown(PATIENCE)?;
    let estimate = pairs.estimate();
    let (quiet, loud) = pairs.noise();
    let seconds = median(staged);
    Ok(Figures(vec![
        ("workload", bench.args.workload.name().into()),
        ("tensors", state.len().into()),
        ("bytes", state.bytes.into()),
        ("rounds", pairs.ratios.len().into()),
        ("verdict", pairs.verdict().into()),
        ("staged_seconds", seconds.into()),
        ("staged_bytes_per_second", (state.bytes as f64 / seconds).into()),
        ("fraction_of_copy", estimate.median.into()),
        ("fraction_low", estimate.low.into()),
        ("fraction_high", estimate.high.into()),
        ("noise_low", quiet.into()),
        ("noise_high", loud.into()),
        ("stage_cpu_seconds_per_gb", median(cpu).into()),
        ("arena_bytes", arena.into()),
    ]))
}
