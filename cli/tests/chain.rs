//! The verbs of published versions, run as a user runs them.

use ashore::chain::Publisher;
use ashore::{Checkpoint, CheckpointExecutor, HostTensor, StateDict};
use serde_json::Value;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ashore")).args(args).arg("--json").stdin(Stdio::null()).output().unwrap()
}

fn json(output: &Output, status: i32) -> Value {
    assert_eq!(output.status.code(), Some(status), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn state(weights: &[f32]) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor("w", HostTensor::new(Arc::new(weights.to_vec()), [weights.len()])).unwrap();
    state.value("epoch", &3).unwrap();
    state
}

/// A chain of as many versions, and the last weights.
fn chain(root: &Path, versions: usize) -> Vec<f32> {
    let publisher = Publisher::open(root).unwrap().arena(4 << 20).build().unwrap();
    // Large enough that the deltas stay below half of a full.
    let mut weights = vec![1.0; 400_000];
    for version in 0..versions {
        weights[version] += 0.5;
        publisher.publish(state(&weights)).unwrap().wait(MINUTE).unwrap();
    }
    weights
}

#[test]
fn a_delta_of_two_steps_applied_to_the_first_is_the_second() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let executor = CheckpointExecutor::builder(dir.path()).arena(4 << 20).chunk(1 << 20).build().unwrap();
    let mut weights = vec![1.0; 4000];
    executor.save(1, state(&weights)).unwrap().wait(MINUTE).unwrap();
    weights[17] = 2.0;
    executor.save(2, state(&weights)).unwrap().wait(MINUTE).unwrap();
    executor.shutdown(MINUTE).unwrap();
    for form in ["packed", "indices"] {
        let (delta, made) = (path(&format!("delta-{form}")), path(&format!("made-{form}")));
        let report =
            json(&run(&["delta", &path("step-00000001"), &path("step-00000002"), "--form", form, "-o", &delta]), 0);
        assert_eq!((&report["version"], &report["changed"]), (&2.into(), &1.into()), "{report}");
        json(&run(&["apply", &path("step-00000001"), &delta, "-o", &made]), 0);
        let made = Checkpoint::open(&made).unwrap();
        assert_eq!((made.step(), made.value::<u32>("epoch").unwrap()), (2, 3));
        assert_eq!(made.read_as::<f32>("w").unwrap(), weights);
        assert!(made.verify().unwrap().is_sound());
        assert_eq!(run(&["apply", &path("step-00000002"), &delta, "-o", &path("no")]).status.code(), Some(1));
    }
}

#[test]
fn a_chain_with_a_hole_exits_with_3() {
    let dir = tempfile::tempdir().unwrap();
    chain(dir.path(), 4);
    let root = dir.path().to_str().unwrap();
    let shown = json(&run(&["chain", root]), 0);
    let versions = shown["versions"].as_array().unwrap();
    assert_eq!(versions.len(), 4);
    assert!(versions[0]["base"].is_null() && versions[3]["base"] == 3, "{shown}");
    fs::remove_dir_all(dir.path().join("v-00000003")).unwrap();
    let shown = json(&run(&["chain", root]), 3);
    assert_eq!((&shown["holes"][0]["number"], &shown["holes"][0]["missing"]), (&4.into(), &3.into()), "{shown}");
}

#[test]
fn a_followed_chain_is_a_chain() {
    let (dir, into) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    chain(dir.path(), 3);
    let (root, copy) = (dir.path().to_str().unwrap(), into.path().to_str().unwrap());
    let output = run(&["follow", root, "--into", copy, "--idle", "0"]);
    assert_eq!((output.status.code(), output.stdout.iter().filter(|byte| **byte == b'\n').count()), (Some(0), 3));
    assert_eq!(json(&run(&["chain", copy]), 0)["versions"].as_array().unwrap().len(), 3);
    let empty = tempfile::tempdir().unwrap();
    let output = run(&["follow", empty.path().to_str().unwrap(), "--into", copy, "--idle", "0"]);
    assert_eq!(output.status.code(), Some(0), "what was followed before is there");
}
