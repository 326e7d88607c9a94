//! Derives settings with their reasons, and how often to save, from the figures. It only does arithmetic.

use crate::limit::{Engine, Spread, shown as loop_shown};
use crate::size;
use crate::when::span;
use ashore::Settings;
use serde::Serialize;

/// A loop replaces the default one if it is this much faster.
const FASTER: f64 = 1.1;
/// The number of measurements that both loops need.
const TIMES: usize = 3;
/// The arena is a multiple of this.
const ARENA_STEP: u64 = 64 << 20;

/// A setting, and why it has this value.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Setting {
    pub name: &'static str,
    /// As in the environment.
    pub value: String,
    #[serde(skip)]
    pub shown: String,
    pub default: bool,
    pub why: String,
}

/// The settings, as the library's type and as a list with reasons.
pub struct Settled {
    pub settings: Settings,
    pub list: [Setting; 4],
}

/// Chooses settings: `loops` has the default loop first, `tail` is the longest time from the last byte until
/// durable in seconds, and `memory` is the free memory of the machine.
pub fn settings(loops: &[Spread], tail: f64, memory: u64) -> Settled {
    let mut settings = Settings::default();
    let (default, best) = (loops[0], best(loops));
    settings.chunk = best.config.chunk;
    settings.writers = best.config.depth;
    if best.config.engine != Engine::Pwrite {
        settings.engine = ashore::Engine::Uring;
    }
    let rate = |spread: &Spread| format!("{}/s", size::shown(spread.bytes_per_second as u64));
    // Each loop differs from the default loop in one way.
    let why = |tried: &str, same: bool| {
        if !same {
            let (best, default) = (rate(&best), rate(&default));
            return format!("the disk takes {best} this way, and {default} with the default");
        }
        if default.times < TIMES {
            return "the default; measured too rarely to say more: --for a longer time".to_owned();
        }
        format!("the default; {tried} not faster beyond noise")
    };
    let same = [
        settings.chunk == default.config.chunk,
        settings.writers == default.config.depth,
        settings.engine == ashore::Engine::Auto,
    ];
    let ring = loops.iter().any(|spread| spread.config.engine != Engine::Pwrite);
    let engine = if ring || !same[2] {
        why("io_uring was", same[2])
    } else {
        "the default; this system or this program has no io_uring".to_owned()
    };
    let (arena, arena_why) = arena(&settings, best.bytes_per_second, tail, memory);
    settings.arena = arena;
    let of = |name, value: String, shown, default, why| Setting { name, value, shown, default, why };
    let engine_name = if same[2] { "auto" } else { "uring" };
    let list = [
        of("arena", arena.to_string(), size::exact(arena), arena == Settings::default().arena, arena_why),
        of(
            "chunk",
            settings.chunk.to_string(),
            size::exact(settings.chunk),
            same[0],
            why("2 MiB and 16 MiB were", same[0]),
        ),
        of(
            "writers",
            settings.writers.to_string(),
            settings.writers.to_string(),
            same[1],
            why("1, 2, 8 and 16 at once were", same[1]),
        ),
        of("engine", engine_name.to_owned(), engine_name.to_owned(), same[2], engine),
    ];
    Settled { settings, list }
}

/// Returns the fastest loop if it is faster than the default loop beyond noise: by a tenth, with middle
/// halves of their rates that do not overlap.
fn best(loops: &[Spread]) -> Spread {
    let default = loops[0];
    let faster = |one: &&Spread| {
        let often = one.times.min(default.times) >= TIMES;
        often && one.bytes_per_second > FASTER * default.bytes_per_second && one.low > default.high
    };
    let fastest = loops[1..].iter().filter(faster).max_by(|a, b| a.bytes_per_second.total_cmp(&b.bytes_per_second));
    fastest.copied().unwrap_or(default)
}

/// The arena holds the bytes that the disk writes during the longest commit, and those that the writers hold.
/// It is at least the default and at most a quarter of the memory.
fn arena(settings: &Settings, rate: f64, tail: f64, memory: u64) -> (u64, String) {
    let held = settings.chunk * (settings.writers as u64 + 2);
    let arrives = (rate * tail) as u64;
    let default = Settings::default().arena;
    let wanted = (held + arrives).next_multiple_of(ARENA_STEP).max(default);
    let (tail, arrives, held) = (span(tail), size::shown(arrives), size::exact(held));
    let why = format!("in the longest commit, {tail}, the disk could write {arrives}; writers hold {held}");
    let quarter = (memory / 4) >> 20 << 20;
    if wanted > quarter {
        let least = 2 * settings.chunk;
        return (quarter.max(least), format!("{why}; no more than a quarter of the free memory"));
    }
    let why = if wanted == default { format!("the default is enough: {why}") } else { why };
    (wanted, why)
}

/// The requirements of the caller.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted {
    /// The share of the time that saves may take: 0.01 is 1 %.
    pub cost: f64,
    /// Seconds between failures of the job.
    pub fails_every: Option<f64>,
    /// Bytes that the drive may take a day.
    pub daily: Option<u64>,
    /// Seconds of a training step.
    pub step: Option<f64>,
}

/// The requirement that determined how often to save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum By {
    Budget,
    Young,
    Disk,
}

/// How often to save: the longest of three, in seconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Interval {
    pub seconds: f64,
    pub decided: By,
    /// How long training waits for a save.
    pub stall_seconds: f64,
    /// The interval at which the stall costs exactly the allowed share.
    pub budget_seconds: f64,
    /// Young's optimum: the interval at which saves and repeated work together cost the least.
    pub young_seconds: Option<f64>,
    /// The shortest interval at which a save is durable before the next one begins, and the drive gets no
    /// more bytes a day than allowed.
    pub disk_seconds: f64,
    /// The part of `disk_seconds` that follows from the bytes of a day.
    pub daily_seconds: Option<f64>,
    /// Work that a failure loses on average: half of an interval, and the work that is not durable yet.
    pub lost_seconds: f64,
    /// The interval in steps, if the time of a step is known.
    pub steps: Option<u64>,
}

/// Decides how often to save `bytes`, when training waits `stall` and the step is durable after `durable`
/// seconds.
pub fn interval(stall: f64, durable: f64, bytes: u64, wanted: &Wanted) -> Interval {
    let budget_seconds = stall / wanted.cost;
    let young_seconds = wanted.fails_every.map(|between| (2.0 * stall * between).sqrt());
    let daily_seconds = wanted.daily.map(|daily| bytes as f64 / daily as f64 * 86_400.0);
    let disk_seconds = daily_seconds.map_or(durable, |daily| daily.max(durable));
    let three = [(By::Budget, budget_seconds), (By::Young, young_seconds.unwrap_or(0.0)), (By::Disk, disk_seconds)];
    let longest = three.into_iter().max_by(|a, b| a.1.total_cmp(&b.1));
    let (decided, seconds) = longest.unwrap_or((By::Disk, disk_seconds));
    let steps = wanted.step.map(|step| (seconds / step).ceil().max(1.0) as u64);
    Interval {
        seconds,
        decided,
        stall_seconds: stall,
        budget_seconds,
        young_seconds,
        disk_seconds,
        daily_seconds,
        lost_seconds: seconds / 2.0 + durable,
        steps,
    }
}

/// Returns the settings as Rust code.
pub fn code(settings: &Settings) -> String {
    let shifted = |bytes: u64| match bytes.is_multiple_of(1 << 20) {
        true => format!("{} << 20", bytes >> 20),
        false => bytes.to_string(),
    };
    let engine = if settings.engine == ashore::Engine::Uring { "Uring" } else { "Auto" };
    let (arena, chunk, writers) = (shifted(settings.arena), shifted(settings.chunk), settings.writers);
    format!(".arena({arena}).chunk({chunk}).writers({writers}).engine(Engine::{engine})")
}

/// Returns the settings as variables of the environment.
pub fn environment(list: &[Setting]) -> String {
    let each = list.iter().map(|one| format!("ASHORE_{}={}", one.name.to_uppercase(), one.value));
    each.collect::<Vec<_>>().join(" ")
}

/// Describes a loop in words, with its rate.
pub fn disk(spread: &Spread) -> String {
    format!("{}/s", size::shown(spread.bytes_per_second as u64)) + ", " + &loop_shown(&spread.config)
}
