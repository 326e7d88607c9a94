//! Directories of real runs: killed, damaged, foreign, in flight, empty.

use crate::run::Run;
use ashore::Attempt;
use ashore::storage::{Storage, local::Local};
use std::fs;
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

/// Makes the steps of a run some hours old, so that what is printed of their age does not change.
fn aged(run: &Run, steps: &[u64]) {
    for (i, step) in steps.iter().enumerate() {
        let hours = 13 - i as u64;
        for file in fs::read_dir(run.step(*step)).unwrap() {
            let file = fs::File::options().write(true).open(file.unwrap().path()).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(3600 * hours + 600)).unwrap();
        }
    }
}

#[test]
fn every_name_in_a_run_has_its_line() {
    let run = Run::new([10, 20, 30, 40, 50]);
    aged(&run, &[10, 20, 30, 40, 50]);
    run.json(&["mark", "run", "10", "keep", "--json"], 0);
    run.json(&["mark", "run", "20", "bad", "--json"], 0);
    fs::remove_file(run.step(30).join("manifest.json")).unwrap();
    run.change(&run.step(40).join("manifest.json"), |bytes| bytes.truncate(100));
    let foreign = run.root().join("checkpoint-500");
    fs::create_dir_all(run.root().join("notes")).unwrap();
    fs::create_dir_all(run.root().join("ckpt-7")).unwrap();
    fs::create_dir_all(&foreign).unwrap();
    fs::write(foreign.join("model.safetensors"), "x").unwrap();
    let storage = Local::open(run.root()).unwrap();
    let attempt = storage.begin("step-00000060", Attempt::new(), false).unwrap();
    attempt.put("model.safetensors", &[0; 5000]).unwrap();
    run.shows("ls", &["ls", "run"]);
    run.shows("verify-run", &["verify", "run"]);
    run.shows("inspect-run", &["inspect", "run"]);
    run.shows("prune-run", &["prune", "run", "--keep-last", "1"]);
    let rows = run.json(&["ls", "run", "--json"], 0);
    let states: Vec<_> =
        rows.as_array().unwrap().iter().map(|row| (row["step"].as_u64(), row["state"].as_str())).collect();
    let expected = [
        (7, "foreign"),
        (10, "complete"),
        (20, "complete"),
        (30, "damaged"),
        (40, "damaged"),
        (50, "complete"),
        (60, "in_flight"),
        (500, "foreign"),
    ];
    assert_eq!(states, expected.map(|(step, state)| (Some(step), Some(state))));
    attempt.abandon().unwrap();
}

#[test]
fn empty_and_missing_directories_are_said_to_be() {
    let run = Run::new([]);
    run.shows("ls-empty", &["ls", "run"]);
    run.shows("verify-empty", &["verify", "run"]);
    run.shows("inspect-empty", &["inspect", "run"]);
    run.shows("ls-missing", &["ls", "nowhere"]);
    run.shows("inspect-missing", &["inspect", "run", "7"]);
}

#[test]
fn files_of_several_names_are_shared_bytes() {
    let run = Run::new([10]);
    aged(&run, &[10]);
    fs::hard_link(run.shard(10), run.root().join("copy.safetensors")).unwrap();
    let row = &run.json(&["ls", "run", "--json"], 0)[0];
    assert_eq!(row["shared_bytes"].as_u64().unwrap(), fs::metadata(run.shard(10)).unwrap().len());
    run.shows("ls-shared", &["ls", "run"]);
}

#[test]
fn a_prune_says_what_it_frees() {
    let run = Run::new([]);
    run.save_alike([10, 20]);
    run.share(10, 20);
    // Retention counts from the step that was written last.
    run.save_alike([30]);
    let shard = fs::metadata(run.shard(10)).unwrap().len();
    let pruned = |keep: &str| run.json(&["prune", "run", "--keep-last", keep, "--json"], 0);
    let bytes = |pruned: &serde_json::Value| {
        let steps = pruned["removed"].as_array().unwrap().iter();
        (steps.map(|step| step["bytes"].as_u64().unwrap()).sum::<u64>(), pruned["freed_bytes"].as_u64().unwrap())
    };
    let (all, freed) = bytes(&pruned("2"));
    assert_eq!(all - freed, shard, "step 20 keeps the shard of step 10");
    let (all, freed) = bytes(&pruned("1"));
    assert_eq!(all - freed, shard, "both go, and the shard is freed once");
    let said = run.said(&["prune", "run", "--keep-last", "2"]);
    assert!(said.contains(", frees ") && said.contains(": other steps share the rest), kept 2"), "{said}");
    let done = run.json(&["prune", "run", "--keep-last", "1", "--yes", "--json"], 0);
    assert_eq!(bytes(&done), (all, freed), "as the dry run said");
    assert_eq!(run.json(&["verify", "run", "--json"], 0)["valid"], true);
}

#[test]
fn a_step_that_was_just_saved_says_how_long_it_took() {
    let run = Run::new([10]);
    let row = &run.json(&["ls", "run", "--json"], 0)[0];
    // Not every file system knows when a file was made.
    let took = row["took_seconds"].as_f64();
    assert!(took.is_none_or(|took| (0.0..60.0).contains(&took)), "{row}");
    assert!(row["age_seconds"].as_u64().is_some_and(|age| age < 600), "{row}");
}

#[test]
fn watch_tells_what_happens() {
    let run = Run::new([10]);
    let mut watch = Command::new(env!("CARGO_BIN_EXE_ashore"));
    watch.args(["watch", "run", "--for", "6s", "--json"]).current_dir(run.root().parent().unwrap());
    let watch = watch.stdout(Stdio::piped()).stdin(Stdio::null()).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(1500));
    let storage = Local::open(run.root()).unwrap();
    let attempt = storage.begin("step-00000030", Attempt::new(), false).unwrap();
    run.save([20]);
    std::thread::sleep(Duration::from_millis(1500));
    attempt.abandon().unwrap();
    fs::remove_dir_all(run.step(10)).unwrap();
    let output = watch.wait_with_output().unwrap();
    let events: Vec<serde_json::Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (event, step) in [("found", 10), ("begun", 30), ("complete", 20), ("failed", 30), ("deleted", 10)] {
        assert!(events.iter().any(|seen| seen["event"] == event && seen["step"] == step), "{event} {step}: {events:?}");
    }
    let run = Run::new([10]);
    run.shows("watch", &["watch", "run", "--for", "0s"]);
}
