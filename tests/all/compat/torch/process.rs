//! The process executor has a writer process that outlives the program; these tests also end the writer
//! first.

use crate::compat::{files, state};
use crate::fixtures::executor::{LONG, eventually, pattern};
use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, ProcessBuilder, ProcessExecutor, Staging, serve};
use ashore::testing::block_on;
use ashore::{Attempt, Catalog, Checkpoint, ErrorKind, SaveOptions, Settings};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

const ROOT: &str = "ASHORE_TEST_PROCESS";
const MODULE: &str = "compat::torch::process";

/// Starts this program again to run `test`.
fn arguments(test: &str) -> Vec<String> {
    let test = format!("{MODULE}::{test}");
    [test.as_str(), "--ignored", "--exact", "--nocapture", "--test-threads", "1"].map(str::to_owned).into()
}

#[test]
#[ignore = "the writer process of the tests below"]
fn the_writer() {
    serve().unwrap();
}

fn settings() -> Settings {
    let mut settings = Settings::default();
    (settings.arena, settings.chunk) = (4 * 4096, 4096);
    settings
}

fn builder(root: &Path) -> ProcessBuilder {
    let program = std::env::current_exe().unwrap();
    ProcessExecutor::builder(root).settings(settings()).program(program).arguments(arguments("the_writer"))
}

fn to(id: &str) -> ExecuteOptions {
    ExecuteOptions::new().checkpoint_id(id)
}

#[expect(unsafe_code, reason = "kill")]
fn signal(pid: u32, signal: i32) {
    // SAFETY: a signal to a process that a test here has started.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

#[test]
fn a_writer_process_leaves_the_bytes_that_the_engine_leaves() {
    let attempt = Attempt::new();
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plain = crate::compat::engine(ours.path()).build().unwrap();
    plain.save_with(5, state(1), SaveOptions::default().attempt(attempt)).unwrap().wait(LONG).unwrap();
    let executor = builder(theirs.path()).build().unwrap();
    let future = executor.execute_save(state(1).into(), to("step-00000005").attempt(attempt)).unwrap();
    block_on(future.staging_completion()).unwrap();
    future.result(LONG).unwrap().unwrap();
    assert_eq!(files(ours.path()), files(theirs.path()));
    assert!(executor.executor().checkpoint(5).unwrap().verify().unwrap().is_sound());

    // The same process takes the next saves, including a stream and a refusal.
    let writer = executor.writer().unwrap();
    let conflict = executor.execute_save(state(2).into(), to("step-00000005").overwrite(false)).unwrap();
    assert_eq!(conflict.result(LONG).unwrap_err().kind(), ErrorKind::Conflict);
    executor.execute_save(state(3).into(), to("step-00000005")).unwrap().result(LONG).unwrap().unwrap();
    let coming = Staging::future(async { Ok(state(4)) });
    executor.execute_save(coming.into(), to("6")).unwrap().result(LONG).unwrap().unwrap();
    let epoch = |step| executor.executor().checkpoint(step).unwrap().value::<u64>("epoch").unwrap();
    assert_eq!((epoch(5), epoch(6), executor.writer()), (3, 4, Some(writer)));
    executor.close(LONG).unwrap();
}

#[test]
fn a_program_that_is_not_there_or_is_no_writer_is_invalid_at_build() {
    let root = tempfile::tempdir().unwrap();
    let missing = builder(root.path()).program(root.path().join("ashore")).build().unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Invalid);
    let other = builder(root.path()).program("/bin/true").build().unwrap_err();
    assert_eq!(other.kind(), ErrorKind::Invalid, "{other}");
    assert!(files(root.path()).is_empty());
}

#[test]
fn a_writer_that_dies_fails_its_save_and_the_next_one_has_a_new_writer() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let first = executor.writer().unwrap();
    signal(first, libc::SIGSTOP);
    let future = executor.execute_save(state(1).into(), to("1")).unwrap();
    block_on(future.staging_completion()).unwrap();
    assert_eq!(future.result(Duration::from_millis(5)).unwrap_err().kind(), ErrorKind::Deadline);
    signal(first, libc::SIGKILL);
    assert_eq!(future.result(LONG).unwrap_err().kind(), ErrorKind::Indeterminate);
    assert_eq!(executor.writer(), None);
    executor.execute_save(state(2).into(), to("2")).unwrap().result(LONG).unwrap().unwrap();
    assert!(executor.writer().is_some_and(|second| second != first));
    assert_eq!(Catalog::open(root.path()).unwrap().list().unwrap().len(), 1);
}

#[test]
fn a_writer_that_hangs_fails_its_save_at_the_deadline() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let writer = executor.writer().unwrap();
    signal(writer, libc::SIGSTOP);
    let future = executor.execute_save(state(1).into(), to("1").timeout(Duration::from_millis(50))).unwrap();
    let kind = future.result(LONG).unwrap_err().kind();
    assert!(matches!(kind, ErrorKind::Indeterminate | ErrorKind::Deadline), "{kind:?}");
    signal(writer, libc::SIGCONT);
}

/// A forked child that dropped its copy of the executor shut down the socket that it shares to the writer
/// process: the writer took its program for ended, and ended.
#[test]
#[cfg_attr(miri, ignore = "forks")]
fn a_writer_process_stays_with_the_parent_when_a_forked_child_drops_the_executor() {
    let root = tempfile::tempdir().unwrap();
    let executor = builder(root.path()).build().unwrap();
    let writer = executor.writer().unwrap();
    crate::compat::drop_in_a_child(&executor);
    executor.execute_save(state(1).into(), to("1")).unwrap().result(LONG).unwrap().unwrap();
    assert_eq!(executor.writer(), Some(writer));
}

/// Hands over a state, and waits to be killed.
#[test]
#[ignore = "the training program of the test below"]
fn the_trainer() {
    let Ok(root) = std::env::var(ROOT) else { return };
    let executor = builder(Path::new(&root)).build().unwrap();
    let writer = executor.writer().unwrap();
    signal(writer, libc::SIGSTOP);
    let future = executor.execute_save(state(9).into(), to("step-9")).unwrap();
    block_on(future.staging_completion()).unwrap();
    println!("\n==staged {writer}");
    let _ = future.result(LONG);
}

#[test]
fn a_state_that_was_handed_over_is_durable_although_the_program_was_killed() {
    let root = tempfile::tempdir().unwrap();
    let mut trainer = Command::new(std::env::current_exe().unwrap())
        .args(arguments("the_trainer"))
        .env(ROOT, root.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(trainer.stdout.take().unwrap()).lines().map(Result::unwrap);
    let writer = said.find_map(|line| line.strip_prefix("==staged ")?.parse().ok()).unwrap();
    signal(trainer.id(), libc::SIGKILL);
    trainer.wait().unwrap();
    let listed = || Catalog::open(root.path()).unwrap().list().unwrap().len();
    assert_eq!(listed(), 0, "nothing was written: the writer stands still");
    signal(writer, libc::SIGCONT);
    eventually("the writer finishes alone", || listed() == 1);
    let step = Checkpoint::open(root.path().join("step-9")).unwrap();
    assert_eq!(step.read("model.weights").unwrap(), pattern(9, 20_000));
    assert!(step.verify().unwrap().is_sound());
    // Then it ends, and leaves nothing behind.
    eventually("it has tidied up", || crate::fixtures::executor::hidden(root.path()).is_empty());
    eventually("it has ended", || !Path::new(&format!("/proc/{writer}/root")).exists() || ended(writer));
}

/// The parent that would wait for it may be dead.
fn ended(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).map_or(true, |stat| stat.contains(") Z "))
}
