//! The arithmetic of `ashore tune`, and its text.

use super::advice::{By, Wanted, environment, interval, settings};
use super::*;
use crate::limit::{Config, Spread};
use crate::tune::text::text;

fn spread(config: Config, low: f64, median: f64, high: f64) -> Spread {
    Spread { config, low, bytes_per_second: median, high, times: 4 }
}

const DEFAULT: Config = Config::threads(8 << 20, 4);

fn wanted(cost: f64, fails_every: Option<f64>, daily: Option<u64>) -> Wanted {
    Wanted { cost, fails_every, daily, step: None }
}

#[test]
fn the_longest_of_budget_young_and_disk_decides_how_often_to_save() {
    let decided = |stall, durable, wanted| {
        let interval = interval(stall, durable, 14_000_000_000, &wanted);
        (interval.decided, interval.seconds)
    };
    // A stall of 20 ms: 2 s at 1 %, and Young's sqrt(2 x 0.02 x 28,800) with a failure each 8 h.
    assert_eq!(decided(0.02, 1.0, wanted(0.01, None, None)), (By::Budget, 2.0));
    let (by, seconds) = decided(0.02, 8.0, wanted(0.01, Some(28_800.0), None));
    assert!(by == By::Young && (seconds - 33.94).abs() < 0.01, "{by:?} {seconds}");
    // Training does not wait for the time to durable: that time is a lower bound, and is not part of Young's
    // formula.
    assert_eq!(decided(0.02, 60.0, wanted(0.01, Some(28_800.0), None)), (By::Disk, 60.0));
    // A save that blocks training for 8 s: the budget is stricter than Young.
    assert_eq!(decided(8.0, 8.0, wanted(0.01, Some(28_800.0), None)), (By::Budget, 800.0));
    let (by, seconds) = decided(8.0, 8.0, wanted(0.05, Some(28_800.0), None));
    assert!(by == By::Young && (seconds - 678.8).abs() < 0.1, "{by:?} {seconds}");
    // 14 GB a save, and 7 TB a day: 500 saves.
    let (by, seconds) = decided(0.02, 8.0, wanted(0.01, Some(28_800.0), Some(7_000_000_000_000)));
    assert!(by == By::Disk && (seconds - 172.8).abs() < 1e-6, "{by:?} {seconds}");
}

#[test]
fn steps_are_counted_up_to_the_interval() {
    let wanted = Wanted { step: Some(0.3), ..wanted(0.01, None, None) };
    assert_eq!(interval(0.02, 1.0, 1, &wanted).steps, Some(7));
    assert_eq!(interval(1e-6, 1e-3, 1, &wanted).steps, Some(1));
}

#[test]
fn the_default_stays_unless_another_loop_is_faster_beyond_noise() {
    let ours = spread(DEFAULT, 1.9e9, 2.0e9, 2.1e9);
    let deep = |low, median| spread(Config::threads(8 << 20, 16), low, median, 2.0 * median);
    for (other, writers) in [(deep(2.2e9, 2.5e9), 16), (deep(2.0e9, 2.5e9), 4), (deep(2.15e9, 2.18e9), 4)] {
        let settled = settings(&[ours, other], 0.01, 64 << 30);
        assert_eq!(settled.settings.writers, writers, "{other:?}");
        assert_eq!(settled.list[2].default, writers == 4);
    }
    let rare = settings(&[Spread { times: 2, ..ours }, deep(2.2e9, 2.5e9)], 0.01, 64 << 30);
    assert_eq!(rare.settings.writers, 4);
    assert!(rare.list[2].why.contains("too rarely"), "{}", rare.list[2].why);
    let long = spread(Config::threads(16 << 20, 4), 3e9, 3e9, 3e9);
    let settled = settings(&[ours, long], 0.01, 64 << 30);
    assert_eq!((settled.settings.chunk, settled.settings.writers), (16 << 20, 4));
}

#[test]
fn the_arena_takes_what_the_disk_writes_in_a_commit_and_never_most_of_the_memory() {
    let loops = [spread(DEFAULT, 2e9, 2e9, 2e9)];
    assert_eq!(settings(&loops, 0.01, 64 << 30).settings.arena, 256 << 20);
    // 2 GB, and 48 MiB that writers hold.
    assert_eq!(settings(&loops, 1.0, 64 << 30).settings.arena, 1984 << 20);
    assert_eq!(settings(&loops, 1.0, 4 << 30).settings.arena, 1 << 30);
    assert_eq!(settings(&loops, 1.0, 0).settings.arena, 16 << 20);
}

#[test]
fn settings_are_ones_that_the_library_takes() {
    let loops = [spread(DEFAULT, 2e9, 2e9, 2e9), spread(Config::threads(16 << 20, 4), 3e9, 3e9, 3e9)];
    for (tail, memory) in [(0.0, u64::MAX), (1.0, 64 << 30), (1.0, 0)] {
        let settled = settings(&loops, tail, memory);
        settled.settings.check().unwrap();
        let lines = environment(&settled.list);
        let value = |name: &str| lines.split(' ').find_map(|line| line.strip_prefix(name)).unwrap().to_owned();
        assert_eq!(value("ASHORE_ARENA=").parse(), Ok(settled.settings.arena));
        assert_eq!(value("ASHORE_CHUNK=").parse(), Ok(settled.settings.chunk));
        assert_eq!(value("ASHORE_WRITERS=").parse(), Ok(settled.settings.writers));
        assert_eq!(value("ASHORE_ENGINE=").parse::<ashore::Engine>().unwrap(), settled.settings.engine);
    }
}

#[test]
fn a_part_of_a_state_is_scaled_up_to_the_whole() {
    let save = |bytes| Save { call: 0.001, staged: 0.1, durable: 0.6, tail: 0.1, bytes };
    let same = save(1 << 30).scaled(1 << 30, 256 << 20, 10e9);
    assert_eq!((same.staged, same.durable), (0.1, 0.6));
    let scaled = save(1_000_000_000).scaled(10_000_000_000, 2_000_000_000, 10e9);
    assert!((scaled.durable - 5.1).abs() < 1e-9, "{}", scaled.durable);
    // The disk has written all but the arena's 2 GB by then.
    assert!((scaled.staged - 4.0).abs() < 1e-9, "{}", scaled.staged);
    let fits = save(1_000_000_000).scaled(10_000_000_000, 20_000_000_000, 10e9);
    assert!((fits.staged - 1.0).abs() < 1e-9, "{}", fits.staged);
}

#[test]
fn shapes_keep_their_number_when_they_are_scaled() {
    let shapes = Shapes { bytes: vec![4000, 2, 1_000_000, 8], source: String::new() };
    let small = shapes.of(shapes.total() / 10);
    assert_eq!(small.bytes, [400, 4, 100_000, 4]);
    assert_eq!(
        shapes.list().iter().map(|(_, half, shape)| (*half, shape[0])).collect::<Vec<_>>(),
        [(false, 1000), (true, 1), (false, 250_000), (false, 2)]
    );
}

/// A report with fixed numbers.
fn report(wanted: &Wanted, gpu: bool) -> Report {
    let deep = spread(Config::threads(8 << 20, 16), 2.7e9, 2.94e9, 3.1e9);
    let loops =
        vec![spread(DEFAULT, 2.2e9, 2.31e9, 2.5e9), deep, spread(Config::threads(2 << 20, 4), 2e9, 2.1e9, 2.3e9)];
    let settled = settings(&loops, 0.12, 64 << 30);
    let bus = gpu.then_some(Bus { chunked_bytes_per_second: 24.1e9, long_bytes_per_second: 25.3e9 });
    Report {
        path: "/data/runs/a".into(),
        device: if gpu { "cuda:0 (the first GPU)" } else { "host (no CUDA driver found)" }.to_owned(),
        simulated: false,
        state: Saved {
            bytes: 13_900_000_000,
            tensors: 1314,
            source: "as in step 4900".to_owned(),
            saved_bytes: 1_073_000_000,
        },
        measured: Measured {
            seconds: 19.4,
            written_bytes: 7_900_000_000,
            loops,
            copy_bytes_per_second: 9.8e9,
            digest_bytes_per_second: 21.4e9,
            bus,
            commits: 81,
            commit_seconds: 0.12,
            call_seconds: 0.000_05,
            staged_seconds: 0.6,
            durable_seconds: 4.9,
        },
        code: advice::code(&settled.settings),
        environment: environment(&settled.list),
        settings: settled.list,
        interval: interval(0.02, 4.9, 13_900_000_000, wanted),
    }
}

#[test]
fn the_text_at_80_and_200_columns() {
    let full = Wanted { step: Some(0.58), ..wanted(0.01, Some(28_800.0), Some(20_000_000_000_000)) };
    for (name, wanted, gpu) in [("host", wanted(0.01, None, None), false), ("gpu", full, true)] {
        for columns in [80, 200] {
            let shown = text(&report(&wanted, gpu), &wanted, columns);
            let long = shown.lines().find(|line| line.chars().count() > columns);
            assert_eq!(long, None, "a line is longer than {columns} columns");
            let file = format!("{}/src/tune/shown/{name}.{columns}.txt", env!("CARGO_MANIFEST_DIR"));
            if std::env::var_os("ASHORE_BLESS").is_some() {
                std::fs::write(&file, &shown).unwrap();
            }
            assert!(
                shown == std::fs::read_to_string(&file).unwrap_or_default(),
                "{file} has another text than\n{shown}"
            );
        }
    }
}
