//! The disk images that a crash can leave, and a deterministic choice among them.

use super::disk::{Disk, Op, SECTOR, Take, Unit, What};
use super::image::Image;
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

/// Maximum number of pending changes for which every possible set is tried.
const EXHAUSTIVE: usize = 6;

/// The history of a [`SimFs`](super::SimFs) so far: the disk from which it booted, and the log of its
/// operations.
#[derive(Clone, Debug)]
pub struct History {
    pub(super) base: Image,
    pub(super) log: Arc<Vec<Op>>,
}

/// A crash, and the disk that the next boot finds.
#[derive(Debug)]
pub struct Crash {
    /// The number of operations before the crash. Data that was acknowledged up to this position must have
    /// survived.
    pub position: usize,
    /// The disk.
    pub image: Image,
}

impl History {
    /// The number of operations. A crash can come before the first operation, after the last, and between any
    /// two.
    pub fn len(&self) -> usize {
        self.log.len()
    }

    /// True when there were no operations.
    pub fn is_empty(&self) -> bool {
        self.log.is_empty()
    }

    /// Makes images of crashes after `n` operations, for each `n` in `positions` and at most `limit` for each
    /// `n`.
    ///
    /// Only `seed` determines the choice. For few pending changes the images cover every set of them.
    /// Otherwise they cover these sets: none and all of them, each change alone and each one missing, each
    /// directory or file alone and missing, every prefix, and random sets; with complete and with torn
    /// writes. Most sets that were possible one operation earlier are left out. Images can be equal; see
    /// [`Image::hash`].
    pub fn crashes(&self, positions: Range<usize>, seed: u64, limit: usize) -> Crashes {
        let mut disk = Disk::new(&self.base);
        let start = positions.start.min(self.log.len());
        self.log[..start].iter().for_each(|op| disk.apply(op));
        let end = positions.end.min(self.log.len() + 1);
        let mut crashes = Crashes {
            log: self.log.clone(),
            disk,
            units: Vec::new(),
            choices: Vec::new(),
            position: start,
            end,
            seed,
            limit,
        };
        if start < end {
            crashes.choose(true);
        }
        crashes
    }

    /// Returns the disk if nothing is lost. This is the running system's own view, as after a process is
    /// killed.
    pub fn everything(&self) -> Image {
        let mut disk = Disk::new(&self.base);
        self.log.iter().for_each(|op| disk.apply(op));
        let units = disk.pending();
        disk.crash(&units, &vec![Take::Everything; units.len()])
    }
}

/// An iterator over the images of [`History::crashes`].
#[derive(Debug)]
pub struct Crashes {
    log: Arc<Vec<Op>>,
    disk: Disk,
    units: Vec<Unit>,
    choices: Vec<Vec<Take>>,
    position: usize,
    end: usize,
    seed: u64,
    limit: usize,
}

impl Iterator for Crashes {
    type Item = Crash;

    fn next(&mut self) -> Option<Crash> {
        loop {
            if let Some(takes) = self.choices.pop() {
                return Some(Crash { position: self.position, image: self.disk.crash(&self.units, &takes) });
            }
            if self.position + 1 >= self.end {
                return None;
            }
            self.disk.apply(&self.log[self.position]);
            self.position += 1;
            self.choose(false);
        }
    }
}

impl Crashes {
    fn choose(&mut self, first: bool) {
        self.units = self.disk.pending();
        let mut rng = Rng::new(self.seed ^ (self.position as u64) << 32);
        self.choices = choices(&self.units, self.limit, first, &mut rng);
    }
}

/// Returns sets of pending changes that give different images. Most sets that were possible before the last
/// operation are left out.
fn choices(units: &[Unit], limit: usize, first: bool, rng: &mut Rng) -> Vec<Vec<Take>> {
    let all = vec![Take::Everything; units.len()];
    let none = vec![Take::Nothing; units.len()];
    let mut chosen = BTreeSet::from([visible(units, all.clone()), none.clone()]);
    let mut sets = systematic(units, &all, &none);
    let torn: Vec<_> = sets.iter().chain([&all]).map(|takes| tear(units, takes, rng)).collect();
    sets.extend(torn);
    let after_sync = !units.iter().any(|unit| unit.newest);
    let stale = |takes: &[Take]| !takes.iter().zip(units).any(|(take, unit)| unit.newest && *take != Take::Nothing);
    if !first && (!after_sync || units.len() > EXHAUSTIVE) {
        sets.retain(|takes| !stale(takes) || rng.below(8) == 0);
    }
    rng.shuffle(&mut sets);
    let (few, many) = (limit / 3 + 1, limit);
    for takes in sets {
        if chosen.len() < if units.len() > EXHAUSTIVE { few } else { many } {
            chosen.insert(visible(units, takes));
        }
    }
    let tries = if after_sync { 0 } else { limit };
    for _ in 0..tries {
        if chosen.len() >= limit {
            break;
        }
        // Data is only visible under a name and within a length, so names and lengths are kept more often.
        let (names, data) = ([4, 7, 8, 8][rng.below(4)], [1, 4, 7, 8][rng.below(4)]);
        let keep = |unit: &Unit| if matches!(unit.what, What::Data { .. }) { data } else { names };
        let wanted: Vec<_> = units.iter().map(|unit| unit.newest || rng.below(8) < keep(unit)).collect();
        let takes = match rng.below(2) {
            0 => with_needs(units, none.clone(), |i| wanted[i]),
            _ => without(units, all.clone(), |i| !wanted[i]),
        };
        chosen.insert(visible(units, tear(units, &takes, rng)));
    }
    chosen.into_iter().collect()
}

/// Removes changes that are not visible in the image: objects without a name, and sectors beyond the length.
fn visible(units: &[Unit], mut takes: Vec<Take>) -> Vec<Take> {
    let mut file = (0, 0);
    for i in (0..units.len()).rev() {
        let What::Data { at, sectors, durable } = units[i].what else { continue };
        if file.0 != units[i].ino {
            let size = |j: usize| match units[j].what {
                What::Size { len } if units[j].ino == units[i].ino && takes[j] != Take::Nothing => Some(len),
                _ => None,
            };
            file = (units[i].ino, (0..units.len()).rev().find_map(size).unwrap_or(durable));
        }
        let seen = file.1.saturating_sub(at).div_ceil(SECTOR).min(sectors);
        let whole = if seen < 64 { (1 << seen) - 1 } else { u64::MAX };
        takes[i] = match takes[i] {
            _ if seen == 0 => Take::Nothing,
            Take::Torn(mask) if mask & whole == whole => Take::Everything,
            Take::Torn(mask) if mask & whole == 0 => Take::Nothing,
            Take::Torn(mask) => Take::Torn(mask & whole),
            take => take,
        };
    }
    for i in 0..units.len() {
        let under = &units[i].under;
        if !under.is_empty() && under.iter().all(|&name| takes[name] == Take::Nothing) {
            takes[i] = Take::Nothing;
        }
    }
    takes
}

/// Returns every set of a few pending changes. For many changes, returns each change alone and each change
/// missing, and the same for objects and prefixes.
fn systematic(units: &[Unit], all: &[Take], none: &[Take]) -> Vec<Vec<Take>> {
    let mut sets = Vec::new();
    if units.len() <= EXHAUSTIVE {
        for set in 1..(1_u32 << units.len()) - 1 {
            let take = |i| if set >> i & 1 == 1 { Take::Everything } else { Take::Nothing };
            let takes: Vec<_> = (0..units.len()).map(take).collect();
            sets.extend(allowed(units, &takes).then_some(takes));
        }
        return sets;
    }
    for i in 0..units.len() {
        sets.push(with_needs(units, none.to_vec(), |j| j == i));
        sets.push(without(units, all.to_vec(), |j| j == i));
        sets.push(without(units, all.to_vec(), |j| j > i));
        if i == 0 || units[i].ino != units[i - 1].ino {
            sets.push(with_needs(units, none.to_vec(), |j| units[j].ino == units[i].ino));
            sets.push(without(units, all.to_vec(), |j| units[j].ino == units[i].ino));
        }
    }
    sets
}

fn allowed(units: &[Unit], takes: &[Take]) -> bool {
    let taken = |i: usize| takes[i] != Take::Nothing;
    (0..units.len()).all(|i| !taken(i) || units[i].needs.iter().all(|&need| taken(need)))
}

/// Adds the units that `pick` selects, and those that they need.
fn with_needs(units: &[Unit], mut takes: Vec<Take>, pick: impl Fn(usize) -> bool) -> Vec<Take> {
    for i in (0..units.len()).rev() {
        if pick(i) || takes[i] != Take::Nothing {
            takes[i] = Take::Everything;
            units[i].needs.iter().for_each(|&need| takes[need] = Take::Everything);
        }
    }
    takes
}

/// Removes the units that `pick` selects, and those that need them.
fn without(units: &[Unit], mut takes: Vec<Take>, pick: impl Fn(usize) -> bool) -> Vec<Take> {
    for i in 0..units.len() {
        if pick(i) || units[i].needs.iter().any(|&need| takes[need] == Take::Nothing) {
            takes[i] = Take::Nothing;
        }
    }
    takes
}

/// Returns the same set with some of its writes torn.
fn tear(units: &[Unit], takes: &[Take], rng: &mut Rng) -> Vec<Take> {
    let torn = |(unit, take): (&Unit, &Take)| match (unit.what, take) {
        (What::Data { sectors, .. }, Take::Everything) if sectors > 1 && rng.below(2) == 0 => {
            let one = 1 << rng.below(sectors.min(64));
            Take::Torn(match rng.below(8) {
                0 => one - 1,
                1 => !(one - 1),
                2 => one,
                3 => !one,
                _ => rng.next(),
            })
        }
        _ => *take,
    };
    units.iter().zip(takes).map(torn).collect()
}

/// A small random number generator (splitmix64). The same seed gives the same numbers everywhere.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// Starts the sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Returns the next number.
    #[expect(clippy::should_implement_trait, reason = "there is always a next number")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Returns a number below `n`.
    ///
    /// # Panics
    /// When `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    /// Puts `items` into random order.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}
