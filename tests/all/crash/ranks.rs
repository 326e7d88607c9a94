//! Several ranks on one simulated file system that all of them see alike: a commit is whole on every image
//! that a power failure can leave, and no rank was told anything else.

use super::expected::{Event, Expected, Try};
use super::explore::{Findings, Run, Verdict, each, each_on, rounds};
use crate::ranks::board::Board;
use ashore::id::step_name;
use ashore::storage::Storage;
use ashore::storage::local::Local;
use ashore::testing::simfs::{Fault, Image, SimFs};
use ashore::{Catalog, Checkpoint, CheckpointExecutor, Error, ErrorKind, Result, SaveOptions, StateDict};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const ROOT: &str = "/data/run";
const LONG: Duration = Duration::from_secs(60);
const CHUNK: usize = 4096;
const LENGTHS: [usize; 3] = [5000, 300, 9000];

/// Attempts made after a crash count from here: no number is used twice.
const AFTER: u32 = 100;

/// A job of several ranks; all of them are threads of this process.
struct Job<'a> {
    fs: &'a SimFs,
    ranks: Vec<CheckpointExecutor>,
    /// How long a save may take.
    timeout: Duration,
    expected: &'a mut Expected,
}

impl<'a> Job<'a> {
    fn start(fs: &'a SimFs, world: usize, timeout: Duration, expected: &'a mut Expected) -> Result<Self> {
        let board = Board::new();
        let build = |rank: usize| {
            let storage = Arc::new(Local::with_sys(Arc::new(fs.clone()), ROOT)?);
            let coordinator = board.rank(rank as u32, world as u32);
            CheckpointExecutor::builder(ROOT)
                .storage(storage)
                .arena(4 * CHUNK as u64)
                .chunk(CHUNK as u64)
                .writers(1)
                .keep_last(2)
                .ranks(coordinator)
                .build()
        };
        let ranks = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || build(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Result<_>>()
        });
        expected.keep_last = Some(2);
        Ok(Self { fs, ranks: ranks?, timeout, expected })
    }

    /// Saves on all ranks. What any rank is told must be true.
    fn save(&mut self, one: Try, overwrite: bool) -> Result<()> {
        self.expected.note(self.fs.position(), Event::Begun(one));
        let save = |rank: usize, executor: &CheckpointExecutor| {
            let mut state = StateDict::new();
            state.tensor(format!("rank {rank}"), Arc::new(one.bytes(rank, LENGTHS[rank])))?;
            state.value("number", &one.number)?;
            let mut options = SaveOptions::default().timeout(self.timeout);
            options.overwrite = overwrite;
            executor.save_with(one.step, state, options)?.wait(LONG)
        };
        let save = &save;
        let ended: Vec<Result<ashore::Outcome>> = std::thread::scope(|scope| {
            let threads =
                self.ranks.iter().enumerate().map(|(rank, executor)| scope.spawn(move || save(rank, executor)));
            threads.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let position = self.fs.position();
        let mut failed = None::<Error>;
        for ended in &ended {
            match ended {
                Ok(_) => self.expected.note(position, Event::Saved(one)),
                Err(error) if error.kind() == ErrorKind::Indeterminate || self.fs.killed() => {
                    failed.get_or_insert(error.clone());
                }
                Err(error) => {
                    self.expected.note(position, Event::Failed(one));
                    failed.get_or_insert(error.clone());
                }
            }
        }
        let known = |wanted: fn(&Result<ashore::Outcome>) -> bool| ended.iter().any(wanted);
        let killed = self.fs.killed();
        let contradiction = known(|ended| ended.is_ok())
            && known(|ended| ended.as_ref().is_err_and(|error| error.kind() != ErrorKind::Indeterminate));
        assert!(killed || !contradiction, "ranks were told different outcomes: {ended:?}");
        failed.map_or(Ok(()), Err)
    }

    fn run(self) -> Run {
        self.ranks.iter().for_each(|rank| drop(rank.shutdown(LONG)));
        drop(self.ranks);
        Run { history: self.fs.history(), expected: self.expected.clone() }
    }
}

fn judge(image: &Image) -> Verdict {
    let fs = SimFs::boot(image);
    let storage: Arc<dyn Storage> = match Local::at_with_sys(Arc::new(fs.clone()), ROOT) {
        Ok(local) => Arc::new(local),
        Err(error) if error.kind() == ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => panic!("{error}"),
    };
    let entries = Catalog::over(storage.clone()).list().unwrap();
    entries.into_iter().map(|entry| (entry.step, load(&storage, entry.step))).collect()
}

fn load(storage: &Arc<dyn Storage>, step: u64) -> Result<Try, String> {
    let checkpoint = Checkpoint::from_storage(storage.clone(), &step_name(step)).map_err(|error| error.to_string())?;
    let checkpoint = checkpoint.with_threads(1);
    let number = checkpoint.value::<u32>("number").map_err(|error| error.to_string())?;
    let one = Try { step, number };
    for (rank, length) in LENGTHS.into_iter().enumerate().take(checkpoint.world() as usize) {
        let bytes = checkpoint.read(&format!("rank {rank}")).map_err(|error| error.to_string())?;
        if bytes != one.bytes(rank, length) {
            return Err(format!("rank {rank} has other bytes"));
        }
    }
    Ok(one)
}

/// Four steps, one of which is saved twice.
fn live(world: usize) -> Run {
    let (fs, mut expected) = (SimFs::new(), Expected::default());
    let mut job = Job::start(&fs, world, LONG, &mut expected).unwrap();
    for (step, number) in [(1, 0), (2, 0), (2, 1), (3, 0), (4, 0)] {
        job.save(Try { step, number }, number > 0).unwrap();
    }
    job.run()
}

#[test]
fn ranks_on_a_medium_that_loses_power_at_any_moment() {
    let findings = Findings::new(judge);
    each(rounds() * 2, |round| {
        findings.explore(&live(2 + round % 2), 0..usize::MAX, round as u64, 200, u64::MAX, |_, _, _| ());
    });
    findings.conclude(10_000);
}

/// Saves two steps, applies `harm` to the next, and starts the job again; then the power fails.
fn second_job(story: usize, harm: impl Fn(&SimFs), findings: &Findings) -> bool {
    let (fs, mut expected) = (SimFs::new(), Expected::default());
    let mut job = Job::start(&fs, 2, Duration::from_millis(200), &mut expected).unwrap();
    let first = job.save(Try { step: 1, number: 0 }, false);
    let before = fs.position();
    harm(&fs);
    let _ = job.save(Try { step: 2, number: 0 }, false);
    let _ = job.save(Try { step: 2, number: 1 }, true);
    let killed = fs.killed();
    drop(job);
    fs.restart();
    // A loaded machine may have let the first deadline pass.
    if first.is_ok() {
        let mut job = Job::start(&fs, 2, LONG, &mut expected).unwrap();
        job.save(Try { step: 3, number: AFTER }, false).unwrap();
        findings.explore(&job.run(), before..usize::MAX, story as u64, 10, u64::MAX, |_, _, _| ());
    }
    killed
}

#[test]
fn ranks_killed_at_any_call_on_a_medium_that_loses_power_later() {
    let findings = Findings::new(judge);
    let kills = AtomicUsize::new(0);
    each_on(32, CALLS, |calls| {
        let killed = second_job(calls, |fs| fs.kill_after(calls as u64), &findings);
        kills.fetch_add(usize::from(killed), Ordering::Relaxed);
    });
    assert!(kills.into_inner() < CALLS, "there are calls after the last kill");
    findings.conclude(5_000);
}

#[test]
fn ranks_any_call_of_which_fails_on_a_medium_that_loses_power_later() {
    let findings = Findings::new(judge);
    each_on(32, CALLS, |calls| {
        let fault = Fault { call: None, after: calls as u64, errno: libc::EIO, sticky: false, done: calls % 2 == 1 };
        second_job(calls, |fs| fs.fail(fault), &findings);
    });
    findings.conclude(5_000);
}

/// More than the harmed saves make.
const CALLS: usize = 400;
