//! The log that every run leaves in its root.

use super::{LONG, executor, save, state};
use ashore::internal::run_log::{Ended, Run, runs};
use ashore::storage::Memory;
use ashore::{CheckpointExecutor, SaveOptions};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

fn only(root: &Path) -> Run {
    let logs = runs(root).unwrap();
    assert_eq!(logs.len(), 1, "{logs:?}");
    Run::read(&logs[0]).unwrap()
}

fn lines(root: &Path) -> Vec<String> {
    let text = fs::read_to_string(&runs(root).unwrap()[0]).unwrap();
    text.lines().map(str::to_owned).collect()
}

#[test]
fn each_save_leaves_one_line_with_its_times_in_their_order() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_micros() as u64;
    (1..=5).for_each(|step| save(&executor, step));
    executor.shutdown(LONG).unwrap();
    let run = only(root.path());
    assert_eq!(run.saves.iter().map(|save| save.step).collect::<Vec<_>>(), [1, 2, 3, 4, 5]);
    assert!(run.closed.is_some() && run.unread == 0);
    let head = run.head.unwrap();
    assert_eq!((head.pid, head.world, head.settings.unwrap().keep_last), (std::process::id(), 1, Some(2)));
    for save in run.saves {
        assert_eq!((save.end, save.bytes, save.chunks), (Ended::Durable, 20_000, 5 + 1), "{save:?}");
        assert!(save.written_bytes > 20_000 && save.staged_bytes == save.written_bytes, "{save:?}");
        assert!(save.at >= before - 1_000_000 && save.call > 0, "{save:?}");
        assert!(0 < save.stage_at && save.stage_at <= save.write_at && save.write_at <= save.written, "{save:?}");
        assert!(save.written <= save.ended && save.staged <= save.ended && save.write > 0, "{save:?}");
    }
    // A tenth of a line is the head of 5 saves.
    let longest = lines(root.path()).iter().skip(1).map(String::len).max().unwrap();
    assert!(longest < 400, "a line of {longest} bytes");
}

#[test]
fn a_failed_save_says_why_and_what_never_began_has_a_line_too() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    save(&executor, 1);
    let twice = executor.save(1, state(100)).unwrap();
    twice.wait(LONG).unwrap_err();
    let cancelled = executor.save_with(2, state(1 << 20), SaveOptions::default().timeout(Duration::ZERO)).unwrap();
    cancelled.wait(LONG).unwrap_err();
    executor.shutdown(LONG).unwrap();
    let run = only(root.path());
    let ends: Vec<_> = run.saves.iter().map(|save| (save.step, save.end, save.kind.as_str())).collect();
    assert_eq!(ends, [(1, Ended::Durable, ""), (1, Ended::Failed, "conflict"), (2, Ended::Failed, "deadline"),]);
    assert!(run.saves[1].why.contains("exists") || !run.saves[1].why.is_empty(), "{run:?}");
}

#[test]
fn readers_pass_over_cut_lines_long_lines_and_what_they_do_not_know() {
    let root = tempfile::tempdir().unwrap();
    let executor = executor(root.path());
    (1..=2).for_each(|step| save(&executor, step));
    executor.shutdown(LONG).unwrap();
    let path = &runs(root.path()).unwrap()[0];
    let mut file = fs::OpenOptions::new().append(true).open(path).unwrap();
    let of_later = r#"{"line":"save","step":3,"end":"teleported","hue":[1,{"a":2}],"ended":7}"#;
    let long = "x".repeat(1 << 20);
    write!(file, "{{\"line\":\"weather\",\"sun\":1}}\n{{\"line\":\"sa\n{long}\n{of_later}\n\n{{\"line\":\"save\",\"st")
        .unwrap();
    let run = Run::read(path).unwrap();
    let ends: Vec<_> = run.saves.iter().map(|save| (save.step, save.end)).collect();
    assert_eq!(ends, [(1, Ended::Durable), (2, Ended::Durable), (3, Ended::Unknown)]);
    assert_eq!(run.unread, 4);
    fs::write(path, [0xff_u8; 3000]).unwrap();
    assert_eq!(Run::read(path).unwrap().unread, 1);
}

#[test]
fn no_log_is_written_where_it_is_off_or_the_storage_has_no_directory() {
    let root = tempfile::tempdir().unwrap();
    let off = CheckpointExecutor::builder(root.path()).arena(16 * 4096).chunk(4096).run_log(false).build().unwrap();
    save(&off, 1);
    off.shutdown(LONG).unwrap();
    assert_eq!(runs(root.path()).unwrap().len(), 0);
    assert!(!root.path().join(".runs").exists());
    let unused = root.path().join("in memory");
    let memory = CheckpointExecutor::builder(&unused).storage(Arc::new(Memory::new())).arena(16 * 4096).chunk(4096);
    let memory = memory.build().unwrap();
    save(&memory, 1);
    memory.shutdown(LONG).unwrap();
    assert!(!unused.exists());
}

#[test]
fn a_log_that_cannot_be_written_fails_no_save() {
    let root = tempfile::tempdir().unwrap();
    // A file where the directory of logs would be.
    fs::write(root.path().join(".runs"), "taken").unwrap();
    let executor = executor(root.path());
    (1..=3).for_each(|step| save(&executor, step));
    executor.shutdown(LONG).unwrap();
    assert_eq!(fs::read_to_string(root.path().join(".runs")).unwrap(), "taken");
}

#[test]
fn each_executor_begins_a_file_and_the_oldest_make_way_for_it() {
    let root = tempfile::tempdir().unwrap();
    let logs = root.path().join(".runs");
    fs::create_dir(&logs).unwrap();
    for old in 0..300 {
        fs::write(logs.join(format!("{old:016}-old-0000.jsonl")), "{}\n").unwrap();
    }
    fs::write(logs.join("notes.txt"), "of the user").unwrap();
    let executor = executor(root.path());
    save(&executor, 1);
    executor.shutdown(LONG).unwrap();
    let left = runs(root.path()).unwrap();
    assert_eq!(left.len(), 256);
    assert!(left[0].file_name().unwrap().to_str().unwrap().starts_with("0000000000000045"), "{:?}", left[0]);
    assert_eq!(Run::read(&left[255]).unwrap().saves.len(), 1);
    assert!(logs.join("notes.txt").exists());
}

/// Not a test: the process that is killed.
#[test]
#[ignore = "runs until it is killed, in another process"]
fn saves_until_it_is_killed() {
    let Some(root) = std::env::var_os("ASHORE_TEST_ROOT") else { return };
    let executor = executor(Path::new(&root));
    let deadline = Instant::now() + LONG;
    (1..).take_while(|_| Instant::now() < deadline).for_each(|step| save(&executor, step));
}

#[test]
fn a_killed_process_leaves_whole_lines_of_all_saves_but_the_last() {
    let root = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--ignored", "--exact", "run_log::saves_until_it_is_killed"])
        .env("ASHORE_TEST_ROOT", root.path())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let deadline = Instant::now() + LONG;
    let saved = || runs(root.path()).unwrap().first().map_or(0, |path| Run::read(path).unwrap().saves.len());
    while saved() < 20 {
        assert!(Instant::now() < deadline, "it does not save");
        std::thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let run = only(root.path());
    assert_eq!((run.unread, run.closed), (0, None));
    let steps: Vec<_> = run.saves.iter().map(|save| save.step).collect();
    assert_eq!(steps, (1..=steps.len() as u64).collect::<Vec<_>>());
    let newest = ashore::Catalog::open(root.path()).unwrap().latest().unwrap().unwrap().step();
    assert!(newest - steps.len() as u64 <= 2, "{newest} {}", steps.len());
}
