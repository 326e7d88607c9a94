//! Steps that are made out of files of older steps, by clones and by links, under a reader that knows no
//! digests. The power fails at any moment, calls fail, processes die, sources are removed meanwhile.

use super::expected::{Event, Expected, Try};
use super::explore::{Findings, Run, Verdict, each, rounds};
use ashore::id::{parse_step_name, step_name};
use ashore::storage::local::Local;
use ashore::storage::local::sys::{Open, Sys};
use ashore::storage::{Adopted, FileReading, Reading, Storage, Sweep, Writing};
use ashore::testing::simfs::{Call, Fault, Image, SimFs};
use ashore::{ALIGNMENT, ErrorKind, Result};
use std::collections::BTreeMap;
use std::sync::Arc;

const ROOT: &str = "/data/run";
const AFTER: u32 = 100;
const MANIFEST: &str = "manifest.json";
/// One file is written by every step, the others are adopted where they can be.
const WRITTEN: usize = 0;
/// The sizes of the files of a step.
const LENGTHS: [&[usize]; 2] = [&[5000, 12_288], &[300, 4096, 9001]];

/// Who wrote the bytes of a file: those of its head, and the others.
#[derive(Clone, Copy, Debug, serde::Serialize, serde::Deserialize)]
struct Origin {
    head: (u64, u32),
    body: (u64, u32),
}

impl Origin {
    fn of(one: Try) -> Self {
        Self { head: (one.step, one.number), body: (one.step, one.number) }
    }

    fn bytes(self, index: usize, len: usize) -> Vec<u8> {
        let made = |(step, number)| Try { step, number }.bytes(index, len);
        let mut bytes = made(self.body);
        bytes[..ALIGNMENT.min(len)].copy_from_slice(&made(self.head)[..ALIGNMENT.min(len)]);
        bytes
    }
}

/// The content of these tests' manifest.
#[derive(serde::Serialize, serde::Deserialize)]
struct Listing {
    step: u64,
    number: u32,
    files: Vec<(String, usize, Origin)>,
}

/// The files of a step that is durable, kept open.
type Kept = Vec<(Arc<dyn FileReading>, Origin)>;

struct Program<'a> {
    fs: &'a SimFs,
    storage: Local,
    expected: &'a mut Expected,
    kept: Kept,
    ways: BTreeMap<&'static str, usize>,
}

impl<'a> Program<'a> {
    fn start(fs: &'a SimFs, expected: &'a mut Expected) -> Result<Self> {
        let storage = Local::with_sys(Arc::new(fs.clone()), ROOT)?;
        Ok(Self { fs, storage, expected, kept: Vec::new(), ways: BTreeMap::new() })
    }

    fn note(&mut self, event: Event) {
        self.expected.note(self.fs.position(), event);
    }

    fn save(&mut self, one: Try, lengths: &[usize], overwrite: bool) -> Result<()> {
        self.note(Event::Begun(one));
        let saved = self.try_save(one, lengths, overwrite);
        match &saved {
            Ok(()) => self.note(Event::Saved(one)),
            Err(error) if error.kind() == ErrorKind::Indeterminate || self.fs.killed() => {}
            Err(_) => self.note(Event::Failed(one)),
        }
        saved
    }

    fn try_save(&mut self, one: Try, lengths: &[usize], overwrite: bool) -> Result<()> {
        let writing = self.storage.begin(&step_name(one.step), one.attempt(), overwrite)?;
        let made = self.fill(&*writing, one, lengths).and_then(|()| writing.publish(overwrite));
        if let Err(error) = made {
            if error.kind() != ErrorKind::Indeterminate {
                let _ = writing.abandon();
            }
            return Err(error);
        }
        let _ = writing.settle();
        // A save that opens its files a second time finds what it has published.
        self.keep(one).or_else(|_| {
            self.kept.clear();
            Ok(())
        })
    }

    fn fill(&mut self, writing: &dyn Writing, one: Try, lengths: &[usize]) -> Result<()> {
        let mut listing = Listing { step: one.step, number: one.number, files: Vec::new() };
        for (index, &len) in lengths.iter().enumerate() {
            let (name, own) = (format!("part-{index}"), Origin::of(one));
            let origin = if index == WRITTEN { None } else { self.adopt(writing, &name, own, index, len)? };
            if origin.is_none() {
                writing.put(&name, &own.bytes(index, len))?;
            }
            listing.files.push((name, len, origin.unwrap_or(own)));
        }
        writing.put(MANIFEST, &serde_json::to_vec(&listing).unwrap())
    }

    fn adopt(&mut self, to: &dyn Writing, name: &str, own: Origin, index: usize, len: usize) -> Result<Option<Origin>> {
        let Some((source, origin)) = self.kept.get(index) else { return Ok(None) };
        let (way, origin) = match to.adopt(name, &**source, &own.bytes(index, len)[..ALIGNMENT])? {
            Adopted::Cloned => ("cloned", Some(Origin { head: own.head, ..*origin })),
            Adopted::Linked => ("linked", Some(*origin)),
            _ => ("refused", None),
        };
        *self.ways.entry(way).or_default() += 1;
        Ok(origin)
    }

    /// Keeps the files of a step open, which must be durable.
    fn keep(&mut self, one: Try) -> Result<()> {
        let reading = self.storage.open(&step_name(one.step))?;
        // None: the process was killed, or the call fails that is to fail.
        let Some(listing) = listing(&*reading) else {
            self.kept.clear();
            return Ok(());
        };
        let open = |(name, _, origin): &(String, usize, Origin)| Ok((reading.open(name)?, *origin));
        self.kept = listing.files.iter().map(open).collect::<Result<_>>()?;
        Ok(())
    }

    fn remove(&mut self, step: u64) -> Result<()> {
        self.note(Event::Removing(step));
        self.storage.remove(&step_name(step))?;
        self.note(Event::Removed(step));
        Ok(())
    }

    /// What a run does: saves that adopt from each other, a source that is removed, an overwrite.
    fn go_on(&mut self, found: &[Try], lengths: &[usize]) -> Result<()> {
        let next = found.last().map_or(1, |newest| newest.step + 1);
        self.save(Try { step: next, number: AFTER }, lengths, false)?;
        if let Some(newest) = found.last() {
            self.save(Try { number: newest.number + AFTER, ..*newest }, lengths, true)?;
        }
        if let [oldest, _, ..] = found {
            self.remove(oldest.step)?;
        }
        Ok(())
    }

    fn run(self) -> Run {
        Run { history: self.fs.history(), expected: self.expected.clone() }
    }
}

fn load(reading: &dyn Reading, file: &str) -> Option<Vec<u8>> {
    let file = reading.open(file).ok()?;
    let mut bytes = vec![0; file.len() as usize];
    file.read_at(0, &mut bytes).ok()?;
    Some(bytes)
}

fn listing(reading: &dyn Reading) -> Option<Listing> {
    serde_json::from_slice(&load(reading, MANIFEST)?).ok()
}

fn judge(image: &Image) -> Verdict {
    read(&Local::with_sys(Arc::new(SimFs::boot(image)), ROOT).unwrap())
}

/// A step counts when its manifest parses; then all its bytes must be right.
fn read(storage: &Local) -> Verdict {
    let mut verdict = BTreeMap::new();
    for name in storage.list().unwrap() {
        let reading = storage.open(&name).unwrap();
        let Some(Listing { step, number, files }) = listing(&*reading) else { continue };
        let wrong = files
            .iter()
            .enumerate()
            .find(|(index, (file, len, origin))| load(&*reading, file) != Some(origin.bytes(*index, *len)));
        let found = match wrong {
            Some((_, (file, _, origin))) => Err(format!("{file} of try {number} has not the bytes of {origin:?}")),
            None if parse_step_name(&name) != Some(step) => Err(format!("it is step {step}")),
            None => Ok(Try { step, number }),
        };
        verdict.insert(parse_step_name(&name).unwrap(), found);
    }
    verdict
}

/// The process after a crash: what it finds is durable, so that it adopts from the newest step at once.
fn recover(image: &Image, verdict: &Verdict, lengths: &[usize], clones: bool) -> Run {
    let fs = SimFs::boot(image).clones(clones);
    let found: Vec<Try> = verdict.values().filter_map(|found| found.clone().ok()).collect();
    let mut expected = Expected::durable(found.iter().copied());
    let mut program = Program::start(&fs, &mut expected).unwrap();
    program.storage.sweep(Sweep::default()).unwrap();
    assert_eq!(read(&program.storage), *verdict, "a sweep changed what is listed");
    if let Some(newest) = found.last() {
        program.keep(*newest).unwrap();
    }
    program.go_on(&found, lengths).unwrap();
    program.run()
}

fn first(step: u64) -> Try {
    Try { step, number: 0 }
}

#[test]
fn power_lost_at_any_moment_leaves_steps_that_share_files_whole_or_absent() {
    let findings = Findings::new(judge);
    each(rounds() * LENGTHS.len() * 2, |story| {
        let (lengths, clones, seed) = (LENGTHS[story / 2 % LENGTHS.len()], story % 2 == 1, story as u64);
        let (fs, mut expected) = (SimFs::new().clones(clones), Expected::default());
        let mut program = Program::start(&fs, &mut expected).unwrap();
        for step in [1, 2, 3] {
            program.save(first(step), lengths, false).unwrap();
        }
        // Each file of step 3 has other names, or other blocks, in steps that go.
        program.remove(1).unwrap();
        program.save(Try { step: 3, number: 1 }, lengths, true).unwrap();
        program.remove(2).unwrap();
        // The descriptor is all that is left of the source.
        program.remove(3).unwrap();
        program.save(first(4), lengths, false).unwrap();
        let shared = lengths.len() - 1;
        let ways =
            if clones { vec![("cloned", 4 * shared)] } else { vec![("linked", 3 * shared), ("refused", shared)] };
        assert_eq!(program.ways, BTreeMap::from_iter(ways));
        let run = program.run();
        findings.explore(&run, 0..usize::MAX, seed, 250, 8, |image, verdict, hash| {
            let again = recover(image, verdict, lengths, clones);
            findings.explore(&again, 0..usize::MAX, hash, 12, u64::MAX, |_, _, _| ());
        });
    });
    findings.conclude(4_000);
}

/// Saves a step, applies `harm` to the saves that adopt its files, and starts a second process, which goes on
/// from the newest step that it finds; then the power fails. Returns how files were adopted.
fn second_process(story: usize, harm: impl Fn(&SimFs), findings: &Findings) -> BTreeMap<&'static str, usize> {
    let lengths = LENGTHS[story % LENGTHS.len()];
    let (fs, mut expected) = (SimFs::new().clones(story / 2 % 2 == 1), Expected::default());
    let mut program = Program::start(&fs, &mut expected).unwrap();
    program.save(first(1), lengths, false).unwrap();
    let before = fs.position();
    harm(&fs);
    let _ = program.save(first(2), lengths, false);
    let _ = program.save(Try { step: 2, number: 1 }, lengths, true);
    let _ = program.remove(1);
    let mut ways = std::mem::take(&mut program.ways);
    drop(program);
    fs.restart();
    let mut program = Program::start(&fs, &mut expected).unwrap();
    program.storage.sweep(Sweep::default()).unwrap();
    let mut found = Vec::new();
    for one in read(&program.storage).into_values().map(|found| found.expect("whole while the machine is up")) {
        program.storage.confirm(&step_name(one.step)).unwrap();
        program.note(Event::Saved(one));
        found.push(one);
    }
    if let Some(newest) = found.last() {
        program.keep(*newest).unwrap();
    }
    program.go_on(&found, lengths).unwrap();
    program.ways.iter().for_each(|(way, count)| *ways.entry(way).or_default() += count);
    findings.explore(&program.run(), before..usize::MAX, story as u64, 16, u64::MAX, |_, _, _| ());
    ways
}

/// More than the harmed saves make.
const CALLS: usize = 160;

#[test]
fn a_process_killed_at_any_call_while_it_adopts_files_tears_no_step() {
    let findings = Findings::new(judge);
    each(CALLS, |calls| {
        second_process(calls, |fs| fs.kill_after(calls as u64), &findings);
    });
    findings.conclude(2_000);
}

#[test]
fn any_call_that_fails_while_files_are_adopted_tears_no_step() {
    let findings = Findings::new(judge);
    each(CALLS, |calls| {
        for (errno, sticky, done) in [(libc::EIO, false, false), (libc::EIO, false, true), (libc::ENOSPC, true, false)]
        {
            let fault = Fault { call: None, after: calls as u64, errno, sticky, done };
            second_process(calls, |fs| fs.fail(fault), &findings);
        }
    });
    findings.conclude(2_000);
}

#[test]
fn a_file_that_can_be_neither_cloned_nor_linked_is_written() {
    let findings = Findings::new(judge);
    for story in 0..4 {
        let refuse = |fs: &SimFs| {
            for call in [Call::Clone, Call::Link] {
                fs.fail(Fault { call: Some(call), after: 0, errno: libc::EPERM, sticky: true, done: false });
            }
        };
        let ways = second_process(story, refuse, &findings);
        assert_eq!(ways.get("refused"), Some(&(2 * (LENGTHS[story % 2].len() - 1))), "{ways:?}");
    }
    let tally = findings.tally();
    assert_eq!((tally.torn, tally.lost), (0, 0), "{:#?}", tally.examples);
}

/// A step that another program copied here, as cp(1) does: everything is there, nothing is durable.
fn copied(fs: &SimFs, one: Try, lengths: &[usize]) {
    let dir = format!("{ROOT}/{}", step_name(one.step));
    fs.mkdir(None, dir.as_ref()).unwrap();
    let put = |name: &str, bytes: &[u8]| {
        let fd = fs.open(None, format!("{dir}/{name}").as_ref(), Open::Create { direct: false }, false).unwrap();
        assert_eq!(fs.pwrite(fd, bytes, 0).unwrap(), bytes.len());
        fs.close(fd);
    };
    let files = lengths.iter().enumerate().map(|(index, len)| (format!("part-{index}"), *len, Origin::of(one)));
    let files: Vec<_> = files.collect();
    files.iter().enumerate().for_each(|(index, (name, len, origin))| put(name, &origin.bytes(index, *len)));
    put(MANIFEST, &serde_json::to_vec(&Listing { step: one.step, number: one.number, files }).unwrap());
}

/// What the caller of `adopt` must see to, and the model sees if it does not: a link to a file that is not
/// durable tears the step that has it, although that step was reported.
#[test]
fn a_link_to_a_file_that_was_not_made_durable_tears_its_step_and_a_confirmation_prevents_it() {
    let torn = |confirms| {
        let (fs, mut expected) = (SimFs::new(), Expected::default());
        let mut program = Program::start(&fs, &mut expected).unwrap();
        copied(&fs, first(1), LENGTHS[0]);
        if confirms {
            program.storage.confirm(&step_name(1)).unwrap();
        }
        program.keep(first(1)).unwrap();
        program.save(first(2), LENGTHS[0], false).unwrap();
        assert_eq!(program.ways, BTreeMap::from([("linked", 1)]));
        let history = fs.history();
        let crashes = history.crashes(history.len()..history.len() + 1, 7, 500);
        crashes.filter(|crash| judge(&crash.image).get(&2) != Some(&Ok(first(2)))).count()
    };
    assert!(torn(false) > 0, "the model does not see it");
    assert_eq!(torn(true), 0);
}
