//! Measures the bus without this library, for `ashore bench limits` on a GPU.

use crate::bench::{Bench, Figures, limits};
use crate::gpu::{Gpu, Pinned, Span, Stream, allocate, timed};
use crate::out::median;
use crate::rng::Rng;
use ashore::Result;
use serde_json::Value;
use std::sync::Arc;

/// Enough bytes to measure a rate, for any workload.
const BYTES_MAX: u64 = 4 << 30;
/// Maximum measurements of each loop.
const ROUNDS_MAX: u32 = 12;

/// The amount of pinned memory if only the copy rate matters: pinning more takes seconds.
pub const RING: u64 = 1 << 30;

/// The direction of the copies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Way {
    ToHost,
    ToDevice,
}

/// Returns the seconds to copy all bytes of `device` in copies of `part` bytes, reusing the same pinned
/// memory.
pub fn pass(way: Way, device: &Span, pinned: &mut Pinned, part: u64) -> Result<f64> {
    let part = part.min(pinned.len());
    let ring = pinned.len() / part * part;
    timed(&pinned.stream().clone(), || {
        for from in (0..device.bytes).step_by(part as usize) {
            let piece = device.part(from, part.min(device.bytes - from))?;
            match way {
                Way::ToHost => pinned.fetch(from % ring, &piece)?,
                Way::ToDevice => pinned.send(from % ring, &piece)?,
            }
        }
        Ok(())
    })
}

/// A loop and its name.
struct Loop {
    name: &'static str,
    way: Option<Way>,
    registered: bool,
    chunked: bool,
}

const fn to_and_fro(name: &'static str, way: Way, registered: bool, chunked: bool) -> Loop {
    Loop { name, way: Some(way), registered, chunked }
}

/// The loops. The others are compared with the first.
const LOOPS: [Loop; 9] = [
    to_and_fro("d2h_bytes_per_second", Way::ToHost, false, false),
    to_and_fro("d2h_chunked_bytes_per_second", Way::ToHost, false, true),
    to_and_fro("d2h_registered_bytes_per_second", Way::ToHost, true, false),
    to_and_fro("d2h_registered_chunked_bytes_per_second", Way::ToHost, true, true),
    to_and_fro("h2d_bytes_per_second", Way::ToDevice, false, false),
    to_and_fro("h2d_chunked_bytes_per_second", Way::ToDevice, false, true),
    to_and_fro("h2d_registered_bytes_per_second", Way::ToDevice, true, false),
    to_and_fro("h2d_registered_chunked_bytes_per_second", Way::ToDevice, true, true),
    Loop { name: "d2d_bytes_per_second", way: None, registered: false, chunked: false },
];

/// Runs `ashore bench limits`: the disk's limits and the bus's.
pub fn run(bench: &Bench<'_>, gpu: &Arc<Gpu>) -> Result<Figures> {
    let mut figures = if bench.args.no_limit {
        Figures(vec![("workload", bench.args.workload.name().into())])
    } else {
        limits::run(bench)?
    };
    let (settings, rounds) = (bench.sizes(), bench.args.rounds.min(ROUNDS_MAX));
    let bytes = bench.args.workload.bytes(bench.args.scale).clamp(4096, BYTES_MAX);
    let stream = Stream::new(gpu)?;
    let (from, to) = (allocate(&stream, bytes)?, allocate(&stream, bytes)?);
    stream.fill(&from, 1, 1.0)?;
    stream.wait()?;
    let mut memory = [Pinned::allocated(&stream, settings.arena)?, Pinned::registered(&stream, settings.arena)?];
    let (mut rates, mut rng) = (vec![Vec::new(); LOOPS.len()], Rng::new(bench.seed()));
    // The first round warms up and is not counted.
    for round in 0..=rounds {
        let mut order: Vec<usize> = (0..LOOPS.len()).collect();
        (1..order.len()).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
        for i in order {
            let Loop { way, registered, chunked, .. } = LOOPS[i];
            let pinned = &mut memory[usize::from(registered)];
            let part = if chunked { settings.chunk } else { settings.arena };
            let seconds = match way {
                Some(way) => pass(way, &from, pinned, part)?,
                None => timed(&stream, || stream.copy(&to, &from))?,
            };
            if round > 0 {
                rates[i].push(bytes as f64 / seconds);
            }
        }
    }
    let timed = |figure: f64| if gpu.simulated() { Value::Null } else { figure.into() };
    let of = |i: usize| {
        let ratios = rates[i].iter().zip(&rates[0]).map(|(rate, first)| rate / first);
        timed(median(ratios))
    };
    figures.0.extend([
        ("device", bench.home.to_string().into()),
        ("kernels", ashore::KERNELS.into()),
        ("simulated", gpu.simulated().into()),
        ("bus_bytes", bytes.into()),
        ("bus_rounds", rounds.into()),
        ("arena_bytes", settings.arena.into()),
        ("chunk", settings.chunk.into()),
    ]);
    figures.0.extend(LOOPS.iter().zip(&rates).map(|(l, rates)| (l.name, timed(median(rates.iter().copied())))));
    figures.0.extend([
        ("d2h_chunked_fraction", of(1)),
        ("d2h_registered_fraction", of(2)),
        ("d2h_registered_chunked_fraction", of(3)),
    ]);
    if gpu.simulated() {
        // Times of the disk measured beside it mean nothing either.
        figures.forget_times();
    }
    Ok(figures)
}
