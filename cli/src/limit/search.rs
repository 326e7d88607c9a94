//! Finds the fastest loop on this disk: tries every engine, size and depth briefly, then the best of them
//! again.

use super::{Config, Direction, Engine, Existing, Memory, Scratch, checkpoint};
use crate::out::{self, median};
use ashore::Result;
use std::path::Path;

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

/// As [`search`], for reading these sets of files of `bytes` bytes each, which take turns: where a file lies
/// decides which loop reads it fastest.
pub fn search_existing(sets: &[Existing], bytes: u64, memory: &mut Memory) -> Result<Vec<Found>> {
    let mut sets = sets.iter().cycle();
    best(bytes, |config, bytes| {
        let read = sets.next().map(|set| set.read_some(bytes, config, memory));
        Ok(read.transpose()?.map_or(0.0, |limit| limit.bytes_per_second()))
    })
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
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
