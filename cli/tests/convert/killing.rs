//! Runs that are killed, and what the next one does.

use super::fixtures::{assert_equal, convert, expected, files, hidden, json, refused, save};
use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

/// Runs a conversion until `enough` of the names in its attempt, and kills it then. False if it ended before.
fn killed(arguments: &[&str], step: &Path, output: &Path, enough: impl Fn(&[String]) -> bool) -> bool {
    let mut child = convert(arguments, step, output).stdout(Stdio::null()).spawn().unwrap();
    let name = format!(".{}.", output.file_name().unwrap().to_str().unwrap());
    loop {
        let there = hidden(output.parent().unwrap());
        let attempt = there.iter().find(|there| there.starts_with(&name) && there.ends_with(".tmp"));
        let entries = attempt.and_then(|attempt| fs::read_dir(output.parent().unwrap().join(attempt)).ok());
        let names: Vec<String> =
            entries.into_iter().flatten().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        if enough(&names) {
            child.kill().unwrap();
            child.wait().unwrap();
            return true;
        }
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success());
            return false;
        }
    }
}

/// How many shards are complete: those with a table.
fn complete(names: &[String]) -> usize {
    names.iter().filter(|name| name.contains("-of-") && name.ends_with(".table")).count()
}

#[test]
fn a_run_that_is_killed_at_any_moment_is_gone_on_with_by_the_next() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 3);
    for arguments in [&["--to", "hf"][..], &["--to", "ranks", "4"]] {
        let arguments = [arguments, &["--json", "--shard-size", "1kB", "--arena", "4MiB"]].concat();
        let clean = root.path().join(format!("clean-{}", arguments[1]));
        json(&convert(&arguments, &step, &clean).output().unwrap());
        let whole = files(&clean);
        let mut kills = 0;
        for round in 0..4 {
            let output = root.path().join(format!("killed-{}-{round}", arguments[1]));
            // Each time as soon as there is more than before, and a moment later.
            let mut most = 0;
            loop {
                let more = |names: &[String]| {
                    let more = names.len() > most;
                    std::thread::sleep(if more { Duration::from_micros(700 * round) } else { Duration::ZERO });
                    more
                };
                let was_killed = killed(&arguments, &step, &output, more);
                // Under its name the output is whole or absent.
                if output.exists() {
                    assert!(files(&output) == whole, "round {round}");
                }
                if !was_killed || output.exists() {
                    break;
                }
                kills += 1;
                most += 2;
            }
            let report = json(&convert(&arguments, &step, &output).output().unwrap());
            assert_eq!(report["already_complete"], true, "{report}");
            fs::remove_dir_all(output).unwrap();
        }
        assert!(kills >= 4, "{kills}");
        assert_eq!(hidden(root.path()), [""; 0]);
    }
}

#[test]
fn complete_files_of_a_killed_run_are_kept_and_damaged_ones_are_not() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 3);
    for to in [&["--to", "hf"][..], &["--to", "ranks", "2"]] {
        let arguments = [to, &["--json", "--shard-size", "1kB", "--arena", "4MiB"]].concat();
        let clean = root.path().join(format!("clean-{}", to[1]));
        let all = json(&convert(&arguments, &step, &clean).output().unwrap())["files"].as_array().unwrap().len();
        let whole = files(&clean);
        for (round, damage) in [None, Some("safetensors"), Some("table")].into_iter().enumerate() {
            let output = root.path().join(format!("killed-{}-{round}", to[1]));
            // Until it is seen in time.
            while !killed(&arguments, &step, &output, |names| complete(names) >= 2) {
                fs::remove_dir_all(&output).unwrap();
            }
            let attempt = hidden(root.path()).into_iter().find(|name| name.ends_with(".tmp")).unwrap();
            let attempt = root.path().join(attempt);
            let left = files(&attempt);
            let done = complete(&left.keys().cloned().collect::<Vec<_>>());
            if let Some(kind) = damage {
                let table = left.keys().find(|name| complete(&[(*name).clone()]) == 1).unwrap();
                let file = attempt.join(table).with_extension(kind);
                let mut bytes = fs::read(&file).unwrap();
                let middle = bytes.len() - 9;
                bytes[middle] ^= 1;
                fs::write(&file, bytes).unwrap();
            }
            let report = json(&convert(&arguments, &step, &output).output().unwrap());
            let kept = report["kept"].as_u64().unwrap() as usize;
            // The table of the last one may have been half written.
            assert!((done - 1..=done).contains(&(kept + usize::from(damage.is_some()))), "{kept} of {done}");
            assert!(all >= 6 && kept < all && report["already_complete"] == false, "{report}");
            assert!(files(&output) == whole, "{to:?} {damage:?}");
        }
        assert_eq!(hidden(root.path()), [""; 0]);
    }
}

/// Leaves an attempt at `output` with the files of `clean`, as a run that is killed right before its publish
/// does.
fn left_before_publish(arguments: &[&str], step: &Path, output: &Path, clean: &Path) {
    let parent = output.parent().unwrap();
    while !killed(arguments, step, output, |names| complete(names) >= 1) || output.exists() {
        fs::remove_dir_all(output).unwrap();
    }
    let attempt = parent.join(hidden(parent).into_iter().find(|name| name.ends_with(".tmp")).unwrap());
    for name in files(&attempt).keys() {
        fs::remove_file(attempt.join(name)).unwrap();
    }
    for (name, bytes) in files(clean) {
        fs::write(attempt.join(name), bytes).unwrap();
    }
}

/// Before the publish the tables beside the shards of a model are deleted. A kill then loses nothing either.
#[test]
fn a_run_that_was_killed_before_its_publish_keeps_every_file() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 1);
    let (arguments, clean) = (["--to", "hf", "--json", "--shard-size", "1MB"], root.path().join("clean"));
    let all = json(&convert(&arguments, &step, &clean).output().unwrap())["files"].as_array().unwrap().len();
    let output = root.path().join("killed");
    left_before_publish(&arguments, &step, &output, &clean);
    let report = json(&convert(&arguments, &step, &output).output().unwrap());
    assert_eq!(report["kept"], all);
    assert!(files(&output) == files(&clean));
}

/// The second run deletes the manifest before it writes it again, and is killed in between.
#[test]
fn a_run_that_is_killed_after_one_that_was_killed_before_its_publish_keeps_every_file() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 1);
    let (arguments, clean) = (["--to", "hf", "--json", "--shard-size", "1MB"], root.path().join("clean"));
    let all = json(&convert(&arguments, &step, &clean).output().unwrap())["files"].as_array().unwrap().len();
    let mut kills = 0;
    for round in 0..20 {
        let output = root.path().join(format!("killed-{round}"));
        left_before_publish(&arguments, &step, &output, &clean);
        let without = |names: &[String]| !names.is_empty() && !names.iter().any(|name| name == "manifest.json");
        let was_killed = killed(&arguments, &step, &output, without);
        if was_killed && !output.exists() {
            kills += 1;
            let report = json(&convert(&arguments, &step, &output).output().unwrap());
            assert_eq!(report["kept"], all, "{report}");
        }
        assert!(files(&output) == files(&clean));
        fs::remove_dir_all(output).unwrap();
        if kills == 3 {
            return;
        }
    }
    assert!(kills > 0, "no run was seen without its manifest");
}

#[test]
fn a_conversion_that_another_process_writes_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let step = save(root.path(), 1);
    let output = root.path().join("model");
    let arguments = ["--to", "hf", "--shard-size", "100kB", "--arena", "4MiB"];
    let mut first = convert(&arguments, &step, &output).stdout(Stdio::null()).spawn().unwrap();
    while hidden(root.path()).iter().all(|name| !name.ends_with(".tmp")) && !output.exists() {
        std::thread::yield_now();
    }
    let second = convert(&arguments, &step, &output).output().unwrap();
    assert!(first.wait().unwrap().success());
    // The first one may have ended meanwhile.
    if second.status.success() {
        assert!(String::from_utf8_lossy(&second.stdout).contains("converted already"), "{second:?}");
    } else {
        let text = refused(&second, 1);
        assert!(text.contains("another process writes it at present") || text.contains("the step exists"), "{text}");
    }
    assert_equal(&output, &expected());
}
