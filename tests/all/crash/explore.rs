//! Goes through the images of a run. The production reader judges each distinct image once, and the verdict
//! is compared with the promises.

use super::expected::{Allowed, Expected, Try};
use ashore::testing::simfs::{Crash, History, Image};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// A reader's verdict on an image: for each step that it lists, the try whose bytes it found, or what is
/// wrong with them.
pub type Verdict = BTreeMap<u64, Result<Try, String>>;

/// A run on a simulated file system, and what it promised.
pub struct Run {
    pub history: History,
    pub expected: Expected,
}

/// The findings of all runs of a test. Distinct means distinct by names and bytes, over all runs, without the
/// random names of trash.
pub struct Findings {
    judge: fn(&Image) -> Verdict,
    verdicts: Mutex<HashMap<u64, Arc<Verdict>>>,
    tally: Mutex<Tally>,
}

/// The figures.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Crashes that were tried.
    pub crashes: usize,
    /// Distinct images among them.
    pub images: usize,
    /// Distinct images in which a step that was being saved for the first time, replaced or removed was
    /// absent, old or new.
    pub absent: usize,
    pub old: usize,
    pub new: usize,
    /// A listed step had other bytes than any try that may be there.
    pub torn: usize,
    /// A step that was reported durable was not there, or one that was reported failed or removed was.
    pub lost: usize,
    /// The first few of these.
    pub examples: Vec<String>,
}

impl Findings {
    pub fn new(judge: fn(&Image) -> Verdict) -> Self {
        Self { judge, verdicts: Mutex::default(), tally: Mutex::default() }
    }

    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap().clone()
    }

    /// Tries crashes of `run` at `positions`, at most `limit` after each operation. Calls `again` with
    /// distinct images, their verdicts and hashes, about one in `every`.
    pub fn explore(
        &self,
        run: &Run,
        positions: Range<usize>,
        seed: u64,
        limit: usize,
        every: u64,
        again: impl Fn(&Image, &Verdict, u64),
    ) {
        let mut allowed = (usize::MAX, BTreeMap::new());
        let mut tally = Tally::default();
        for Crash { position, image } in run.history.crashes(positions, seed, limit) {
            if allowed.0 != position {
                allowed = (position, run.expected.allowed(position));
            }
            let hash = image.hash(Some(".trash-"));
            let known = self.verdicts.lock().unwrap().get(&hash).cloned();
            let verdict = known.clone().unwrap_or_else(|| Arc::new((self.judge)(&image)));
            let fresh = known.is_none() && self.verdicts.lock().unwrap().insert(hash, verdict.clone()).is_none();
            tally.crashes += 1;
            tally.images += usize::from(fresh);
            let place = || format!("seed={seed} position={position} of {}", run.history.len());
            tally.compare(&verdict, &allowed.1, run.expected.keep_last, fresh, &place);
            if fresh && hash.is_multiple_of(every) {
                again(&image, &verdict, hash);
            }
        }
        self.tally.lock().unwrap().add(tally);
    }

    /// Asserts the figures: nothing torn, nothing lost, every outcome seen, at least so many distinct images.
    pub fn conclude(&self, images: usize) {
        let tally = self.tally();
        println!("{tally:#?}");
        assert_eq!((tally.torn, tally.lost), (0, 0), "{:#?}", tally.examples);
        assert!(tally.absent > 0 && tally.old > 0 && tally.new > 0, "an outcome was never seen: {tally:?}");
        assert!(tally.images >= images, "too few images to say anything: {tally:?}");
    }
}

impl Tally {
    fn compare(
        &mut self,
        verdict: &Verdict,
        allowed: &BTreeMap<u64, Allowed>,
        keep_last: Option<usize>,
        fresh: bool,
        place: &dyn Fn() -> String,
    ) {
        for (step, found) in verdict {
            let tries = allowed.get(step).map(|allowed| &allowed.tries);
            match found {
                Err(why) => self.blame(true, || format!("step {step} is torn: {why}; {}", place())),
                Ok(found) if tries.is_some_and(|tries| tries.contains(found)) => {}
                Ok(found) => self.blame(false, || format!("{found:?} is there, not one of {tries:?}; {}", place())),
            }
        }
        for (step, allowed) in allowed {
            let found = verdict.get(step).and_then(|found| found.as_ref().ok());
            // A step may be removed once enough newer ones are durable, which the same image must prove.
            let pruned = keep_last.is_some_and(|keep| verdict.range(step + 1..).count() >= keep);
            if found.is_none() && !allowed.absent && !pruned {
                self.blame(false, || format!("step {step} is lost; found {verdict:?}; {}", place()));
            }
            if fresh && allowed.tries.len() + usize::from(allowed.absent) > 1 {
                match found {
                    None => self.absent += 1,
                    Some(one) if allowed.tries.last() == Some(one) && !allowed.removing => self.new += 1,
                    Some(_) => self.old += 1,
                }
            }
        }
    }

    fn blame(&mut self, torn: bool, example: impl FnOnce() -> String) {
        *(if torn { &mut self.torn } else { &mut self.lost }) += 1;
        if self.examples.len() < 5 {
            self.examples.push(example());
        }
    }

    fn add(&mut self, other: Self) {
        self.crashes += other.crashes;
        self.images += other.images;
        self.absent += other.absent;
        self.old += other.old;
        self.new += other.new;
        self.torn += other.torn;
        self.lost += other.lost;
        self.examples.extend(other.examples);
        self.examples.truncate(5);
    }
}

/// How often to go through everything, each time with other seeds: 1, or `ASHORE_CRASH_ROUNDS`.
pub fn rounds() -> usize {
    std::env::var("ASHORE_CRASH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(1)
}

/// Does `work` for every number below `count`, on as many threads as there are CPUs.
pub fn each(count: usize, work: impl Fn(usize) + Sync) {
    each_on(std::thread::available_parallelism().map_or(2, |n| n.get()).min(8), count, work);
}

/// Does `work` for every number below `count` on so many threads, for work that mostly waits.
pub fn each_on(threads: usize, count: usize, work: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(item) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|item| *item < count) {
                    work(item);
                }
            });
        }
    });
}
