//! The expectations: bytes that follow from numbers, and a log of the promises with their positions.

use ashore::Attempt;
use ashore::testing::simfs::Rng;
use std::collections::{BTreeMap, BTreeSet};

/// One attempt at a step. Another attempt at the same step has the next number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Try {
    pub step: u64,
    pub number: u32,
}

impl Try {
    pub fn attempt(self) -> Attempt {
        Attempt::from_uuid(uuid::Uuid::from_u64_pair(self.step, u64::from(self.number) + 1))
    }

    pub fn of_attempt(attempt: Attempt) -> Option<Self> {
        let (step, number) = uuid::Uuid::parse_str(&attempt.to_string()).ok()?.as_u64_pair();
        Some(Self { step, number: u32::try_from(number.checked_sub(1)?).ok()? })
    }

    /// The bytes of tensor or file `index`: they follow from the try alone, and no byte runs of two tries
    /// agree.
    pub fn bytes(self, index: usize, len: usize) -> Vec<u8> {
        let mut rng = Rng::new(self.step << 32 | u64::from(self.number) << 8 | index as u64);
        let mut bytes: Vec<u8> =
            std::iter::repeat_with(|| rng.next().to_le_bytes()).take(len.div_ceil(8)).flatten().collect();
        bytes.truncate(len);
        bytes
    }
}

/// What a program under test did, as it observed it itself.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// The save may become visible from here on.
    Begun(Try),
    /// The save was reported durable.
    Saved(Try),
    /// The save was reported failed, and not with an unknown outcome.
    Failed(Try),
    /// The step may disappear from here on.
    Removing(u64),
    /// The step was reported removed.
    Removed(u64),
}

/// The log of events, each with the position at which it was known.
#[derive(Clone, Debug, Default)]
pub struct Expected {
    events: Vec<(usize, Event)>,
    /// The program may remove a step once so many newer ones exist.
    pub keep_last: Option<usize>,
}

/// What a crash may leave of one step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Allowed {
    /// Nothing at all.
    pub absent: bool,
    /// Any one of these tries may be there, oldest first.
    pub tries: BTreeSet<Try>,
    /// A removal of what is there has begun.
    pub removing: bool,
}

impl Allowed {
    const NOTHING: Self = Self { absent: true, tries: BTreeSet::new(), removing: false };
}

impl Expected {
    /// Starts from steps that are durable already.
    pub fn durable(tries: impl IntoIterator<Item = Try>) -> Self {
        Self { events: tries.into_iter().map(|one| (0, Event::Saved(one))).collect(), keep_last: None }
    }

    pub fn note(&mut self, position: usize, event: Event) {
        self.events.push((position, event));
    }

    /// What a crash at `position` may leave of every step that was ever tried.
    pub fn allowed(&self, position: usize) -> BTreeMap<u64, Allowed> {
        let mut steps = BTreeMap::new();
        for (_, event) in self.events.iter().filter(|(at, _)| *at <= position) {
            let step = match *event {
                Event::Begun(one) | Event::Saved(one) | Event::Failed(one) => one.step,
                Event::Removing(step) | Event::Removed(step) => step,
            };
            let allowed = steps.entry(step).or_insert(Allowed::NOTHING);
            match *event {
                Event::Begun(one) => {
                    allowed.tries.insert(one);
                }
                Event::Saved(one) => {
                    *allowed = Allowed { absent: false, tries: BTreeSet::from([one]), removing: false };
                }
                Event::Failed(one) => {
                    allowed.tries.remove(&one);
                }
                Event::Removing(_) => (allowed.absent, allowed.removing) = (true, true),
                Event::Removed(_) => *allowed = Allowed::NOTHING,
            }
        }
        steps
    }
}
