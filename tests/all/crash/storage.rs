//! The storage protocol alone, under a reader that knows no digests: a step counts when its manifest parses
//! and every file has its length. So only the order of writes, syncs and renames keeps torn steps out.

use super::expected::{Event, Expected, Try};
use super::explore::{Findings, Run, Verdict, each, rounds};
use ashore::id::{parse_step_name, step_name};
use ashore::storage::local::Local;
use ashore::storage::{Storage, Sweep, Writing};
use ashore::testing::simfs::{Call, Crash, Fault, Image, SimFs};
use ashore::{ALIGNMENT, ErrorKind, Locks, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

const ROOT: &str = "/data/run";
/// Attempts made after a crash count from here: no number is used twice.
const AFTER: u32 = 100;
const MANIFEST: &str = "manifest.json";

/// The content of these tests' manifest.
#[derive(serde::Serialize, serde::Deserialize)]
struct Listing {
    step: u64,
    number: u32,
    files: Vec<(String, usize)>,
}

/// A program that saves, overwrites and removes; one process on one file system.
struct Program<'a> {
    fs: &'a SimFs,
    storage: Local,
    expected: &'a mut Expected,
}

impl<'a> Program<'a> {
    fn start(fs: &'a SimFs, expected: &'a mut Expected) -> Result<Self> {
        Ok(Self { fs, storage: Local::with_sys(Arc::new(fs.clone()), ROOT)?, expected })
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

    fn try_save(&self, one: Try, lengths: &[usize], overwrite: bool) -> Result<()> {
        let writing = self.storage.begin(&step_name(one.step), one.attempt(), overwrite)?;
        Self::fill_and_publish(&*writing, one, lengths, overwrite)
    }

    fn fill_and_publish(writing: &dyn Writing, one: Try, lengths: &[usize], overwrite: bool) -> Result<()> {
        let write = || -> Result<()> {
            let mut listing = Listing { step: one.step, number: one.number, files: Vec::new() };
            for (index, &len) in lengths.iter().enumerate() {
                let name = format!("part-{index}");
                let file = writing.create(&name, len as u64)?;
                let (mut buffer, bytes) = (vec![0; len + 2 * ALIGNMENT], one.bytes(index, len));
                let at = buffer.as_ptr().align_offset(ALIGNMENT);
                buffer[at..at + len].copy_from_slice(&bytes);
                let whole = len.next_multiple_of(ALIGNMENT);
                // Backwards, because direct writes come in any order.
                for chunk in (0..whole).step_by(ALIGNMENT).rev() {
                    file.write_at(chunk as u64, &buffer[at + chunk..at + chunk + ALIGNMENT])?;
                }
                file.seal()?;
                listing.files.push((name, len));
            }
            let mut manifest = serde_json::to_vec(&listing).unwrap();
            manifest.splice(1..1, std::iter::repeat_n(b' ', 700));
            writing.put(MANIFEST, &manifest)
        };
        match write().and_then(|()| writing.publish(overwrite)) {
            Ok(()) => {
                let _ = writing.settle();
                Ok(())
            }
            Err(error) => {
                if error.kind() != ErrorKind::Indeterminate {
                    let _ = writing.abandon();
                }
                Err(error)
            }
        }
    }

    /// Two attempts at a step begin before either is visible: the first to publish wins, the other does no
    /// harm.
    fn race(&mut self, step: u64, lengths: &[usize]) {
        let tries = [0, 1].map(|number| Try { step, number });
        let attempts = tries.map(|one| self.storage.begin(&step_name(step), one.attempt(), false).unwrap());
        self.note(Event::Begun(tries[0]));
        Self::fill_and_publish(&*attempts[0], tries[0], lengths, false).unwrap();
        self.note(Event::Saved(tries[0]));
        let second = Self::fill_and_publish(&*attempts[1], tries[1], lengths, false);
        assert_eq!(second.map_err(|error| error.kind()), Err(ErrorKind::Conflict));
    }

    fn remove(&mut self, step: u64) -> Result<()> {
        self.note(Event::Removing(step));
        self.storage.remove(&step_name(step))?;
        self.note(Event::Removed(step));
        Ok(())
    }

    fn run(self) -> Run {
        Run { history: self.fs.history(), expected: self.expected.clone() }
    }
}

fn judge(image: &Image) -> Verdict {
    let fs = SimFs::boot(image);
    let storage = Local::with_sys(Arc::new(fs), ROOT).unwrap();
    read(&storage)
}

fn read(storage: &Local) -> Verdict {
    let mut verdict = BTreeMap::new();
    for name in storage.list().unwrap() {
        let step = parse_step_name(&name).unwrap();
        let reading = storage.open(&name).unwrap();
        let load = |file: &str| -> Option<Vec<u8>> {
            let file = reading.open(file).ok()?;
            let mut bytes = vec![0; file.len() as usize];
            file.read_at(0, &mut bytes).ok()?;
            Some(bytes)
        };
        let Some(listing) = load(MANIFEST).and_then(|bytes| serde_json::from_slice::<Listing>(&bytes).ok()) else {
            continue;
        };
        let Some(files) = listing.files.iter().map(|(name, len)| load(name).filter(|b| b.len() == *len)).collect()
        else {
            continue;
        };
        let files: Vec<Vec<u8>> = files;
        let one = Try { step: listing.step, number: listing.number };
        let wrong = files.iter().enumerate().find(|(index, bytes)| one.bytes(*index, bytes.len()) != **bytes);
        let found = match wrong {
            Some((index, _)) => Err(format!("file {index} of try {} has other bytes", one.number)),
            None if one.step != step => Err(format!("it is step {}", one.step)),
            None => Ok(one),
        };
        verdict.insert(step, found);
    }
    verdict
}

/// The process after a crash: the judged content of the image is durable and must stay; it sweeps, saves the
/// next step, replaces the newest and removes the oldest.
fn recover(image: &Image, verdict: &Verdict, lengths: &[usize]) -> Run {
    let fs = SimFs::boot(image);
    let found: Vec<Try> = verdict.values().filter_map(|found| found.clone().ok()).collect();
    let mut expected = Expected::durable(found.iter().copied());
    let mut program = Program::start(&fs, &mut expected).unwrap();
    program.storage.sweep(Sweep::default()).unwrap();
    assert_eq!(read(&program.storage), *verdict, "a sweep changed what is listed");
    let attempts: Vec<String> = fs.history().everything().paths().into_keys().filter(|p| p.ends_with(".tmp")).collect();
    assert!(attempts.is_empty(), "attempts that no sweep may delete: {attempts:?}");
    program.go_on(&found, lengths);
    program.run()
}

impl Program<'_> {
    /// Saves the step after those that were found, replaces the newest of them, removes the oldest.
    fn go_on(&mut self, found: &[Try], lengths: &[usize]) {
        let next = found.last().map_or(1, |newest| newest.step + 1);
        self.save(Try { step: next, number: AFTER }, lengths, false).unwrap();
        if let Some(newest) = found.last() {
            self.save(Try { number: newest.number + AFTER, ..*newest }, lengths, true).unwrap();
        }
        if let [oldest, _, ..] = found {
            self.remove(oldest.step).unwrap();
        }
    }

    /// Continues after every failure.
    fn stumble(&mut self, lengths: &[usize]) {
        let _ = self.save(first(3), lengths, false);
        let _ = self.save(Try { step: 2, number: 1 }, lengths, true);
        let _ = self.save(Try { step: 2, number: 2 }, lengths, true);
        let _ = self.remove(1);
    }
}

/// The sizes of the files of a step.
const LENGTHS: [&[usize]; 4] = [&[9000, 300], &[4096], &[12_288, 0, 5000], &[511, 513]];

fn first(step: u64) -> Try {
    Try { step, number: 0 }
}

#[test]
fn power_lost_at_any_moment_loses_nothing_that_was_saved_and_shows_nothing_torn() {
    let findings = Findings::new(judge);
    each(rounds() * LENGTHS.len(), |story| {
        let (lengths, seed) = (LENGTHS[story % LENGTHS.len()], story as u64);
        let (fs, mut expected) = (SimFs::new(), Expected::default());
        let mut program = Program::start(&fs, &mut expected).unwrap();
        for step in [1, 2, 3] {
            program.save(first(step), lengths, false).unwrap();
        }
        for number in [1, 2] {
            program.save(Try { step: 3, number }, lengths, true).unwrap();
        }
        program.remove(1).unwrap();
        program.race(4, lengths);
        let run = program.run();
        findings.explore(&run, 0..usize::MAX, seed, 250, 8, |image, verdict, hash| {
            let again = recover(image, verdict, lengths);
            findings.explore(&again, 0..usize::MAX, hash, 12, u64::MAX, |_, _, _| ());
        });
    });
    findings.conclude(20_000);
}

/// Saves two steps, applies `harm` to the next saves, and starts a second process, which makes durable what
/// it finds; then the power fails.
fn second_process(story: usize, harm: impl Fn(&SimFs), findings: &Findings) -> bool {
    let lengths = LENGTHS[story % LENGTHS.len()];
    let (fs, mut expected) = (SimFs::new(), Expected::default());
    let mut program = Program::start(&fs, &mut expected).unwrap();
    program.save(first(1), lengths, false).unwrap();
    program.save(first(2), lengths, false).unwrap();
    let before = fs.position();
    harm(&fs);
    program.stumble(lengths);
    let killed = fs.killed();
    drop(program);
    fs.restart();
    let mut program = Program::start(&fs, &mut expected).unwrap();
    if story.is_multiple_of(2) {
        program.storage.sweep(Sweep::default()).unwrap();
    }
    let allowed = program.expected.allowed(fs.position());
    let mut found = Vec::new();
    for one in read(&program.storage).into_values().map(|found| found.expect("whole while the machine is up")) {
        assert!(allowed[&one.step].tries.contains(&one), "{one:?} is there, not one of {allowed:?}; story={story}");
        program.storage.confirm(&step_name(one.step)).unwrap();
        program.note(Event::Saved(one));
        found.push(one);
    }
    program.go_on(&found, lengths);
    findings.explore(&program.run(), before..usize::MAX, story as u64, 16, u64::MAX, |_, _, _| ());
    killed
}

#[test]
fn a_process_killed_at_any_call_and_a_machine_that_fails_later_lose_nothing_and_tear_nothing() {
    let findings = Findings::new(judge);
    let killed = AtomicUsize::new(0);
    each(CALLS, |calls| {
        killed.fetch_add(
            usize::from(second_process(calls, |fs| fs.kill_after(calls as u64), &findings)),
            Ordering::Relaxed,
        );
    });
    assert!(killed.into_inner() < CALLS, "there are calls after the last kill");
    findings.conclude(10_000);
}

#[test]
fn any_call_that_fails_once_or_from_then_on_and_a_machine_that_fails_later_lose_nothing_and_tear_nothing() {
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

impl Program<'_> {
    /// Goes on with the attempt of a dead process, as a conversion does: keeps the files whose bytes are
    /// those that it would write. Does nothing but make the step durable when it is there.
    fn convert(&mut self, one: Try, lengths: &[usize]) -> Result<()> {
        let (name, attempt) = (step_name(one.step), one.attempt());
        self.note(Event::Begun(one));
        if self.storage.open(&name).is_ok() {
            self.storage.confirm(&name)?;
            self.note(Event::Saved(one));
            return self.storage.resume(&name, attempt, Duration::ZERO).map(drop);
        }
        let files = lengths.iter().enumerate().map(|(index, len)| (format!("part-{index}"), one.bytes(index, *len)));
        let files: BTreeMap<String, Vec<u8>> = files.collect();
        let mut kept = Vec::new();
        let resumable = match self.storage.resume(&name, attempt, Duration::ZERO)? {
            None => self.storage.begin_resumable(&name, attempt)?,
            Some(left) => {
                for file in left.list()? {
                    let reading = left.open(&file)?;
                    let mut bytes = vec![0; reading.len() as usize];
                    reading.read_at(0, &mut bytes)?;
                    if files.get(&file) == Some(&bytes) {
                        left.rewrite(&file, &bytes)?;
                        kept.push(file);
                    } else {
                        left.discard(&file)?;
                    }
                }
                left
            }
        };
        for (file, bytes) in files.iter().filter(|(file, _)| !kept.contains(file)) {
            resumable.writing().put(file, bytes)?;
        }
        let files = files.iter().map(|(file, bytes)| (file.clone(), bytes.len())).collect();
        let listing = Listing { step: one.step, number: one.number, files };
        resumable.writing().put(MANIFEST, &serde_json::to_vec(&listing).unwrap())?;
        resumable.writing().publish(false)?;
        self.note(Event::Saved(one));
        resumable.writing().settle()
    }
}

/// Goes on with a conversion. False when the owner record is empty: its owner was killed while it wrote it,
/// and counts as alive for a minute, which never ends here.
fn goes_on(program: &mut Program<'_>, lengths: &[usize]) -> bool {
    match program.convert(first(1), lengths) {
        Err(error) if error.message().contains("record cannot be read") => false,
        ended => ended.map(|()| true).unwrap(),
    }
}

/// Kept files are as durable as new ones, although another process wrote them and the power failed then.
#[test]
fn an_attempt_that_was_killed_at_any_call_is_gone_on_with_and_is_whole_whatever_fails_later() {
    let findings = Findings::new(judge);
    let (killed, undecided) = (AtomicUsize::new(0), AtomicUsize::new(0));
    each(CALLS / 2, |calls| {
        let lengths = LENGTHS[calls % LENGTHS.len()];
        let (fs, mut expected) = (SimFs::new(), Expected::default());
        let mut program = Program::start(&fs, &mut expected).unwrap();
        fs.kill_after(calls as u64);
        let ended = program.convert(first(1), lengths);
        killed.fetch_add(usize::from(fs.killed()), Ordering::Relaxed);
        assert!(fs.killed() || ended.is_ok(), "{ended:?}");
        drop(program);
        fs.restart();
        let mut program = Program::start(&fs, &mut expected).unwrap();
        undecided.fetch_add(usize::from(!goes_on(&mut program, lengths)), Ordering::Relaxed);
        findings.explore(&program.run(), 0..usize::MAX, calls as u64, 16, 4, |image, verdict, hash| {
            let found = verdict.values().filter_map(|found| found.clone().ok());
            let (fs, mut expected) = (SimFs::boot(image), Expected::durable(found));
            let mut program = Program::start(&fs, &mut expected).unwrap();
            if goes_on(&mut program, lengths) {
                assert_eq!(read(&program.storage).len(), 1);
            }
            findings.explore(&program.run(), 0..usize::MAX, hash, 8, u64::MAX, |_, _, _| ());
        });
    });
    assert!((10..CALLS / 2).contains(&killed.into_inner()), "there are calls after the last kill");
    assert!(undecided.into_inner() <= 4, "calls between the creation of a record and its last byte");
    let tally = findings.tally();
    assert_eq!((tally.torn, tally.lost), (0, 0), "{:#?}", tally.examples);
    assert!(tally.absent > 0 && tally.new + tally.old > 0 && tally.images >= 1_000, "{tally:?}");
}

/// The fsync of a file fails, its process ends, and the kernel counts the pages as clean: the next process
/// reads the right bytes, which no fsync of its own brings to the medium.
#[test]
fn a_file_whose_fsync_failed_for_a_dead_process_is_durable_when_the_next_one_has_published_it() {
    let findings = Findings::new(judge);
    for calls in 0..12 {
        let lengths = LENGTHS[calls % LENGTHS.len()];
        let (fs, mut expected) = (SimFs::new(), Expected::default());
        let mut program = Program::start(&fs, &mut expected).unwrap();
        let fsync = Some(Call::Fsync);
        fs.fail(Fault { call: fsync, after: calls as u64, errno: libc::EIO, sticky: false, done: false });
        let _ = program.convert(first(1), lengths);
        drop(program);
        fs.restart();
        let mut program = Program::start(&fs, &mut expected).unwrap();
        assert!(goes_on(&mut program, lengths));
        findings.explore(&program.run(), 0..usize::MAX, calls as u64, 16, 4, |_, _, _| ());
    }
    let tally = findings.tally();
    assert_eq!((tally.torn, tally.lost), (0, 0), "{:#?}", tally.examples);
    assert!(tally.images >= 100, "{tally:?}");
}

/// A sweep moved an attempt that was too old to the trash and deleted its files before the move was durable.
/// If the server lost power then, the attempt had its name back but lacked files, and an owner on a host that
/// stayed up could publish it.
#[test]
fn an_attempt_that_a_sweep_judged_by_its_age_never_has_its_name_without_its_files() {
    let fs = SimFs::new();
    let storage = Local::with_sys(Arc::new(fs.clone()), ROOT).unwrap().locks(Locks::None);
    let attempt = storage.begin(&step_name(1), first(1).attempt(), false).unwrap();
    ["part-0", "part-1", MANIFEST].iter().for_each(|file| attempt.put(file, b"whole").unwrap());
    // Its files are durable, and it is not published.
    fs.fail(Fault { call: Some(Call::Rename), after: 0, errno: libc::EIO, sticky: false, done: false });
    attempt.publish(false).unwrap_err();
    let before = fs.position();
    let swept = storage.sweep(Sweep::default().older_than(Duration::ZERO)).unwrap();
    assert_eq!((swept.removed.len(), swept.left.len()), (1, 0), "{swept:?}");

    let (mut there, mut gone) = (0, 0);
    for Crash { position, image } in fs.history().crashes(before..usize::MAX, 1, 1000) {
        let paths = image.paths();
        let Some(temp) = paths.keys().find(|path| path.ends_with(".tmp")) else {
            gone += 1;
            continue;
        };
        there += 1;
        let files = paths.iter().filter(|(path, _)| path.starts_with(&format!("{temp}/")));
        let whole = files.filter(|(_, bytes)| bytes.as_ref().is_some_and(|bytes| ***bytes == *b"whole")).count();
        assert_eq!(whole, 3, "position={position}");
    }
    assert!(there > 0 && gone > 0, "there={there} gone={gone}");
}

/// More than the harmed saves make.
const CALLS: usize = 200;
