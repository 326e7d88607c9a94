//! The measurements of `ashore tune`, each bounded in time and bytes.

use super::{Bus, Shapes};
use crate::bench::workload::State as HostState;
use crate::bench::{DeviceState, Way, bus_pass};
use crate::device::Home;
use crate::gpu::{Gpu, Pinned, Stream, allocate};
use crate::limit::Memory;
use crate::out::median;
use crate::place::Interrupt;
use ashore::internal::digest::Digest;
use ashore::{CheckpointExecutor, Committed, Error, ErrorKind, Result, Settings, StateDict};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The maximum bytes of one measured save.
pub const SAVE_MOST: u64 = 1 << 30;
/// The number of saves after the first. The first save plans and touches memory that later saves reuse.
pub const SAVES: usize = 3;
/// The number of commits of a small file.
const COMMITS: usize = 20;
/// The size of long copies across the bus; the other size is a chunk.
const LONG: u64 = 64 << 20;
/// The block of a digest.
const BLOCK: usize = 8 << 20;

/// Commits a small file a few times; returns the times from the last byte until durable, and the bytes.
pub fn commits(dir: &Path, time: Duration, memory: &mut Memory, interrupt: &Interrupt) -> Result<(Vec<Duration>, u64)> {
    let config = crate::limit::Config::threads(1 << 20, 1);
    let (began, mut tails) = (Instant::now(), Vec::new());
    while tails.is_empty() || (tails.len() < COMMITS && began.elapsed() < time) {
        interrupt.check()?;
        tails.push(crate::limit::checkpoint(dir, &[1 << 20], 4096, &config, memory)?.tail);
    }
    let written = tails.len() as u64 * ((1 << 20) + 4096);
    Ok((tails, written))
}

/// Returns the rates at which one thread copies memory, and digests it.
pub fn memory(time: Duration, interrupt: &Interrupt) -> Result<(f64, f64)> {
    let block = vec![1_u8; BLOCK];
    let (began, mut copies, mut digests) = (Instant::now(), Vec::new(), Vec::new());
    while copies.is_empty() || began.elapsed() < time {
        interrupt.check()?;
        copies.push(crate::limit::copy(128 << 20));
        let digested = Instant::now();
        for _ in 0..4 {
            std::hint::black_box(Digest::of(std::hint::black_box(&block)));
        }
        digests.push((4 * BLOCK) as f64 / digested.elapsed().as_secs_f64());
    }
    Ok((median(copies), median(digests)))
}

/// Returns the rates of the bus from the GPU, by chunks and by long copies.
pub fn bus(gpu: &Arc<Gpu>, chunk: u64, time: Duration, interrupt: &Interrupt) -> Result<Bus> {
    let stream = Stream::new(gpu)?;
    let from = allocate(&stream, 2 * LONG)?;
    stream.zero(&from)?;
    stream.wait()?;
    let mut pinned = Pinned::registered(&stream, LONG)?;
    let mut pass = |part| Ok::<_, Error>(from.bytes as f64 / bus_pass(Way::ToHost, &from, &mut pinned, part)?);
    pass(chunk)?;
    let (began, mut chunked, mut long) = (Instant::now(), Vec::new(), Vec::new());
    while chunked.is_empty() || began.elapsed() < time {
        interrupt.check()?;
        chunked.push(pass(chunk)?);
        long.push(pass(LONG)?);
    }
    Ok(Bus { chunked_bytes_per_second: median(chunked), long_bytes_per_second: median(long) })
}

/// Saves a state of these shapes a few times in an empty loop, which fences at once. Returns all saves but
/// the first, each with the time of its call.
pub fn saves(
    dir: &Path,
    home: &Home,
    settings: &Settings,
    shapes: &Shapes,
    time: Duration,
    interrupt: &Interrupt,
) -> Result<Vec<(Duration, Committed)>> {
    let executor =
        home.builder(CheckpointExecutor::builder(dir).settings(settings.clone()).links(false).alone()).build()?;
    match home.gpu() {
        None => {
            let state = HostState::of(shapes.list());
            repeat(&executor, || state.dict(), time, interrupt)
        }
        Some(gpu) => {
            let stream = Stream::new(gpu)?;
            let state = DeviceState::of(&stream, shapes.list())?;
            state.reset(&stream)?;
            stream.wait()?;
            repeat(&executor, || state.dict(), time, interrupt)
        }
    }
}

fn repeat(
    executor: &CheckpointExecutor,
    dict: impl Fn() -> Result<StateDict<'static>>,
    time: Duration,
    interrupt: &Interrupt,
) -> Result<Vec<(Duration, Committed)>> {
    let (began, mut saved) = (Instant::now(), Vec::new());
    for step in 0..=SAVES {
        let dict = dict()?;
        let called = Instant::now();
        let save = executor.save(step as u64, dict)?;
        let call = called.elapsed();
        let ended = loop {
            match save.wait(Duration::from_millis(50)) {
                Err(e) if e.kind() == ErrorKind::Deadline && save.try_get().is_none() => {}
                ended => break ended?,
            }
            if let Err(interrupted) = interrupt.check() {
                save.cancel();
                return Err(interrupted);
            }
        };
        let skipped = || Error::new(ErrorKind::Internal, "a save was skipped");
        let committed = ended.committed().ok_or_else(skipped)?;
        crate::bench::remove(&committed.path)?;
        saved.push((call, committed));
        if saved.len() > 1 && began.elapsed() > time {
            break;
        }
    }
    saved.remove(0);
    Ok(saved)
}
