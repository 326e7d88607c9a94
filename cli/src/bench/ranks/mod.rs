//! `ashore bench save --ranks N`: one checkpoint by N processes of this machine, each with its share of the
//! workload, beside N processes that write the same files plainly.

mod crew;
mod rank;
mod words;

pub use rank::serve;

use super::pairs::{self, Pairs, Turn};
use super::usage::per_gb;
use super::{Bench, Figures, save};
use crate::limit::{self, Config, Engine, Limit, Memory};
use crate::out::{median, ms};
use ashore::{Error, ErrorKind, IoMode, Result};
use crew::Crew;
use std::path::Path;
use std::time::Duration;
use words::{Answer, Order, Saved, Written, now};

/// The bytes of memory that the plain loops of all ranks use together.
const MEMORY: u64 = 256 << 20;
/// How many plain loops are tried again, and how many times.
const AGAIN: usize = 2;

/// The lengths of the files of a step, as the ranks wrote them.
struct Lengths {
    of_ranks: Vec<Vec<u64>>,
    /// The files that rank 0 wrote last: structure, table of files and manifest.
    rest: u64,
}

pub fn run(bench: &Bench<'_>, world: u32) -> Result<Figures> {
    let (mut crew, met) = Crew::start(bench.dir, world)?;
    let mut step = 0;
    // The first save plans and touches memory that later ones reuse.
    let first = one_save(&mut crew, &mut step)?;
    let path = &first[0].path;
    let lengths = Lengths::of(path, world as usize)?;
    save::remove(path)?;
    let (mut saves, mut limits, mut memory) =
        (Vec::new(), Vec::new(), Memory::new(lengths.rest.next_multiple_of(4096)));
    let rounds = bench.args.rounds;
    let mut config = None;
    if !bench.args.no_limit {
        config = Some(search(bench, &mut crew, &lengths, &mut memory)?);
    }
    let mut sample = |turn| {
        if turn == Turn::Limit {
            let Some(config) = config else { return Ok(1.0) };
            let limit = one_limit(bench, &mut crew, &lengths, config, &mut memory)?;
            limits.push(limit);
            return Ok(limit.time.as_secs_f64());
        }
        let saved = one_save(&mut crew, &mut step)?;
        save::remove(&saved[0].path)?;
        let seconds = durable(&saved);
        saves.push(saved);
        Ok(seconds)
    };
    let measured = if bench.args.no_limit {
        (0..rounds).try_for_each(|_| sample(Turn::Ours).map(drop))?;
        Pairs::default()
    } else {
        pairs::run(rounds, bench.seed(), sample)?
    };
    let left = crew.order(|_| Order::End)?;
    figures(bench, &met, &lengths, &saves, &limits, &measured, config, &left)
}

/// Makes all ranks save; returns what each rank saw.
fn one_save(crew: &mut Crew, step: &mut u64) -> Result<Vec<Saved>> {
    *step += 1;
    let step = *step;
    let of = |answer| if let Answer::Saved(saved) = answer { Ok(saved) } else { Err(unexpected(&answer)) };
    crew.order(|_| Order::Save { step })?.into_iter().map(of).collect()
}

/// Makes all ranks write the same files plainly; this process publishes them.
fn one_limit(
    bench: &Bench<'_>,
    crew: &mut Crew,
    lengths: &Lengths,
    config: Config,
    memory: &mut Memory,
) -> Result<Limit> {
    let attempt = limit::attempt(bench.dir);
    std::fs::create_dir(&attempt)
        .map_err(|e| Error::io("cannot create a directory to measure in", e).with_path(&attempt))?;
    let of = |answer| if let Answer::Written(written) = answer { Ok(written) } else { Err(unexpected(&answer)) };
    let answers = crew.order(|rank| Order::Write { files: lengths.of_ranks[rank].clone(), config })?;
    let written: Vec<Written> = answers.into_iter().map(of).collect::<Result<_>>()?;
    limit::publish(bench.dir, lengths.rest, memory)?;
    let (durable, began) = (now(), written.iter().map(|w| w.began).min().unwrap_or(0));
    limit::remove(bench.dir)?;
    let last = written.iter().map(|w| w.durable).max().unwrap_or(0);
    let bytes = lengths.of_ranks.iter().flatten().sum();
    let (time, tail) = (between(began, durable), between(last, durable));
    let mode = written.first().map_or(IoMode::Direct, |w| w.io);
    Ok(Limit { bytes, time, tail, mode })
}

/// Returns the plain loop with which all ranks together are fastest: tries each loop, then the best again.
fn search(bench: &Bench<'_>, crew: &mut Crew, lengths: &Lengths, memory: &mut Memory) -> Result<Config> {
    let mut tried = Vec::new();
    for config in candidates(lengths.of_ranks.len() as u64) {
        let limit = one_limit(bench, crew, lengths, config, memory)?;
        tried.push((limit.bytes_per_second(), config));
    }
    let best_first = |tried: &mut Vec<(f64, Config)>| tried.sort_by(|a, b| b.0.total_cmp(&a.0));
    best_first(&mut tried);
    tried.truncate(AGAIN);
    for (rate, config) in &mut tried {
        let again: Result<Vec<f64>> =
            (0..2).map(|_| Ok(one_limit(bench, crew, lengths, *config, memory)?.bytes_per_second())).collect();
        *rate = median(again?.into_iter().chain([*rate]));
    }
    best_first(&mut tried);
    tried.first().map(|(_, config)| *config).ok_or_else(|| Error::new(ErrorKind::Internal, "no loop"))
}

fn candidates(ranks: u64) -> Vec<Config> {
    let engines = [
        Engine::Pwrite,
        #[cfg(feature = "uring")]
        Engine::Uring,
    ];
    let sizes = [(1_u64 << 20, 1), (1 << 20, 4), (8 << 20, 1), (8 << 20, 4)];
    let all = engines.into_iter().flat_map(|engine| sizes.map(|(chunk, depth)| Config { engine, chunk, depth }));
    all.filter(|config| config.depth == 1 || config.chunk * config.depth as u64 * ranks <= MEMORY).collect()
}

impl Lengths {
    fn of(step: &Path, world: usize) -> Result<Self> {
        let failed = |e| Error::io("cannot examine a saved step", e).with_path(step);
        let mut lengths = Self { of_ranks: vec![Vec::new(); world], rest: 0 };
        for entry in std::fs::read_dir(step).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let (name, length) = (entry.file_name(), entry.metadata().map_err(failed)?.len());
            match rank_of(&name.to_string_lossy()).and_then(|rank| lengths.of_ranks.get_mut(rank)) {
                Some(files) => files.push(length),
                None => lengths.rest += length,
            }
        }
        Ok(lengths)
    }
}

/// Returns the rank that writes a file of a step; None for files that describe the step.
fn rank_of(name: &str) -> Option<usize> {
    match name.strip_prefix("shard-") {
        Some(numbered) => numbered.split('-').next()?.parse().ok(),
        None => name.ends_with(".safetensors").then_some(0),
    }
}

fn unexpected(answer: &Answer) -> Error {
    Error::new(ErrorKind::Internal, format!("a rank answered something else {answer:?}"))
}

fn between(from: u64, to: u64) -> Duration {
    Duration::from_nanos(to.saturating_sub(from))
}

/// Returns the seconds from the first rank's call until the last rank knows that the step is durable.
fn durable(saved: &[Saved]) -> f64 {
    since_first(saved, |s| s.durable)
}

fn since_first(saved: &[Saved], time: impl Fn(&Saved) -> u64) -> f64 {
    let first = saved.iter().map(|s| s.began).min().unwrap_or(0);
    between(first, saved.iter().map(time).max().unwrap_or(0)).as_secs_f64()
}

#[expect(clippy::too_many_arguments, reason = "everything there is to say")]
fn figures(
    bench: &Bench<'_>,
    met: &[Answer],
    lengths: &Lengths,
    saves: &[Vec<Saved>],
    limits: &[Limit],
    pairs: &Pairs,
    config: Option<Config>,
    left: &[Answer],
) -> Result<Figures> {
    let (mut bytes, mut arena, mut engine) = (0, 0, "");
    for answer in met {
        let Answer::Met { bytes: b, arena: a, engine: e } = answer else { return Err(unexpected(answer)) };
        (bytes, arena, engine) = (bytes + b, arena + a, e);
    }
    let mut peak = 0;
    for answer in left {
        let Answer::Left { peak: of_rank } = answer else { return Err(unexpected(answer)) };
        peak += of_rank;
    }
    let of = |figure: &dyn Fn(&[Saved]) -> f64| median(saves.iter().map(|saved| figure(saved)));
    let limit = |figure: &dyn Fn(&Limit) -> f64| config.map(|_| median(limits.iter().map(figure)));
    let cpu = |which: &dyn Fn(&Saved) -> Duration| of(&|saved| per_gb(saved.iter().map(which).sum(), bytes));
    let estimate = config.map(|_| pairs.estimate());
    let (quiet, loud) = pairs.noise();
    let published = |saved: &[Saved]| saved[0].published.unwrap_or(0);
    let tail = of(&|saved| ms(between(saved[0].last_receipt.unwrap_or(0), published(saved))));
    let told = of(&|saved| ms(between(published(saved), saved.iter().map(|s| s.durable).max().unwrap_or(0))));
    Ok(Figures(vec![
        ("workload", bench.args.workload.name().into()),
        ("ranks", met.len().into()),
        ("tensors", bench.args.workload.shapes(bench.args.scale).len().into()),
        ("bytes", bytes.into()),
        ("files", lengths.of_ranks.iter().map(Vec::len).sum::<usize>().into()),
        ("rounds", saves.len().into()),
        ("verdict", config.map(|_| pairs.verdict()).into()),
        ("blocked_ms", of(&|saved| saved.iter().map(|s| ms(Duration::from_nanos(s.call))).fold(0.0, f64::max)).into()),
        ("staged_seconds", of(&|saved| since_first(saved, |s| s.staged)).into()),
        ("durable_seconds", of(&durable).into()),
        ("durable_bytes_per_second", of(&|saved| bytes as f64 / durable(saved)).into()),
        ("limit_bytes_per_second", limit(&Limit::bytes_per_second).into()),
        ("limit_loop", config.map(|config| limit::shown(&config)).into()),
        ("fraction_of_limit", estimate.map(|e| e.median).into()),
        ("fraction_low", estimate.map(|e| e.low).into()),
        ("fraction_high", estimate.map(|e| e.high).into()),
        ("noise_low", config.map(|_| quiet).into()),
        ("noise_high", config.map(|_| loud).into()),
        ("cpu_seconds_per_gb", cpu(&|s| s.rest_cpu + s.stage_cpu).into()),
        ("write_cpu_seconds_per_gb", cpu(&|s| s.rest_cpu).into()),
        ("stage_cpu_seconds_per_gb", cpu(&|s| s.stage_cpu).into()),
        ("peak_host_bytes", peak.into()),
        ("arena_bytes", arena.into()),
        ("commit_tail_ms", tail.into()),
        ("limit_tail_ms", limit(&|l| ms(l.tail)).into()),
        ("told_ms", told.into()),
        ("engine", engine.into()),
        ("limit_io", limits.first().map(|l| serde_json::json!(l.mode)).into()),
        ("io", saves.first().map(|saved| serde_json::json!(saved[0].io)).into()),
    ]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_those_of_the_rank_in_their_names() {
        assert_eq!(rank_of("shard-00003-model-00001-of-00001.safetensors"), Some(3));
        assert_eq!(rank_of("shard-00012-model-00001-of-00001.table"), Some(12));
        assert_eq!(rank_of("model.safetensors"), Some(0));
        assert_eq!(rank_of("manifest.json"), None);
        assert_eq!(rank_of("tensors.table"), None);
    }

    #[test]
    fn loops_of_many_ranks_fit_into_memory() {
        assert!(candidates(2).len() > candidates(64).len());
        assert!(!candidates(256).is_empty());
    }
}
