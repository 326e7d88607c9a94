//! The parts of the study, each a table.

use crate::block::{BLOCK, Scheme};
use crate::coder::Code;
use crate::coding::{Trial, Window, copy, digest};
use crate::data::Kind;
use crate::disk::write_raw;
use crate::figures::{Speed, median, program_time, quartiles, rate, row, table};
use crate::memory::Aligned;
use crate::pipeline::{Job, Pipeline, came_back};
use crate::planes::Transform;
use std::error::Error;
use std::path::Path;

const CORES: usize = 2;
const FIRST_WINDOW: usize = 32 << 20;
const FIRST_ROUNDS: usize = 3;
const SECOND_WINDOW: usize = 256 << 20;
const SECOND_ROUNDS: usize = 5;
const DISK_BYTES: usize = 512 << 20;
const WHOLE_BYTES: usize = 1 << 30;
const PAIRS: usize = 16;

/// What is best for a kind of data, by the model.
pub struct Choice {
    /// Without the last checkpoint.
    alone: Scheme,
    delta: Option<Scheme>,
}

/// Every scheme on every kind of data, one thread.
pub fn every_scheme(dir: &Path, kinds: &[Kind]) -> Result<Vec<Choice>, Box<dyn Error>> {
    let windows: Vec<Window> = kinds.iter().map(|kind| Window::new(kind, FIRST_WINDOW)).collect();
    let mut trials: Vec<Vec<Trial<'_>>> = windows.iter().map(trials).collect();
    let page = Aligned::tiled(&kinds[0].bytes, DISK_BYTES);
    let mut disk = Vec::new();
    for _ in 0..FIRST_ROUNDS {
        for trials in &mut trials {
            trials.iter_mut().for_each(Trial::lap);
            disk.push(rate(DISK_BYTES, write_raw(dir, &page)?));
        }
    }
    let [low, disk, high] = quartiles(disk);
    println!("\nThe disk writes {disk:.2} GB/s (quartiles {low:.2} and {high:.2}) in this part.");

    let columns = ["data", "scheme", "ratio", "encode", "decode", "CPU-s/GB", "gain by the model"];
    table("Every scheme, GB/s of raw bytes and core", &columns);
    trials.iter().zip(&windows).map(|(trials, window)| choose(trials, window, disk)).collect()
}

fn trials(window: &Window) -> Vec<Trial<'_>> {
    let mut schemes = Vec::new();
    for transform in Transform::ALL {
        if transform == Transform::Delta && window.last().is_none() {
            continue;
        }
        let of_elements = [Code::Pco(4), Code::Pco(8)];
        let codes = Code::OF_BYTES.iter().chain(&of_elements[..if transform == Transform::Plain { 2 } else { 0 }]);
        schemes.extend(codes.map(|&code| Scheme::probed(transform, code, window.width, &window.raw, window.last())));
    }
    // What shrinks nothing is a copy.
    schemes.retain(|scheme| scheme.coded != 0);
    schemes.into_iter().map(|scheme| Trial::new(window, scheme, 1)).collect()
}

fn choose(trials: &[Trial<'_>], window: &Window, disk: f64) -> Result<Choice, Box<dyn Error>> {
    let gain = |speed: &Speed| speed.gain(CORES as f64, disk);
    for trial in trials {
        let speed = trial.speed();
        row(&[
            window.name.to_owned(),
            trial.scheme.to_string(),
            format!("{:.3}", speed.ratio),
            format!("{:.2}", speed.encode),
            format!("{:.2}", speed.decode),
            format!("{:.2}", speed.cost()),
            format!("{:.2}", gain(&speed)),
        ]);
    }
    let best = |delta| {
        let those = trials.iter().filter(|trial| (trial.scheme.transform == Transform::Delta) == delta);
        those.max_by(|a, b| gain(&a.speed()).total_cmp(&gain(&b.speed()))).map(|trial| trial.scheme)
    };
    Ok(Choice { alone: best(false).ok_or("nothing shrinks this data")?, delta: best(true) })
}

/// The best schemes over more memory, on one thread and two, beside copying and digesting.
pub fn two_threads(dir: &Path, kinds: &[Kind], chosen: &[Choice]) -> Result<(), Box<dyn Error>> {
    let columns =
        ["data", "scheme", "ratio", "encode, 1", "encode, 2", "decode, 1", "decode, 2", "disk", "gain by wall"];
    table("The best on 256 MiB, GB/s of raw bytes by the wall, on 1 thread and 2", &columns);
    let page = Aligned::tiled(&kinds[0].bytes, DISK_BYTES);
    let by_wall = |time| rate(SECOND_WINDOW, time);
    for (i, (kind, choice)) in kinds.iter().zip(chosen).enumerate() {
        let window = Window::new(kind, SECOND_WINDOW);
        let schemes: Vec<Scheme> = [Some(choice.alone), choice.delta].into_iter().flatten().collect();
        let mut trials: Vec<[Trial<'_>; 2]> =
            schemes.iter().map(|&scheme| [1, CORES].map(|threads| Trial::new(&window, scheme, threads))).collect();
        let (mut disk, mut copied, mut digested) = (Vec::new(), [Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for _ in 0..SECOND_ROUNDS {
            disk.push(rate(DISK_BYTES, write_raw(dir, &page)?));
            trials.iter_mut().flatten().for_each(Trial::lap);
            for threads in [1, CORES] {
                copied[threads - 1].push(by_wall(copy(&window, threads).wall));
                digested[threads - 1].push(by_wall(digest(&window, threads).wall));
            }
        }
        let disk = median(disk);
        // Copying and digesting do not depend on the data.
        for (name, rates) in [("copy", copied), ("CRC-64/NVME", digested)].into_iter().filter(|_| i == 0) {
            let [one, two] = rates.map(median).map(|rate| format!("{rate:.2}"));
            row(&[
                "any".into(),
                name.into(),
                "1".into(),
                one,
                two,
                "".into(),
                "".into(),
                format!("{disk:.2}"),
                "".into(),
            ]);
        }
        for [one, two] in &trials {
            let of = |laps: &[crate::figures::Lap]| median(laps.iter().map(|lap| by_wall(lap.wall)));
            let speed = one.speed();
            let gain = (1.0 / speed.ratio).min(of(&two.encoded) / disk);
            row(&[
                window.name.into(),
                one.scheme.to_string(),
                format!("{:.3}", speed.ratio),
                format!("{:.2}", of(&one.encoded)),
                format!("{:.2}", of(&two.encoded)),
                format!("{:.2}", of(&one.decoded)),
                format!("{:.2}", of(&two.decoded)),
                format!("{disk:.2}"),
                format!("{gain:.2}"),
            ]);
        }
    }
    Ok(())
}

/// The best schemes from memory to durable, against the same bytes raw.
pub fn whole_way(dir: &Path, kinds: &[Kind], chosen: &[Choice]) -> Result<(), Box<dyn Error>> {
    let columns =
        ["data", "ratio", "raw, GB/s", "raw, CPU-s/GB", "coded, CPU-s/GB", "raw time by coded time", "quartiles"];
    table("From memory to durable, 1 GiB, pairs in the order ABBA", &columns);
    let of = |name: &str| kinds.iter().position(|kind| kind.name == name).ok_or("a kind that is not there");
    let [bf16, m, v] = [of("trained bf16 weights")?, of("trained fp32 m")?, of("trained fp32 v")?];
    let cases = [
        ("trained bf16 weights", vec![(bf16, 1)]),
        ("Gaussian bf16 weights", vec![(of("Gaussian bf16 weights")?, 1)]),
        ("trained bf16 weights, fp32 m and v", vec![(bf16, 1), (m, 2), (v, 2)]),
    ];
    for (name, parts) in cases {
        let job = job(kinds, chosen, &parts);
        let mut pipeline = Pipeline::new(&job);
        let (file, len, _) = pipeline.write(dir, &job)?;
        if !came_back(&file, len, &job)? {
            return Err(format!("{name}: what was written came back different").into());
        }
        drop(file);
        write_raw(dir, &job.raw)?;
        let (mut raw, mut coded, mut raw_cost, mut coded_cost) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        for pair in 0..PAIRS {
            // Raw first, coded first, coded first, raw first ...
            for coding in if pair % 2 == 0 { [false, true] } else { [true, false] } {
                let began = program_time();
                if coding {
                    coded.push(pipeline.write(dir, &job)?.2.as_secs_f64());
                    coded_cost.push((program_time() - began).as_secs_f64() / WHOLE_BYTES as f64 * 1e9);
                } else {
                    raw.push(write_raw(dir, &job.raw)?.as_secs_f64());
                    raw_cost.push((program_time() - began).as_secs_f64() / WHOLE_BYTES as f64 * 1e9);
                }
            }
        }
        let [low, gain, high] = quartiles(raw.iter().zip(&coded).map(|(raw, coded)| raw / coded));
        row(&[
            name.into(),
            format!("{:.3}", len as f64 / WHOLE_BYTES as f64),
            format!("{:.2}", WHOLE_BYTES as f64 / 1e9 / median(raw)),
            format!("{:.2}", median(raw_cost)),
            format!("{:.2}", median(coded_cost)),
            format!("{gain:.2}"),
            format!("{low:.2} to {high:.2}"),
        ]);
    }
    Ok(())
}

/// A gigabyte of these kinds by their shares.
fn job(kinds: &[Kind], chosen: &[Choice], parts: &[(usize, usize)]) -> Job {
    let shares: usize = parts.iter().map(|(_, share)| share).sum();
    let mut raw = Aligned::zeroed(WHOLE_BYTES);
    let (mut ends, mut end, mut sum) = (Vec::new(), 0, 0);
    for &(kind, share) in parts {
        sum += share;
        let begin = std::mem::replace(&mut end, WHOLE_BYTES / shares * sum / BLOCK * BLOCK);
        end = if sum == shares { WHOLE_BYTES } else { end };
        let bytes = &kinds[kind].bytes;
        for piece in raw[begin..end].chunks_mut(bytes.len()) {
            piece.copy_from_slice(&bytes[..piece.len()]);
        }
        ends.push((end, chosen[kind].alone));
    }
    Job { raw, parts: ends }
}
