//! The parts of the study. Each prints a table.

use crate::block::Scheme;
use crate::coder::Code;
use crate::coding::{Trial, Window, copy, digest};
use crate::data::Kind;
use crate::disk::write_raw;
use crate::figures::{Lap, Speed, median, quartiles, rate, row, table};
use crate::memory::Aligned;
use crate::planes::Transform;
use std::error::Error;
use std::path::Path;

pub const CORES: usize = 2;
const FIRST_WINDOW: usize = 16 << 20;
const FIRST_ROUNDS: usize = 3;
const SECOND_WINDOW: usize = 256 << 20;
const SECOND_ROUNDS: usize = 3;
const DISK_BYTES: usize = 512 << 20;

/// The best scheme for a kind of data, according to the model.
pub struct Choice {
    /// Without the last checkpoint.
    pub alone: Scheme,
    delta: Option<Scheme>,
}

/// Measures every scheme on every kind of data, with one thread.
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
    let [low, middle, disk] = quartiles(disk);
    println!("\nThe disk writes {middle:.2} GB/s, quartiles {low:.2} and {disk:.2}; the model takes the last.");

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
    // A scheme that shrinks no plane is a copy.
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

/// Measures the best schemes over more memory, on one thread and two, next to copying and digesting.
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
            let of = |laps: &[Lap]| median(laps.iter().map(|lap| by_wall(lap.wall)));
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
