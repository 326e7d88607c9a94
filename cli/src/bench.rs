//! `ashore bench`: figures beside the machine's own limit, measured in turn in the same run.

use crate::limit::{self, Limit, Loops, Scratch};
use crate::out::{median, ms, quantile};
use crate::{Common, out, size};
use ashore::{Checkpoint, CheckpointExecutor, Error, ErrorKind, Result, StateDict};
use clap::ValueEnum;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHUNK: u64 = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(10 * 60);

/// The flags of `bench`.
#[derive(clap::Args)]
pub struct Args {
    /// What to measure
    #[arg(value_enum)]
    what: What,
    /// How much to write in each round
    #[arg(long, value_name = "SIZE", value_parser = size::parse, default_value = "512MiB")]
    bytes: u64,
    /// How often
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// The disk and the memory, without this library
    Limits,
    /// Saves, from the call until durable
    Save,
    /// Restores, every byte checked
    Restore,
}

/// Runs a benchmark in a directory of its own under `--dir`, which is deleted in the end.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    common.device.resolve()?;
    let parent = common.dir.clone().unwrap_or_else(|| ".".into());
    let place = Place::new(&parent)?;
    let report = match args.what {
        What::Limits => limits(&place.0, args)?,
        What::Save => save(&place.0, common, args)?,
        What::Restore => restore(&place.0, common, args)?,
    };
    if common.json {
        out::json(&report)?;
    } else {
        let rows = report.as_object().into_iter().flatten();
        let text: String = rows.map(|(name, value)| format!("{name:36} {}\n", shown(name, value))).collect();
        out::print(&text)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn limits(dir: &Path, args: &Args) -> Result<Value> {
    let (mut one, mut four) = (Loops::new(CHUNK, 1), Loops::new(CHUNK, 4));
    let (mut write_1, mut write_4, mut read_4, mut mode) = (Vec::new(), Vec::new(), Vec::new(), None);
    each_round(args, |_| {
        write_1.push(one.write_fresh(dir, args.bytes)?);
        let scratch = Scratch::new(dir, args.bytes)?;
        write_4.push(four.write(&scratch)?);
        let read = four.read(&scratch)?;
        mode = Some(read.mode);
        read_4.push(read);
        Ok(())
    })?;
    Ok(json!({
        "bytes": args.bytes,
        "rounds": args.rounds,
        "io": mode,
        "write_1_thread_bytes_per_second": rate(&write_1),
        "write_4_threads_bytes_per_second": rate(&write_4),
        "read_4_threads_bytes_per_second": rate(&read_4),
        "memory_copy_bytes_per_second": limit::copy(args.bytes),
    }))
}

fn save(dir: &Path, common: &Common, args: &Args) -> Result<Value> {
    let executor = executor(dir, common)?;
    let tensors = tensors(args.bytes);
    let mut loops = Loops::new(executor.settings().chunk, executor.settings().writers);
    let (mut limits, mut durable, mut ratios, mut blocked) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut io = None;
    each_round(args, |round| {
        let mut pair = [None, None];
        for ours in if round % 2 == 0 { [false, true] } else { [true, false] } {
            if ours {
                let began = Instant::now();
                let save = executor.save(u64::from(round) + 1, state(&tensors)?)?;
                blocked.push(ms(began.elapsed()));
                let Some(committed) = save.wait(PATIENCE)?.committed() else {
                    return Err(Error::new(ErrorKind::Internal, "a save was skipped"));
                };
                io = Some(committed.mode);
                pair[1] = Some(committed.bytes as f64 / committed.durable.as_secs_f64());
            } else {
                let limit = loops.write_fresh(dir, args.bytes)?;
                pair[0] = Some(limit.bytes_per_second());
                limits.push(limit);
            }
        }
        if let [Some(limit), Some(ours)] = pair {
            durable.push(ours);
            ratios.push(ours / limit);
        }
        Ok(())
    })?;
    executor.shutdown(PATIENCE)?;
    Ok(json!({
        "bytes": args.bytes,
        "rounds": args.rounds,
        "io": io,
        "durable_bytes_per_second": median(durable),
        "disk_limit_bytes_per_second": rate(&limits),
        "ratio_median": median(ratios.iter().copied()),
        "ratio_quartile_1": quantile(ratios.iter().copied(), 0.25),
        "ratio_quartile_3": quantile(ratios.iter().copied(), 0.75),
        "save_call_ms_p50": median(blocked.iter().copied()),
        "save_call_ms_max": quantile(blocked, 1.0),
    }))
}

fn restore(dir: &Path, common: &Common, args: &Args) -> Result<Value> {
    let executor = executor(dir, common)?;
    let committed = executor.save(1, state(&tensors(args.bytes))?)?.wait(PATIENCE)?.committed();
    let path = committed.map(|c| c.path).ok_or_else(|| Error::new(ErrorKind::Internal, "a save was skipped"))?;
    executor.shutdown(PATIENCE)?;
    let scratch = Scratch::new(dir, args.bytes)?;
    let mut loops = Loops::new(CHUNK, 4);
    loops.write(&scratch)?;
    let mut memory: Vec<Vec<f32>> = tensors(args.bytes).iter().map(|t| vec![0.0; t.len()]).collect();
    let (mut limits, mut ours, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
    each_round(args, |round| {
        let mut pair = [0.0, 0.0];
        for own in if round % 2 == 0 { [false, true] } else { [true, false] } {
            if own {
                let began = Instant::now();
                let checkpoint = Checkpoint::open(&path)?;
                let targets = memory.iter_mut().enumerate();
                checkpoint.read_into(targets.fold(ashore::Targets::new(), |t, (i, to)| t.elements(name(i), to)))?;
                pair[1] = args.bytes as f64 / began.elapsed().as_secs_f64();
            } else {
                let limit = loops.read(&scratch)?;
                pair[0] = limit.bytes_per_second();
                limits.push(limit);
            }
        }
        ours.push(pair[1]);
        ratios.push(pair[1] / pair[0]);
        Ok(())
    })?;
    Ok(json!({
        "bytes": args.bytes,
        "rounds": args.rounds,
        "restore_bytes_per_second": median(ours),
        "read_limit_bytes_per_second": rate(&limits),
        "ratio_median": median(ratios.iter().copied()),
        "ratio_quartile_1": quantile(ratios.iter().copied(), 0.25),
        "ratio_quartile_3": quantile(ratios, 0.75),
    }))
}

fn each_round(args: &Args, mut round: impl FnMut(u32) -> Result<()>) -> Result<()> {
    let bar = out::progress(u64::from(args.rounds));
    bar.set_message("rounds");
    for i in 0..args.rounds {
        round(i)?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

fn executor(dir: &Path, common: &Common) -> Result<CheckpointExecutor> {
    let arena = common.arena.unwrap_or(256 << 20);
    CheckpointExecutor::builder(dir).arena(arena).chunk(CHUNK.min(arena / 2 / 4096 * 4096)).keep_last(1).build()
}

/// Sixteen tensors that no compression or zero detection could make cheaper.
fn tensors(bytes: u64) -> Vec<Arc<Vec<f32>>> {
    let total = (bytes / 4).max(16) as usize;
    let lengths = (0..16).map(|i| total / 16 + usize::from(i < total % 16));
    let numbers = |(i, len): (usize, usize)| (0..len).map(|j| (j.wrapping_mul(0x9e37_79b1) ^ i) as f32).collect();
    lengths.enumerate().map(|tensor| Arc::new(numbers(tensor))).collect()
}

fn name(index: usize) -> String {
    format!("tensor.{index:02}")
}

fn state(tensors: &[Arc<Vec<f32>>]) -> Result<StateDict<'static>> {
    let mut state = StateDict::with_capacity(tensors.len());
    for (i, tensor) in tensors.iter().enumerate() {
        state.tensor(name(i), tensor.clone())?;
    }
    Ok(state)
}

fn rate(limits: &[Limit]) -> f64 {
    median(limits.iter().map(Limit::bytes_per_second))
}

fn shown(name: &str, value: &Value) -> String {
    match value.as_f64() {
        Some(rate) if name.ends_with("_per_second") => format!("{:.2} GB/s", rate / 1e9),
        Some(ratio) if value.is_f64() => format!("{ratio:.3}"),
        _ => value.as_str().map_or_else(|| value.to_string(), str::to_owned),
    }
}

/// A directory that is deleted in the end.
struct Place(PathBuf);

impl Place {
    fn new(parent: &Path) -> Result<Self> {
        let path = parent.join(format!("ashore-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path)
            .map_err(|e| Error::io("cannot create a directory to measure in", e).with_path(&path))?;
        Ok(Self(path))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
