//! The whole executor on the simulated file system: staging, writers, commit, retention and sweep, with their
//! threads, read by the production reader.

use super::expected::{Event, Expected, Try};
use super::explore::{Findings, Run, Verdict, each, rounds};
use ashore::id::step_name;
use ashore::storage::Storage;
use ashore::storage::local::Local;
use ashore::testing::simfs::{Fault, Image, SimFs};
use ashore::{Catalog, Checkpoint, CheckpointExecutor, ErrorKind, Overlap, Result, Save, SaveOptions, StateDict};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const ROOT: &str = "/data/run";
const LONG: Duration = Duration::from_secs(60);
const CHUNK: usize = 4096;

/// Attempts made after a crash count from here: no number is used twice.
const AFTER: u32 = 100;

/// How a program is set up.
#[derive(Clone, Copy)]
struct Shape {
    /// The lengths of the tensors.
    tensors: &'static [usize],
    files: usize,
    writers: usize,
    keep_last: Option<usize>,
    /// The checkpoints are directories of the program's, not steps of the executor's root.
    directories: bool,
}

const SHAPES: [Shape; 5] = [
    Shape { tensors: &[9000, 300], files: 1, writers: 1, keep_last: Some(2), directories: false },
    Shape { tensors: &[5000, 0, 7000, 1], files: 2, writers: 2, keep_last: None, directories: false },
    Shape { tensors: &[600, 601, 602], files: 3, writers: 2, keep_last: Some(1), directories: false },
    Shape { tensors: &[20_000], files: 1, writers: 2, keep_last: Some(3), directories: false },
    Shape { tensors: &[5000, 300], files: 1, writers: 2, keep_last: None, directories: true },
];

/// A process that saves.
struct Program<'a> {
    fs: &'a SimFs,
    shape: Shape,
    executor: CheckpointExecutor,
    expected: &'a mut Expected,
}

impl<'a> Program<'a> {
    fn start(fs: &'a SimFs, shape: Shape, expected: &'a mut Expected) -> Result<Self> {
        expected.keep_last = shape.keep_last;
        let root = if shape.directories { "/data/other" } else { ROOT };
        let storage = Arc::new(Local::with_sys(Arc::new(fs.clone()), root)?);
        let mut builder = CheckpointExecutor::builder(root)
            .storage(storage)
            .arena(4 * CHUNK as u64)
            .chunk(CHUNK as u64)
            .files(shape.files)
            .writers(shape.writers)
            .overlap(Overlap::Queue(4));
        if let Some(keep_last) = shape.keep_last {
            builder = builder.keep_last(keep_last);
        }
        Ok(Self { fs, shape, executor: builder.build()?, expected })
    }

    fn begin(&mut self, one: Try, overwrite: bool) -> Result<Save> {
        let mut state = StateDict::new();
        for (index, len) in self.shape.tensors.iter().enumerate() {
            state.tensor(format!("tensor {index}"), Arc::new(one.bytes(index, *len)))?;
        }
        state.value("number", &one.number)?;
        let mut options = SaveOptions::default().attempt(one.attempt());
        options.overwrite = overwrite;
        if self.shape.directories {
            options = options.directory(format!("{ROOT}/{}", step_name(one.step)));
        }
        self.expected.note(self.fs.position(), Event::Begun(one));
        let save = self.executor.save_with(one.step, state, options)?;
        self.executor.fence()?;
        Ok(save)
    }

    fn end(&mut self, one: Try, save: Result<Save>) -> Result<()> {
        match save.and_then(|save| save.wait(LONG)) {
            Ok(_) => {
                self.expected.note(self.fs.position(), Event::Saved(one));
                Ok(())
            }
            Err(error) => {
                if error.kind() != ErrorKind::Indeterminate && !self.fs.killed() {
                    self.expected.note(self.fs.position(), Event::Failed(one));
                }
                Err(error)
            }
        }
    }

    fn save(&mut self, one: Try, overwrite: bool) -> Result<()> {
        let save = self.begin(one, overwrite);
        self.end(one, save)
    }

    fn run(self) -> Run {
        let _ = self.executor.shutdown(LONG);
        drop(self.executor);
        Run { history: self.fs.history(), expected: self.expected.clone() }
    }
}

fn judge(image: &Image) -> Verdict {
    read(&SimFs::boot(image))
}

fn read(fs: &SimFs) -> Verdict {
    let storage: Arc<dyn Storage> = match Local::at_with_sys(Arc::new(fs.clone()), ROOT) {
        Ok(local) => Arc::new(local),
        Err(error) if error.kind() == ErrorKind::NotFound => return BTreeMap::new(),
        Err(error) => panic!("{error}"),
    };
    let entries = Catalog::over(storage.clone()).list().unwrap();
    entries.into_iter().map(|entry| (entry.step, load(&storage, entry.step))).collect()
}

/// Reads every tensor and compares it with what the attempt should have saved.
fn load(storage: &Arc<dyn Storage>, step: u64) -> Result<Try, String> {
    let checkpoint = Checkpoint::from_storage(storage.clone(), &step_name(step)).map_err(|error| error.to_string())?;
    let checkpoint = checkpoint.with_threads(1);
    let attempt = checkpoint.attempt();
    let one = Try::of_attempt(attempt).filter(|one| one.step == step).ok_or(format!("a foreign attempt {attempt}"))?;
    if checkpoint.value::<u32>("number").ok() != Some(one.number) {
        return Err("a value is wrong".into());
    }
    let names: Vec<String> = checkpoint.tensors().unwrap().map(|tensor| tensor.name.to_owned()).collect();
    for (index, name) in names.iter().enumerate() {
        let bytes = checkpoint.read(name).map_err(|error| error.to_string())?;
        if *name != format!("tensor {index}") || bytes != one.bytes(index, bytes.len()) {
            return Err(format!("{name} has other bytes"));
        }
    }
    Ok(one)
}

/// A first step, two at once, a replacement, two more at once.
fn live(shape: Shape) -> Run {
    let (fs, mut expected) = (SimFs::new(), Expected::default());
    let mut program = Program::start(&fs, shape, &mut expected).unwrap();
    let one = |step, number| Try { step, number };
    program.save(one(1, 0), false).unwrap();
    for pair in [[one(2, 0), one(3, 0)], [one(3, 1), one(4, 0)], [one(4, 1), one(5, 0)]] {
        let saves = pair.map(|one| program.begin(one, one.number > 0));
        for (one, save) in pair.into_iter().zip(saves) {
            program.end(one, save).unwrap();
        }
    }
    program.run()
}

/// The next process on an image: everything that it finds is durable and must stay.
fn recover(image: &Image, verdict: &Verdict, shape: Shape) -> Run {
    let fs = SimFs::boot(image);
    let found: Vec<Try> = verdict.values().filter_map(|found| found.clone().ok()).collect();
    let mut expected = Expected::durable(found.iter().copied());
    let mut program = Program::start(&fs, shape, &mut expected).unwrap();
    let next = found.last().map_or(1, |newest| newest.step + 1);
    if let Some(newest) = found.last() {
        program.save(Try { number: newest.number + AFTER, ..*newest }, true).unwrap();
    }
    program.save(Try { step: next, number: AFTER }, false).unwrap();
    program.run()
}

#[test]
fn an_executor_on_a_machine_that_loses_power_at_any_moment_twice() {
    let findings = Findings::new(judge);
    each(rounds() * SHAPES.len(), |round| {
        let shape = SHAPES[round % SHAPES.len()];
        findings.explore(&live(shape), 0..usize::MAX, round as u64, 200, 16, |image, verdict, hash| {
            let again = recover(image, verdict, shape);
            findings.explore(&again, 0..usize::MAX, hash, 12, u64::MAX, |_, _, _| ());
        });
    });
    findings.conclude(100_000);
}

/// Saves two steps, applies `harm` to the next, and starts a second process; then the power fails.
fn second_process(story: usize, harm: impl Fn(&SimFs), findings: &Findings) -> bool {
    let shape = SHAPES[story % SHAPES.len()];
    let (fs, mut expected) = (SimFs::new(), Expected::default());
    let mut program = Program::start(&fs, shape, &mut expected).unwrap();
    program.save(Try { step: 1, number: 0 }, false).unwrap();
    program.save(Try { step: 2, number: 0 }, false).unwrap();
    let before = fs.position();
    harm(&fs);
    let _ = program.save(Try { step: 3, number: 0 }, false);
    let _ = program.save(Try { step: 3, number: 1 }, true);
    let killed = fs.killed();
    drop(program);
    fs.restart();
    let mut program = Program::start(&fs, shape, &mut expected).unwrap();
    program.save(Try { step: 4, number: AFTER }, false).unwrap();
    program.save(Try { step: 5, number: AFTER }, false).unwrap();
    findings.explore(&program.run(), before..usize::MAX, story as u64, 10, u64::MAX, |_, _, _| ());
    killed
}

#[test]
fn an_executor_killed_at_any_call_on_a_machine_that_loses_power_later() {
    let findings = Findings::new(judge);
    let kills = AtomicUsize::new(0);
    each(CALLS, |calls| {
        let killed = second_process(calls, |fs| fs.kill_after(calls as u64), &findings);
        kills.fetch_add(usize::from(killed), Ordering::Relaxed);
    });
    assert!(kills.into_inner() < CALLS, "there are calls after the last kill");
    findings.conclude(10_000);
}

#[test]
fn an_executor_any_call_of_which_fails_on_a_machine_that_loses_power_later() {
    let findings = Findings::new(judge);
    each(CALLS, |calls| {
        for (errno, sticky, done) in [(libc::EIO, false, false), (libc::EIO, false, true), (libc::ENOSPC, true, false)]
        {
            let fault = Fault { call: None, after: calls as u64, errno, sticky, done };
            second_process(calls, |fs| fs.fail(fault), &findings);
        }
    });
    findings.conclude(10_000);
}

/// More than the harmed saves make.
const CALLS: usize = 200;
