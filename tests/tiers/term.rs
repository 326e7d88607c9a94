//! SIGTERM: the newest durable step is promoted, and the report says what each tier has.

use super::{LONG, Troubled, executor, save, steps};
use ashore::sigterm::{Exit, Sigterm};
use ashore::storage::local::Local;
use ashore::tiers::Tier;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

const FOLDER: &str = "ASHORE_TIERS_TERM";
const STEPS: u64 = 12;

#[test]
fn sigterm_promotes_the_newest_durable_step_only_and_reports_each_tier() {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return train(Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", "term::sigterm_promotes_the_newest_durable_step_only_and_reports_each_tier"])
        .env(FOLDER, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with("saved")), "the steps are saved");
    let pid = rustix::process::Pid::from_raw(child.id().try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let told = lines.find(|line| line.starts_with("told ")).expect("a report");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    let there = steps(&folder.path().join("tier"));
    assert!(there.contains(&STEPS), "{there:?}");
    assert!(there.len() < STEPS as usize, "older steps were not promoted: {there:?}");
    let lacks: Vec<u64> = (1..=STEPS).filter(|step| !there.contains(step)).collect();
    assert_eq!(told, format!("told far newest={STEPS} lacks={lacks:?} cut_short=false"));
}

/// Saves faster than the tier takes steps, and waits for the signal.
fn train(folder: &Path) {
    let slow = Troubled::slow(Local::open(folder.join("tier")).unwrap(), Duration::from_millis(400));
    let executor = Arc::new(executor(&folder.join("root"), [Tier::over("far", Arc::new(slow))]));
    let hook = Sigterm::on(&executor).timeout(Duration::from_secs(30)).exit(Exit::Code { durable: 0, lost: 75 });
    let hook = hook.report(|report| {
        let tier = &report.tiers[0];
        let newest = tier.newest.unwrap();
        println!("told {} newest={newest} lacks={:?} cut_short={}", tier.tier, tier.lacks, report.cut_short);
        std::io::stdout().flush().unwrap();
    });
    let _hook = hook.install().unwrap();
    for step in 1..=STEPS {
        drop(save(&executor, step));
    }
    println!("\nsaved");
    std::thread::sleep(LONG);
}
