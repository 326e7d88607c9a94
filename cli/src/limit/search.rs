//! Finds the fastest loop on this disk: tries every engine, size and depth briefly, then tries the best of
//! them again.

use super::{Config, Direction, Engine, Existing, Memory, Scratch, attempt, checkpoint};
use crate::out::{self, median, quantile};
use ashore::{ErrorKind, Result};
use std::path::Path;
use std::time::{Duration, Instant};

/// The maximum bytes in flight of a loop.
pub const MEMORY: u64 = 256 << 20;
/// Bytes of a brief try.
const BRIEF: u64 = 256 << 20;
/// How many loops are tried again, and how often.
const AGAIN: usize = 5;
const TIMES: usize = 3;

/// A loop and its speed.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Found {
    #[serde(flatten)]
    pub config: Config,
    pub bytes_per_second: f64,
}

/// Returns all loops that were tried again, best first; at least one.
pub fn search(dir: &Path, bytes: u64, direction: Direction, memory: &mut Memory) -> Result<Vec<Found>> {
    let file = Scratch::new(dir, bytes)?;
    if direction == Direction::Read {
        file.write(&Config::threads(1 << 20, 8), memory)?;
    }
    best(bytes, |config, bytes| {
        let limit = match direction {
            Direction::Write => checkpoint(dir, &[bytes], 4096, config, memory)?,
            Direction::Read => file.read(config, memory)?,
        };
        Ok(limit.bytes_per_second())
    })
}

/// Like [`search`], for reading. These sets of files, of `bytes` bytes each, take turns, because the position
/// of a file on the disk decides which loop reads it fastest.
pub fn search_existing(sets: &[Existing], bytes: u64, memory: &mut Memory) -> Result<Vec<Found>> {
    let mut sets = sets.iter().cycle();
    best(bytes, |config, bytes| {
        let read = sets.next().map(|set| set.read_some(bytes, config, memory));
        Ok(read.transpose()?.map_or(0.0, |limit| limit.bytes_per_second()))
    })
}

/// The loops of [`compare`], and the bytes that they have written.
pub struct Compared {
    /// The loops in the order of [`Compared::CONFIGS`]; the first is always present.
    pub loops: Vec<Spread>,
    /// For each measurement, the time from the last byte until durable.
    pub tails: Vec<Duration>,
    pub written: u64,
}

/// A loop, and the quartiles of its rates in bytes per second.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Spread {
    #[serde(flatten)]
    pub config: Config,
    pub low: f64,
    pub bytes_per_second: f64,
    pub high: f64,
    /// The number of its measurements.
    pub times: usize,
}

impl Compared {
    /// The loop of an executor's default settings, and loops that each differ from it in one way.
    pub const CONFIGS: &[Config] = &[
        Config::threads(8 << 20, 4),
        Config::threads(8 << 20, 1),
        Config::threads(8 << 20, 2),
        Config::threads(8 << 20, 8),
        Config::threads(8 << 20, 16),
        Config::threads(2 << 20, 4),
        Config::threads(16 << 20, 4),
        #[cfg(feature = "uring")]
        Config { engine: Engine::Uring, chunk: 8 << 20, depth: 4 },
    ];
    /// The maximum bytes of all measurements.
    pub const MOST: u64 = 4 << 30;
    const ROUNDS: u64 = 4;
    /// The minimum bytes of a measurement, for a slow disk.
    const LEAST: u64 = 4 << 20;
}

/// Compares a few loops that write, round by round, for about this long; `go_on` ends it with an error.
pub fn compare(dir: &Path, time: Duration, memory: &mut Memory, go_on: impl Fn() -> Result<()>) -> Result<Compared> {
    let configs = Compared::CONFIGS;
    let (mut rates, mut tails, mut written) = (vec![Vec::new(); configs.len()], Vec::new(), 0);
    let mut measure = |config: &Config, bytes: u64| {
        go_on()?;
        let limit = checkpoint(dir, &[bytes], 4096, config, memory)?;
        tails.push(limit.tail);
        written += limit.bytes;
        Ok(limit.bytes_per_second())
    };
    let began = Instant::now();
    let probed = measure(&configs[0], Compared::LEAST)?;
    let each = configs.len() as u64 * Compared::ROUNDS;
    let share = (probed * time.as_secs_f64()) as u64 / each;
    // The maximum is the number of bytes that the deepest loop has in flight.
    let bytes = share.clamp(Compared::LEAST, Compared::MOST / each) >> 20 << 20;
    for round in 0..Compared::ROUNDS {
        // A round runs each loop once; the second round runs them in reverse order, because the disk drifts.
        for i in 0..configs.len() {
            let i = if round % 2 == 0 { i } else { configs.len() - 1 - i };
            match measure(&configs[i], bytes) {
                // The kernel or a container can forbid io_uring.
                Err(e) if configs[i].engine != Engine::Pwrite && e.kind() != ErrorKind::Cancelled => {
                    let _ = std::fs::remove_dir_all(attempt(dir));
                }
                rate => rates[i].push(rate?),
            }
        }
        if began.elapsed() > time {
            break;
        }
    }
    let measured = configs.iter().zip(rates).filter(|(_, rates)| !rates.is_empty());
    let loops = measured.map(|(config, rates)| {
        let at = |q| quantile(rates.iter().copied(), q);
        Spread { config: *config, low: at(0.25), bytes_per_second: at(0.5), high: at(0.75), times: rates.len() }
    });
    Ok(Compared { loops: loops.collect(), tails, written })
}

/// Measures every loop on few bytes, then the best of them on all bytes, several times.
fn best(bytes: u64, mut rate: impl FnMut(&Config, u64) -> Result<f64>) -> Result<Vec<Found>> {
    let configs = candidates(bytes);
    let bar = out::progress(configs.len() as u64 + (AGAIN * TIMES) as u64);
    bar.set_message("the disk's limit");
    let brief = bytes.min(BRIEF);
    let mut measure = |config: &Config, bytes: u64| {
        bar.inc(1);
        rate(config, bytes)
    };
    let mut found = Vec::with_capacity(configs.len());
    for config in configs {
        found.push(Found { config, bytes_per_second: measure(&config, brief)? });
    }
    sort(&mut found);
    found.truncate(AGAIN);
    let mut rates = vec![Vec::new(); found.len()];
    for _ in 0..TIMES {
        for (found, rates) in found.iter().zip(&mut rates) {
            rates.push(measure(&found.config, bytes)?);
        }
    }
    found.iter_mut().zip(rates).for_each(|(found, rates)| found.bytes_per_second = median(rates));
    sort(&mut found);
    bar.finish_and_clear();
    Ok(found)
}

fn sort(found: &mut [Found]) {
    found.sort_by(|a, b| b.bytes_per_second.total_cmp(&a.bytes_per_second));
}

fn candidates(bytes: u64) -> Vec<Config> {
    let engines = [
        Engine::Pwrite,
        #[cfg(feature = "uring")]
        Engine::Uring,
    ];
    let mut configs = Vec::new();
    for engine in engines {
        for chunk in [1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20] {
            for depth in [1, 2, 4, 8, 16, 32] {
                // Skip a loop that cannot reach its depth: it equals one with a lower depth.
                if chunk * depth <= MEMORY.min((bytes * 2).max(1 << 20)) {
                    configs.push(Config { engine, chunk, depth: depth as usize });
                }
            }
        }
    }
    configs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_loop_is_found_in_both_directions() {
        let dir = tempfile::tempdir().unwrap();
        let mut memory = Memory::new(2 << 20);
        for direction in [Direction::Write, Direction::Read] {
            let found = search(dir.path(), 1 << 20, direction, &mut memory).unwrap();
            assert!(found.windows(2).all(|pair| pair[0].bytes_per_second >= pair[1].bytes_per_second));
            assert!(!found.is_empty());
        }
        assert!(candidates(1 << 40).len() > 40);
        let mut memory = Memory::new(128 << 20);
        let compared = compare(dir.path(), Duration::ZERO, &mut memory, || Ok(())).unwrap();
        assert_eq!(compared.loops.len(), Compared::CONFIGS.len());
        assert!(compared.loops.iter().all(|one| one.low > 0.0 && one.low <= one.high));
        assert_eq!(compared.tails.len(), Compared::CONFIGS.len() + 1);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
