//! A root that a process of its own writes keeps the promises of a storage, and serves an executor as any
//! other does.

use crate::fixtures::executor::{LONG, one, pattern};
use ashore::storage::process::{Process, Program, serve};
use ashore::testing::conformance::BEHAVIOURS;
use ashore::{CheckpointExecutor, ErrorKind, Settings};
use std::path::Path;
use std::sync::Arc;

#[test]
#[ignore = "the writer process of the tests below"]
fn the_writer() {
    serve().unwrap();
}

fn process(root: &Path) -> Process {
    let test = "storage::process_conformance::the_writer";
    let arguments = [test, "--ignored", "--exact", "--nocapture", "--test-threads", "1"];
    let program = Program::default().path(std::env::current_exe().unwrap()).arguments(arguments);
    Process::start(root, &Settings::default(), program).unwrap()
}

/// An attempt is memory of the program until it is handed over, so that a sweep has no dead one to find.
const NOT_SO: &str = "a sweep removes the dead and leaves the living";

#[test]
#[cfg_attr(miri, ignore = "processes")]
fn process_conformance() {
    let directory = tempfile::tempdir().unwrap();
    let behaviours: Vec<_> = BEHAVIOURS.iter().filter(|(name, _)| *name != NOT_SO).collect();
    assert_eq!(behaviours.len() + 1, BEHAVIOURS.len());
    for (index, (name, behaviour)) in behaviours.into_iter().enumerate() {
        println!("behaviour: {name}");
        behaviour(&(Arc::new(process(&directory.path().join(index.to_string()))) as _));
    }
}

#[test]
#[cfg_attr(miri, ignore = "processes")]
fn an_executor_keeps_its_steps_by_a_writer_process() {
    let root = tempfile::tempdir().unwrap();
    let process = process(root.path());
    let build = CheckpointExecutor::builder(root.path()).arena(4 * 4096).chunk(4096).keep_last(2);
    let executor = build.storage(Arc::new(process.clone())).build().unwrap();
    for step in 1..=4 {
        let save = executor.save(step, one("t", pattern(step, 30_000))).unwrap();
        save.wait(LONG).unwrap().committed().unwrap();
    }
    let again = executor.save(4, one("t", pattern(5, 30_000))).unwrap();
    assert_eq!(again.wait(LONG).unwrap_err().kind(), ErrorKind::Conflict);
    executor.shutdown(LONG).unwrap();
    assert_eq!(executor.catalog().list().unwrap().iter().map(|entry| entry.step).collect::<Vec<_>>(), [3, 4]);
    let newest = executor.latest().unwrap().unwrap();
    assert!(newest.verify().unwrap().is_sound() && newest.read("t").unwrap() == pattern(4, 30_000));
    assert!(crate::fixtures::executor::hidden(root.path()).is_empty() && process.pid().is_some());
}
