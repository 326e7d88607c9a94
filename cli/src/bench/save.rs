//! `ashore bench save` and `write`: complete saves, or all of a save except the copying, from the call until
//! durable.

use super::pairs::{self, Pairs, Turn};
use super::report::{Phase, Report, Sample, Timeline};
use super::usage::{self, Cpu, Peak, per_gb};
use super::{Bench, Figures, PATIENCE, What, null};
use crate::limit::{self, Config, Direction, Limit, Memory};
use crate::out::{median, ms};
use ashore::{CheckpointExecutor, Committed, Error, ErrorKind, Result, Save};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A measured save.
struct Saved {
    committed: Committed,
    /// The wall-clock time of the call, for external observers.
    at: SystemTime,
    /// The duration of the `save` call.
    call: Duration,
    cpu: Cpu,
    timeline: Timeline,
}

pub fn run(bench: &Bench<'_>) -> Result<Figures> {
    let args = bench.args;
    let state = bench.state();
    let (mut memory, mut found) = (None, None);
    if !args.no_limit {
        let memory = memory.insert(Memory::ample());
        found = limit::search(bench.dir, state.bytes, Direction::Write, memory)?.first().map(|found| found.config);
    }
    let peak = Peak::watch();
    let builder = bench.builder();
    let device = args.what == What::Write;
    let executor = if device { builder.made_device(Arc::new(null::Absent)) } else { builder }.build()?;

    let mut step = 0;
    let mut save = || {
        step += 1;
        let dict = state.dict()?;
        let before = Cpu::now();
        let (at, began) = (SystemTime::now(), Instant::now());
        let save = executor.save(step, dict)?;
        let call = began.elapsed();
        let samples = if args.report.is_some() { watch(&save) } else { Vec::new() };
        let Some(committed) = save.wait(PATIENCE)?.committed() else {
            return Err(Error::new(ErrorKind::Internal, "a save was skipped"));
        };
        let timeline = timeline(step, &committed, call, samples);
        Ok(Saved { committed, at, call, cpu: Cpu::now().since(before), timeline })
    };
    // The first save plans and touches memory that later ones reuse.
    let first = save()?;
    let (files, manifest) = lengths(&first.committed.path)?;
    remove(&first.committed.path)?;
    let (mut saves, mut limits) = (Vec::new(), Vec::new());
    let mut sample = |turn| {
        if turn == Turn::Limit {
            let (Some(config), Some(memory)) = (&found, &mut memory) else { return Ok(1.0) };
            let limit = limit::checkpoint(bench.dir, &files, manifest, config, memory)?;
            limits.push(limit);
            return Ok(limit.time.as_secs_f64());
        }
        let saved = save()?;
        remove(&saved.committed.path)?;
        let durable = saved.committed.durable.as_secs_f64();
        saves.push(saved);
        Ok(durable)
    };
    let measured = if args.no_limit {
        (0..args.rounds).try_for_each(|_| sample(Turn::Ours).map(drop))?;
        Pairs::default()
    } else {
        pairs::run(args.rounds, bench.seed(), sample)?
    };
    let figures = figures(bench, &executor, (state.len(), state.bytes), &saves, &limits, &measured, found, &peak);
    executor.shutdown(PATIENCE)?;
    if let Some(path) = &args.report {
        report(bench, &figures, saves, measured).write(path)?;
    }
    Ok(figures)
}

#[expect(clippy::too_many_arguments, reason = "everything there is to say")]
fn figures(
    bench: &Bench<'_>,
    executor: &CheckpointExecutor,
    (tensors, bytes): (usize, u64),
    saves: &[Saved],
    limits: &[Limit],
    pairs: &Pairs,
    config: Option<Config>,
    peak: &Peak,
) -> Figures {
    let of = |figure: &dyn Fn(&Saved) -> f64| median(saves.iter().map(figure));
    let limit = |figure: &dyn Fn(&Limit) -> f64| config.map(|_| median(limits.iter().map(figure)));
    let estimate = config.map(|_| pairs.estimate());
    let (quiet, loud) = pairs.noise();
    let tail = of(&|s| ms(s.committed.tail));
    Figures(vec![
        ("workload", bench.args.workload.name().into()),
        ("tensors", tensors.into()),
        ("bytes", bytes.into()),
        ("rounds", saves.len().into()),
        ("verdict", config.map(|_| pairs.verdict()).into()),
        ("blocked_ms", of(&|s| ms(s.call)).into()),
        ("staged_seconds", of(&|s| s.committed.staged.as_secs_f64()).into()),
        ("durable_seconds", of(&|s| s.committed.durable.as_secs_f64()).into()),
        ("durable_bytes_per_second", of(&|s| bytes as f64 / s.committed.durable.as_secs_f64()).into()),
        ("limit_bytes_per_second", limit(&Limit::bytes_per_second).into()),
        ("limit_loop", config.map(|config| limit::shown(&config)).into()),
        ("fraction_of_limit", estimate.map(|e| e.median).into()),
        ("fraction_low", estimate.map(|e| e.low).into()),
        ("fraction_high", estimate.map(|e| e.high).into()),
        ("noise_low", config.map(|_| quiet).into()),
        ("noise_high", config.map(|_| loud).into()),
        ("write_cpu_seconds_per_gb", of(&|s| per_gb(s.cpu.rest, bytes)).into()),
        ("stage_cpu_seconds_per_gb", of(&|s| per_gb(s.cpu.stage, bytes)).into()),
        ("peak_host_bytes", peak.bytes().into()),
        ("arena_bytes", executor.arena().report().bytes.into()),
        ("commit_tail_ms", tail.into()),
        ("limit_tail_ms", limit(&|l| ms(l.tail)).into()),
        ("commit_tail_of_limit", limit(&|l| ms(l.tail)).map(|limit| tail / limit).into()),
        ("began_unix", saves.last().filter(|_| bench.args.no_limit).map(|s| since_1970(s.at)).into()),
        ("engine", executor.engine().into()),
        ("limit_io", limits.first().map(|l| serde_json::json!(l.mode)).into()),
        ("io", saves.first().map(|s| serde_json::json!(s.committed.mode)).into()),
    ])
}

fn since_1970(at: SystemTime) -> f64 {
    at.duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

/// Samples the bytes staged and written, every millisecond until the save ends.
fn watch(save: &Save) -> Vec<Sample> {
    let (began, mut samples) = (Instant::now(), Vec::new());
    while save.try_get().is_none() {
        let progress = save.progress();
        let at = began.elapsed().as_secs_f64();
        samples.push(Sample { at, staged: progress.staged, written: progress.written });
        std::thread::sleep(Duration::from_millis(1));
    }
    samples
}

fn timeline(step: u64, committed: &Committed, call: Duration, samples: Vec<Sample>) -> Timeline {
    let seconds = |time: Duration| time.as_secs_f64();
    let written = committed.durable.saturating_sub(committed.tail);
    let first = samples.iter().find(|sample| sample.written > 0).map_or(0.0, |sample| sample.at);
    let phases = vec![
        Phase { name: "save call", from: 0.0, to: seconds(call) },
        Phase { name: "staging", from: seconds(call), to: seconds(committed.staged) },
        Phase { name: "writing", from: first.min(seconds(written)), to: seconds(written) },
        Phase { name: "commit", from: seconds(written), to: seconds(committed.durable) },
    ];
    Timeline { label: format!("save {step}"), phases, samples, bytes: committed.bytes }
}

fn report<'a>(bench: &Bench<'_>, figures: &Figures, saves: Vec<Saved>, pairs: Pairs) -> Report<'a> {
    Report {
        title: "ashore bench",
        command: std::env::args().collect::<Vec<_>>().join(" "),
        machine: usage::machine(),
        verdict: if bench.args.no_limit { "without the machine's limit".into() } else { pairs.verdict() },
        figures: figures.rows(),
        saves: numbered(saves.into_iter().map(|saved| saved.timeline)),
        ratios: pairs.ratios,
        noise: pairs.noise,
    }
}

/// Numbers the measured saves from 1: the first step of all was not measured.
fn numbered(saves: impl Iterator<Item = Timeline>) -> Vec<Timeline> {
    saves.zip(1..).map(|(save, number)| Timeline { label: format!("save {number}"), ..save }).collect()
}

/// Returns the lengths of the shards of a step, and of its manifest and tables together.
fn lengths(path: &Path) -> Result<(Vec<u64>, u64)> {
    let (mut files, mut manifest) = (Vec::new(), 0);
    let failed = |e| Error::io("cannot examine a saved step", e).with_path(path);
    for entry in std::fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let len = entry.metadata().map_err(failed)?.len();
        let name = entry.file_name();
        let described = name == "manifest.json" || Path::new(&name).extension().is_some_and(|it| it == "table");
        if described { manifest += len } else { files.push(len) }
    }
    Ok((files, manifest))
}

/// Removes a step, outside of all timings: deleting a gibibyte takes a quarter of a second.
pub fn remove(path: &Path) -> Result<()> {
    std::fs::remove_dir_all(path).map_err(|e| Error::io("cannot remove a measured step", e).with_path(path))
}
