//! A call takes the same number of places among the saves on every rank, however it ends.

use super::job::Job;
use ashore::compat::torch::{AsyncCheckpointExecutor, DefaultSavePlanner, ExecuteOptions, Staging};
use ashore::{ErrorKind, Result, StateDict};
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(300);
/// The deadline of calls that work. Ranks out of step wait until then.
const ENOUGH: Duration = Duration::from_secs(15);

fn state(rank: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor(format!("rank.{rank}"), vec![rank as u8; 100]).unwrap();
    state
}

fn to(step: u64) -> ExecuteOptions {
    ExecuteOptions::new().checkpoint_id(format!("step-{step}"))
}

fn planned(step: u64) -> ExecuteOptions {
    to(step).planner(DefaultSavePlanner::new())
}

/// Saves with a planner of the program and without one.
fn assert_in_step(job: &Job, root: &Path, steps: [u64; 2]) {
    for (step, options) in [(steps[0], planned as fn(u64) -> _), (steps[1], to)] {
        let saved = job.each(|rank, executor, _| {
            executor.execute_save(state(rank).into(), options(step).timeout(ENOUGH))?.result(ENOUGH)
        });
        saved.into_iter().for_each(|saved| assert!(saved.unwrap().is_some()));
        let checkpoint = ashore::Catalog::open(root).unwrap().checkpoint(step).unwrap();
        assert_eq!(checkpoint.read_as::<u8>("rank.1").unwrap(), [1; 100]);
    }
}

/// The files below `root` whose name has `part` in it.
fn named(root: &Path, part: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let below = |path: PathBuf| match path.is_dir() {
        true => named(&path, part),
        false => Vec::from_iter(path.to_string_lossy().contains(part).then_some(path)),
    };
    entries.flat_map(below).collect()
}

/// Rank 0 submitted the save, and rank 1, which could not read the last answer, did not count it: each later
/// save of one rank met another save of the other.
#[test]
fn a_rank_that_alone_misses_the_last_answer_of_a_planner_stays_in_step() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2);
    let path = root.path().to_owned();
    *job.groups[1].after.lock().unwrap() = Some(Box::new(move || {
        let answers = named(&path, "from-receipt-00000");
        answers.iter().for_each(|answer| std::fs::write(answer, "something else").unwrap());
        false
    }));
    let failed = job.each(|rank, executor, _| {
        executor.execute_save(state(rank).into(), planned(1).timeout(ENOUGH))?.result(ENOUGH)
    });
    for failed in failed {
        let error = failed.unwrap_err();
        assert!(error.kind() == ErrorKind::Corrupt && error.message().contains("note"), "{error}");
    }
    *job.groups[1].after.lock().unwrap() = None;
    assert_in_step(&job, root.path(), [2, 3]);
}

/// The call is refused before the save that it waited for has its place, and takes all of its own.
#[test]
fn a_call_that_is_refused_while_an_earlier_save_waits_for_its_state_stays_in_step() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2);
    let failed = job.each(|rank, executor, _| {
        let (deliver, staged) = channel();
        let staging = Staging::future(async move {
            let _ = staged.recv_timeout(ENOUGH);
            Ok(state(rank))
        });
        let earlier = executor.execute_save(staging.into(), to(1).timeout(ENOUGH)).unwrap();
        // The state of rank 1 comes at once, that of rank 0 after the deadline of the second call.
        let timeout = if rank == 0 { SHORT } else { ENOUGH };
        if rank == 1 {
            deliver.send(()).unwrap();
        }
        let later = executor.execute_save(state(rank).into(), planned(2).timeout(timeout));
        let later = later.and_then(|later| later.result(ENOUGH));
        drop(deliver);
        [earlier.result(ENOUGH), later]
    });
    for error in failed.into_iter().flatten().map(Result::unwrap_err) {
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    assert_in_step(&job, root.path(), [3, 4]);
}
