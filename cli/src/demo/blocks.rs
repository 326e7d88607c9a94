//! Splits a run into blocks, each trained once with saves and once without.

/// Steps `from` (included) to `to` (excluded).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub from: u64,
    pub to: u64,
}

/// Minimum steps of a block: a save interval, or several when it is short, so that a block is long compared
/// to its timing errors.
const STEPS_MIN: u64 = 10;

/// Maximum steps after the goal.
const TAIL_MAX: u64 = 50;

/// How a run is split.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub start: u64,
    pub goal: u64,
    /// Steps of a full block: blocks cut short by start or goal are not compared.
    pub full: u64,
}

impl Plan {
    pub fn new(start: u64, goal: u64, every: u64) -> Self {
        Self { start, goal, full: STEPS_MIN.div_ceil(every).saturating_mul(every) }
    }

    /// Iterates over the blocks, in order. The first warms up. The last begins at the goal: it trains while
    /// the last save is being written, and a restored model must repeat its losses.
    pub fn blocks(self) -> impl Iterator<Item = Block> {
        let mut from = self.start;
        std::iter::from_fn(move || {
            let to = match from {
                at if at < self.goal => (at / self.full + 1).saturating_mul(self.full).min(self.goal),
                at if at == self.goal => self.end(),
                _ => return None,
            };
            Some(Block { from: std::mem::replace(&mut from, to), to })
        })
    }

    /// Returns the step after the last block.
    pub fn end(self) -> u64 {
        self.goal + self.full.min(TAIL_MAX)
    }
}

impl Block {
    pub fn len(&self) -> u64 {
        self.to - self.from
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn edges(start: u64, goal: u64, every: u64) -> Vec<u64> {
        let blocks: Vec<Block> = Plan::new(start, goal, every).blocks().collect();
        assert!(blocks.windows(2).all(|pair| pair[0].to == pair[1].from));
        blocks.iter().map(|b| b.from).chain(blocks.last().map(|b| b.to)).collect()
    }

    #[test]
    fn blocks_begin_where_saves_are_and_one_follows_the_goal() {
        assert_eq!(edges(0, 40, 10), [0, 10, 20, 30, 40, 50]);
        assert_eq!(edges(0, 25, 10), [0, 10, 20, 25, 35]);
        assert_eq!(edges(20, 40, 10), [20, 30, 40, 50]);
        assert_eq!(edges(37, 40, 10), [37, 40, 50]);
        assert_eq!(edges(0, 30, 3), [0, 12, 24, 30, 42]);
        assert_eq!(edges(0, 20, 1), [0, 10, 20, 30]);
        assert_eq!(edges(0, 5, 1000), [0, 5, 55]);
    }
}
