//! `ashore copy`, and `ashore ls` of several roots.

use ashore::{CheckpointExecutor, StateDict};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

fn ashore(arguments: &[&str], roots: &[&Path]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ashore"));
    command.args(&arguments[..1]).args(roots).args(&arguments[1..]).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn numbers(rows: &Value) -> Vec<u64> {
    rows.as_array().unwrap().iter().map(|row| row["step"].as_u64().unwrap()).collect()
}

fn save(root: &Path, steps: &[u64]) {
    let executor = CheckpointExecutor::builder(root).arena(1 << 20).chunk(64 << 10).build().unwrap();
    for &step in steps {
        let mut state = StateDict::new();
        state.tensor("weights", Arc::new(vec![step; 1000])).unwrap();
        executor.save(step, state).unwrap().wait(LONG).unwrap();
        executor.fence().unwrap();
    }
    executor.shutdown(LONG).unwrap();
}

#[test]
fn copies_are_made_once_and_a_fork_is_refused_and_shown() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let roots = [from.path(), to.path()];
    save(from.path(), &[1, 2, 3]);
    save(to.path(), &[2]);
    let dry = ashore(&["copy", "--all", "--dry-run", "--json"], &roots);
    assert_eq!((dry.status.code(), numbers(&json(&dry)["copied"])), (Some(1), vec![3, 1]), "{dry:?}");
    let newest = ashore(&["copy", "--json"], &roots);
    assert_eq!((newest.status.code(), numbers(&json(&newest)["copied"])), (Some(0), vec![3]), "{newest:?}");
    let all = ashore(&["copy", "--all", "--json"], &roots);
    let all_json = json(&all);
    assert_eq!(all.status.code(), Some(1), "step 2 is a fork");
    let [copied, already, failed] = ["copied", "already", "failed"].map(|rows| numbers(&all_json[rows]));
    assert_eq!((copied, already, failed), (vec![1], vec![3], vec![2]));
    let one = ashore(&["copy", "--step", "1"], &roots);
    assert!(one.status.success() && String::from_utf8_lossy(&one.stdout).contains("is there already"), "{one:?}");
    assert_eq!(ashore(&["copy", "--step", "9"], &roots).status.code(), Some(1));
    let listed = json(&ashore(&["ls", "--json"], &roots));
    let forks: Vec<u64> = numbers(&listed)
        .into_iter()
        .zip(listed.as_array().unwrap())
        .filter_map(|(step, row)| row["fork"].as_bool().unwrap().then_some(step))
        .collect();
    assert_eq!((numbers(&listed), forks), (vec![1, 2, 3], vec![2]));
    let shown = ashore(&["ls"], &roots);
    assert!(String::from_utf8_lossy(&shown.stdout).contains("FORK"), "{shown:?}");
}

#[test]
fn a_damaged_step_is_not_copied() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    save(from.path(), &[1]);
    let shard = from.path().join("step-00000001/model.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let refused = ashore(&["copy"], &[from.path(), to.path()]);
    assert_eq!(refused.status.code(), Some(3), "{refused:?}");
    assert!(!to.path().join("step-00000001").exists());
}

#[test]
fn a_step_that_is_marked_bad_is_copied_only_if_it_is_named() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let roots = [from.path(), to.path()];
    save(from.path(), &[1, 2, 3]);
    let catalog = ashore::Catalog::open(from.path()).unwrap();
    for step in [1, 3] {
        catalog.mark(step, Some(ashore::catalog::Mark::Bad)).unwrap();
    }
    let newest = ashore(&["copy", "--json"], &roots);
    assert_eq!((newest.status.code(), numbers(&json(&newest)["copied"])), (Some(0), vec![2]), "{newest:?}");
    assert!(String::from_utf8_lossy(&newest.stderr).contains("step 3 is marked bad"), "{newest:?}");
    let all = ashore(&["copy", "--all", "--json"], &roots);
    assert_eq!((all.status.code(), numbers(&json(&all)["already"])), (Some(0), vec![2]), "{all:?}");
    let named = ashore(&["copy", "--step", "3", "--json"], &roots);
    assert_eq!(numbers(&json(&named)["copied"]), [3], "{named:?}");
}
