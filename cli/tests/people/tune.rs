//! `ashore tune` on real directories: what it refuses, and what it leaves behind.

use crate::run::Run;
use ashore::Attempt;
use ashore::storage::{Storage, local::Local};
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn the_tensors_are_those_of_the_newest_step_or_as_given_and_nothing_stays() {
    let run = Run::new([10, 20]);
    run.save_many(30, 50);
    let before = names(&run.root());
    let tuned = run.json(&["tune", "run", "--for", "0s", "--json"], 0);
    assert_eq!((tuned["state"]["tensors"].as_u64(), tuned["state"]["bytes"].as_u64()), (Some(50), Some(800)));
    let tuned = run.json(&["tune", "run", "--like", "run/step-00000020", "--for", "0s", "--json"], 0);
    assert_eq!(tuned["state"]["tensors"], 3);
    let tuned = run.json(&["tune", "run", "--bytes", "3MiB", "--tensors", "7", "--for", "0s", "--json"], 0);
    assert_eq!((tuned["state"]["tensors"].as_u64(), tuned["state"]["bytes"].as_u64()), (Some(7), Some(3 << 20)));
    assert_eq!(tuned["interval"]["young_seconds"], serde_json::Value::Null);
    assert_eq!(names(&run.root()), before);
    let text = String::from_utf8(run.ashore(&["tune", "run", "--for", "0s"], 80).stdout).unwrap();
    assert!(text.lines().all(|line| line.chars().count() <= 80 || !line.trim().contains(' ')), "{text}");
}

#[test]
fn what_cannot_be_measured_is_refused_in_a_sentence() {
    let run = Run::new([]);
    run.shows("tune-missing", &["tune", "nowhere"]);
    run.shows("tune-empty", &["tune", "run"]);
    run.shows("tune-store", &["tune", "s3://bucket/run"]);
    let output = run.ashore(&["tune", "run", "--bytes", "4000TiB", "--tensors", "1000"], 80);
    let why = String::from_utf8(output.stderr).unwrap();
    assert!(why.contains("two steps of 4.4 PB do not fit") && why.contains("are free"), "{why}");
    let storage = Local::open(run.root()).unwrap();
    let attempt = storage.begin("step-00000060", Attempt::new(), false).unwrap();
    run.shows("tune-in-flight", &["tune", "run", "--bytes", "1MiB", "--tensors", "2"]);
    attempt.abandon().unwrap();
    assert!(names(&run.root()).iter().all(|name| name.starts_with('.')), "{:?}", names(&run.root()));
}

/// A program that a signal ends runs no destructors, and `tune` writes gigabytes.
#[test]
fn an_interrupt_leaves_nothing_behind() {
    let run = Run::new([10]);
    let before = names(&run.root());
    for signal in ["-INT", "-TERM"] {
        let mut tune = Command::new(env!("CARGO_BIN_EXE_ashore"));
        tune.args(["tune", "run", "--for", "60s"]).current_dir(run.root().parent().unwrap());
        let mut tune = tune.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        while names(&run.root()) == before {
            assert!(tune.try_wait().unwrap().is_none(), "it ended before it had written anything");
            std::thread::yield_now();
        }
        let killed = Command::new("kill").args([signal, &tune.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let mut why = String::new();
        tune.stderr.take().unwrap().read_to_string(&mut why).unwrap();
        assert_eq!(tune.wait().unwrap().code(), Some(1), "{why}");
        assert!(why.contains("interrupted"), "{why}");
        assert_eq!(names(&run.root()), before);
    }
}
