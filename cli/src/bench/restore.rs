//! `ashore bench restore`: complete restores with every byte checked, beside a bare loop over a file of the
//! same age.

use super::pairs::{self, Turn};
use super::usage::{Cpu, Peak, per_gb};
use super::{Bench, Figures, PATIENCE};
use crate::limit::{self, Direction, Limit, Memory, Scratch};
use crate::out::median;
use ashore::{Checkpoint, Error, ErrorKind, Result, Targets};
use std::time::Instant;

pub fn run(bench: &Bench<'_>) -> Result<Figures> {
    let state = bench.state();
    let mut memory = Memory::ample();
    let found = limit::search(bench.dir, state.bytes, Direction::Read, &mut memory)?;
    let config = found.first().map(|found| found.config).ok_or_else(|| Error::new(ErrorKind::Internal, "no loop"))?;

    let executor = bench.builder().build()?;
    let committed = executor.save(1, state.dict()?)?.wait(PATIENCE)?.committed();
    let path = committed.map(|c| c.path).ok_or_else(|| Error::new(ErrorKind::Internal, "a save was skipped"))?;
    executor.shutdown(PATIENCE)?;
    let scratch = Scratch::new(bench.dir, state.bytes)?;
    scratch.write(&config, &mut memory)?;

    let mut targets: Vec<(&str, Vec<u8>)> = state.tensors().map(|(name, bytes)| (name, vec![1; bytes.len()])).collect();
    let peak = Peak::watch();
    let (mut limits, mut seconds, mut opened, mut cpu) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut sample = |turn| {
        if turn == Turn::Limit {
            let limit = scratch.read(&config, &mut memory)?;
            limits.push(limit);
            return Ok(limit.time.as_secs_f64());
        }
        let before = Cpu::now();
        let began = Instant::now();
        let checkpoint = Checkpoint::open(&path)?;
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
