//! Goes through the images of a run, has each distinct one judged once by the production reader, and holds the verdict
//! against what was promised.

use super::expected::{Allowed, Expected, Try};
use ashore::testing::simfs::{History, Image};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};

/// What a reader makes of an image: for each step that it lists, the try whose bytes it found, or what is wrong with them.
pub type Verdict = BTreeMap<u64, Result<Try, String>>;

/// A run on a simulated file system, and what it promised.
pub struct Run {
    pub history: History,
    pub expected: Expected,
}

/// What all runs of a test found. Distinct means distinct: by names and bytes, over all runs.
#[derive(Default)]
pub struct Findings {
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
    /// Distinct images in which a step that was being saved for the first time, replaced or removed was not there, was the
    /// old one, was the new one.
    pub absent: usize,
    pub old: usize,
    pub new: usize,
    /// A listed step had other bytes than any try that may be there.
    pub torn: usize,
    /// A step that was reported durable was not there, or a removed one was.
    pub lost: usize,
    /// The first few of these.
    pub examples: Vec<String>,
}

impl Findings {
    pub fn tally(&self) -> Tally {
        self.tally.lock().unwrap().clone()
    }

    /// Tries crashes of `run`, at most `limit` after each operation. Calls `again` for about one distinct image in `every`.
    pub fn explore(
        &self,
        run: &Run,
        seed: u64,
        limit: usize,
        judge: impl Fn(&Image) -> Verdict,
        every: u64,
        again: impl Fn(&Image, &Verdict),
    ) {
        let mut allowed = (usize::MAX, BTreeMap::new());
        let mut tally = Tally::default();
        for crash in run.history.crashes(0..run.history.len() + 1, seed, limit) {
            if allowed.0 != crash.position {
                allowed = (crash.position, run.expected.allowed(crash.position));
            }
            let hash = crash.image.hash();
            let known = self.verdicts.lock().unwrap().get(&hash).cloned();
            let fresh = known.is_none();
            let verdict = known.unwrap_or_else(|| Arc::new(judge(&crash.image)));
            let fresh = fresh && self.verdicts.lock().unwrap().insert(hash, verdict.clone()).is_none();
            tally.crashes += 1;
            tally.images += usize::from(fresh);
            let place = || format!("seed={seed} position={} of {}", crash.position, run.history.len());
            tally.compare(&verdict, &allowed.1, fresh, &place);
            if fresh && hash % every == 0 {
                again(&crash.image, &verdict);
            }
        }
        self.tally.lock().unwrap().add(tally);
    }
}

impl Tally {
    fn compare(
        &mut self,
        verdict: &Verdict,
        allowed: &BTreeMap<u64, Allowed>,
        fresh: bool,
        place: &dyn Fn() -> String,
    ) {
        for (step, found) in verdict {
            let tries = allowed.get(step).map(|allowed| &allowed.tries);
            match found {
                Err(why) => self.blame(true, format!("step {step} is torn: {why}; {}", place())),
                Ok(found) if tries.is_some_and(|tries| tries.contains(found)) => {}
                Ok(found) => self.blame(false, format!("{found:?} is there, not {tries:?}; {}", place())),
            }
        }
        for (step, allowed) in allowed {
            let found = verdict.get(step).and_then(|found| found.as_ref().ok());
            if !verdict.contains_key(step) && !allowed.absent {
                self.blame(false, format!("step {step} is lost; {}", place()));
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

    fn blame(&mut self, torn: bool, example: String) {
        *(if torn { &mut self.torn } else { &mut self.lost }) += 1;
        if self.examples.len() < 5 {
            self.examples.push(example);
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
