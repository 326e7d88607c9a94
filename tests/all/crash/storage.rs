//! The storage protocol alone, under a reader that knows no digests: a step counts when its manifest parses and every file
//! has its length. So nothing but the order of writes, syncs and renames keeps torn steps out.

use super::expected::{Event, Expected, Try};
use super::explore::{Findings, Run, Verdict};
use ashore::id::{parse_step_name, step_name};
use ashore::storage::Storage;
use ashore::storage::local::Local;
use ashore::testing::simfs::{Call, Fault, Image, SimFs};
use ashore::{ALIGNMENT, ErrorKind, Result};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const ROOT: &str = "/data/run";
/// Tries made after a crash count from here: no attempt is ever made twice.
const AFTER: u32 = 100;
const MANIFEST: &str = "manifest.json";

/// What the manifest of these tests says.
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
        let write = || -> Result<()> {
            let mut listing = Listing { step: one.step, number: one.number, files: Vec::new() };
            for (index, &len) in lengths.iter().enumerate() {
                let name = format!("part-{index}");
                let file = writing.create(&name, len as u64)?;
                let (mut buffer, bytes) = (vec![0; len + 2 * ALIGNMENT], one.bytes(index, len));
                let at = buffer.as_ptr().align_offset(ALIGNMENT);
                buffer[at..at + len].copy_from_slice(&bytes);
                let whole = len.next_multiple_of(ALIGNMENT);
                // Backwards: direct writes come in any order.
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

/// After a crash: what an image was judged to hold is durable and must stay; sweep, save the next step, replace the newest,
/// remove the oldest.
fn recover(image: &Image, verdict: &Verdict, lengths: &[usize]) -> Run {
    let fs = SimFs::boot(image);
    let found: Vec<Try> = verdict.values().filter_map(|found| found.clone().ok()).collect();
    let mut expected = Expected::durable(found.iter().copied());
    let mut program = Program::start(&fs, &mut expected).unwrap();
    program.storage.sweep().unwrap();
    assert_eq!(read(&program.storage), *verdict, "a sweep changed what is listed");
    let next = found.last().map_or(1, |newest| newest.step + 1);
    program.save(Try { step: next, number: AFTER }, lengths, false).unwrap();
    if let Some(newest) = found.last() {
        program.save(Try { number: newest.number + AFTER, ..*newest }, lengths, true).unwrap();
    }
    if let [oldest, _, ..] = found[..] {
        program.remove(oldest.step).unwrap();
    }
    program.run()
}

/// A story of a program, with the sizes of its files.
struct Story {
    seed: u64,
    lengths: &'static [usize],
}

const STORIES: &[Story] = &[
    Story { seed: 1, lengths: &[9000, 300] },
    Story { seed: 2, lengths: &[4096] },
    Story { seed: 3, lengths: &[12_288, 0, 5000] },
    Story { seed: 4, lengths: &[511, 513] },
];

fn first(step: u64) -> Try {
    Try { step, number: 0 }
}

/// Three steps, the last replaced twice, the oldest removed.
fn usual(story: &Story) -> Run {
    let (fs, mut expected) = (SimFs::new(), Expected::default());
    let mut program = Program::start(&fs, &mut expected).unwrap();
    for step in [1, 2, 3] {
        program.save(first(step), story.lengths, false).unwrap();
    }
    for number in [1, 2] {
        program.save(Try { step: 3, number }, story.lengths, true).unwrap();
    }
    program.remove(1).unwrap();
    program.save(first(4), story.lengths, false).unwrap();
    program.run()
}

#[test]
fn power_lost_at_any_moment_loses_nothing_that_was_saved_and_shows_nothing_torn() {
    let findings = Findings::default();
    for story in STORIES {
        let run = usual(story);
        findings.explore(&run, story.seed, 300, judge, 8, |image, verdict| {
            let run = recover(image, verdict, story.lengths);
            findings.explore(&run, story.seed, 40, judge, u64::MAX, |_, _| ());
        });
    }
    println!("{:?}", findings.tally());
}
