//! `ashore bench restore`: complete restores with every byte checked, beside a bare loop over the same files.
//!
//! The position of a file on a disk changes its read speed by more than half. So restore and loop read the
//! same files in turn. The benchmark saves several steps, which take turns, too.

use super::pairs::{self, Turn};
use super::usage::{Cpu, Peak, per_gb};
use super::{Bench, Figures, PATIENCE};
use crate::limit::{self, Existing, Limit, Memory};
use crate::out::median;
use ashore::{Checkpoint, Error, ErrorKind, Result, Targets};
use std::time::Instant;

/// The number of steps that take turns.
const SETS: u64 = 3;

pub fn run(bench: &Bench<'_>) -> Result<Figures> {
    let state = bench.state();
    let mut memory = Memory::ample();
    let executor = bench.builder().build()?;
    let (mut steps, mut files) = (Vec::new(), Vec::new());
    for step in 1..=SETS {
        let committed = executor.save(step, state.dict()?)?.wait(PATIENCE)?.committed();
        let skipped = || Error::new(ErrorKind::Internal, "a save was skipped");
        let path = committed.map(|c| c.path).ok_or_else(skipped)?;
        files.push(Existing::shards(&path)?);
        steps.push(path);
    }
    executor.shutdown(PATIENCE)?;
    let found = limit::search_existing(&files, state.bytes, &mut memory)?;
    let config = found.first().map(|found| found.config).ok_or_else(|| Error::new(ErrorKind::Internal, "no loop"))?;

    let mut targets: Vec<(&str, Vec<u8>)> = state.tensors().map(|(name, bytes)| (name, vec![1; bytes.len()])).collect();
    let peak = Peak::watch();
    let (mut limits, mut seconds, mut opened, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut turns = 0..;
    let mut sample = |turn| {
        // Both measurements of a pair are of the same step.
        let set = turns.next().unwrap_or(0) / 2 % steps.len();
        if turn == Turn::Limit {
            let limit = files[set].read(&config, &mut memory)?;
            limits.push(limit);
            return Ok(limit.time.as_secs_f64());
        }
        let before = Cpu::now();
        let began = Instant::now();
        let checkpoint = Checkpoint::open(&steps[set])?;
        opened.push(began.elapsed().as_secs_f64());
        checkpoint.read_into(targets.iter_mut().fold(Targets::new(), |all, (name, to)| all.bytes(*name, to)))?;
        let took = began.elapsed().as_secs_f64();
        seconds.push(took);
        cpu.push(per_gb(Cpu::now().since(before).rest, state.bytes));
        Ok(took)
    };
    sample(Turn::Ours)?;
    sample(Turn::Limit)?;
    let pairs = pairs::run(bench.args.rounds, bench.seed(), sample)?;
    let peak = peak.bytes();
    let same = state.tensors().zip(&targets).all(|((_, saved), (_, restored))| saved == restored);
    if !same {
        return Err(Error::new(ErrorKind::Internal, "the restored bytes differ from the saved ones"));
    }
    let estimate = pairs.estimate();
    let (quiet, loud) = pairs.noise();
    let seconds = median(seconds);
    Ok(Figures(vec![
        ("workload", bench.args.workload.name().into()),
        ("tensors", state.len().into()),
        ("bytes", state.bytes.into()),
        ("rounds", pairs.ratios.len().into()),
        ("verdict", pairs.verdict().into()),
        ("restore_seconds", seconds.into()),
        ("open_seconds", median(opened).into()),
        ("restore_bytes_per_second", (state.bytes as f64 / seconds).into()),
        ("limit_bytes_per_second", median(limits.iter().map(Limit::bytes_per_second)).into()),
        ("limit_loop", limit::shown(&config).into()),
        ("fraction_of_limit", estimate.median.into()),
        ("fraction_low", estimate.low.into()),
        ("fraction_high", estimate.high.into()),
        ("noise_low", quiet.into()),
        ("noise_high", loud.into()),
        ("cpu_seconds_per_gb", median(cpu).into()),
        ("peak_host_bytes", peak.into()),
    ]))
}
