//! A process that promotes is killed at random moments, and started again.

use super::{LONG, executor, same, save, shared, steps};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

/// The folder of a killed process: it runs as this test in a process of its own.
const FOLDER: &str = "ASHORE_TIERS_KILLED";

/// What the process says of a durable step.
const DURABLE: &str = "a step is durable";

/// How often the process is killed; `ASHORE_TIERS_KILLS` changes it.
const KILLS: u64 = 25;

#[test]
fn killed_at_random_moments_every_step_in_the_tier_is_whole_and_the_first_tiers() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return train(&PathBuf::from(folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let (root, tier) = (folder.path().join("root"), folder.path().join("tier"));
    let kills = std::env::var("ASHORE_TIERS_KILLS").map_or(KILLS, |kills| kills.parse().unwrap());
    let mut seed = u64::from_le_bytes(uuid::Uuid::new_v4().as_bytes()[..8].try_into().unwrap());
    for kill in 0..kills {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kills::killed_at_random_moments_every_step_in_the_tier_is_whole_and_the_first_tiers"])
            .arg("--nocapture")
            .env(FOLDER, folder.path())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        // Every other one is killed after a step, however slow the machine is.
        if kill % 2 == 0 {
            let said = BufReader::new(child.stdout.take().unwrap());
            assert!(said.lines().any(|line| line.unwrap() == DURABLE), "a process ended before it was killed");
        }
        std::thread::sleep(Duration::from_millis(20 + (seed >> 33) % 180));
        child.kill().unwrap();
        child.wait().unwrap();
        if tier.exists() {
            same(&root, &tier);
        }
    }
    let last = executor(&root, [shared(&tier)]);
    last.shutdown(5 * LONG).unwrap();
    same(&root, &tier);
    assert_eq!(steps(&tier), steps(&root), "what the killed ones left is promoted");
    assert!(steps(&root).len() > 1, "too few steps: {:?}", steps(&root));
    let hidden = std::fs::read_dir(&tier).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let left: Vec<String> = hidden.filter(|name| name.starts_with(".step-")).collect();
    assert!(left.is_empty(), "attempts of killed processes are left: {left:?}");
}

/// Saves until it is killed.
fn train(folder: &std::path::Path) {
    let executor = executor(&folder.join("root"), [shared(&folder.join("tier"))]);
    let mut step = executor.latest().unwrap().map_or(0, |newest| newest.step());
    loop {
        step += 1;
        drop(save(&executor, step));
        // A pipe that the other process has closed is no error here.
        let _ = std::io::Write::write_all(&mut std::io::stdout(), format!("\n{DURABLE}\n").as_bytes());
    }
}
