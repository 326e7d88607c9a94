//! The example is killed in training by SIGKILL, and resumes bit for bit.

use ashore::{Catalog, Checkpoint};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const EPOCHS: u64 = 40;

#[test]
fn a_training_that_is_killed_resumes_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let [whole, killed, forgetful] = ["whole", "killed", "forgetful"].map(|name| dir.path().join(name));
    train(&whole, &[], None);
    assert!(train(&killed, &[], Some(5)).is_none(), "the first run begins anew");
    for durable in [12, 21, 30] {
        let resumed = train(&killed, &[], Some(durable)).expect("the training resumes");
        assert!(resumed < EPOCHS);
    }
    assert!(train(&killed, &[], None).unwrap() >= 30, "a durable step is not lost");
    assert_eq!(difference(&whole, &killed), None);

    train(&forgetful, &[], Some(20));
    train(&forgetful, &["--forget-optimizer"], None);
    let other = difference(&whole, &forgetful).expect("moments matter");
    assert!(other.starts_with("model."), "{other}");
}

/// Trains in `root`, and kills the training when it says that step `kill_at` is durable. Returns the step
/// from which it resumed.
fn train(root: &Path, arguments: &[&str], kill_at: Option<u64>) -> Option<u64> {
    let mut command = Command::new(example());
    command.arg(root).arg(EPOCHS.to_string()).args(arguments).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut resumed, mut killed) = (None, false);
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        let (word, step) = line.split_once(' ').unwrap();
        let step: u64 = step.parse().unwrap();
        match word {
            "resumed" => resumed = Some(step),
            "durable" if kill_at.is_some_and(|at| step >= at) && !killed => {
                child.kill().unwrap(); // SIGKILL
                killed = true;
            }
            "durable" => {}
            _ => panic!("{line}"),
        }
    }
    let ended = child.wait().unwrap();
    assert_eq!(ended.success(), kill_at.is_none(), "{ended}");
    resumed
}

/// The first tensor of the last step that differs between the two directories.
fn difference(one: &Path, other: &Path) -> Option<String> {
    let [one, other] = [one, other].map(|root| {
        let checkpoint: Checkpoint = Catalog::open(root).unwrap().latest().unwrap().unwrap();
        assert_eq!(checkpoint.step(), EPOCHS);
        checkpoint
    });
    let names = |checkpoint: &Checkpoint| -> Vec<String> {
        checkpoint.tensors().unwrap().map(|tensor| tensor.name.to_owned()).collect()
    };
    assert_eq!(names(&one), names(&other));
    assert!(names(&one).iter().any(|name| name == "optimizer.hidden.weight.momentum.moment_2"));
    names(&one).into_iter().find(|name| one.read(name).unwrap() != other.read(name).unwrap())
}

/// The example that cargo built beside this test.
fn example() -> PathBuf {
    let built = std::env::current_exe().unwrap().parent().unwrap().with_file_name("examples").join("train");
    assert!(built.exists(), "run the whole `cargo test`, which builds the example {}", built.display());
    built
}
