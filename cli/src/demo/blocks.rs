//! How a run is cut into blocks, each trained once with saves and once without.

/// Steps `from` to `to`, the latter not included.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block {
    pub from: u64,
    pub to: u64,
}

/// The blocks of a run, in order. The first warms up. The last begins at the goal: it trains on while the last save is being
/// written, and its losses are what a restored model must repeat.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    pub blocks: Vec<Block>,
    /// Steps of a block that is as long as it should be: blocks cut short by start or goal are not compared.
    pub full: u64,
    goal: u64,
}

/// Blocks as long as a save interval, or several of them when that is short: a block is to be long against its timing.
const STEPS_MIN: u64 = 10;

/// No need to train for long after the goal.
const TAIL_MAX: u64 = 50;

pub fn plan(start: u64, goal: u64, every: u64) -> Plan {
    let full = STEPS_MIN.div_ceil(every).saturating_mul(every);
    let mut blocks = Vec::new();
    let mut from = start;
    while from < goal {
        let to = (from / full + 1).saturating_mul(full).min(goal);
        blocks.push(Block { from, to });
        from = to;
    }
    blocks.push(Block { from: goal, to: goal + full.min(TAIL_MAX) });
    Plan { blocks, full, goal }
}

impl Plan {
    /// Steps trained beyond the goal.
    pub fn tail(&self) -> u64 {
        self.blocks.last().map_or(0, |block| block.to - self.goal)
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
        let plan = plan(start, goal, every);
        assert!(plan.blocks.windows(2).all(|pair| pair[0].to == pair[1].from));
        plan.blocks.iter().map(|b| b.from).chain(plan.blocks.last().map(|b| b.to)).collect()
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
