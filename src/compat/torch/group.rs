//! Process groups: the exchange of messages between the ranks of a save.

use crate::completion::Signal;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, lock};
use std::sync::Arc;
use std::time::Instant;

/// The ranks that save together. One collective is enough: it implements all other exchanges.
pub trait ProcessGroup: Send + Sync {
    /// This rank, below `world_size`.
    fn rank(&self) -> u32;

    /// The number of ranks.
    fn world_size(&self) -> u32;

    /// Sends `message` to all ranks, and returns the messages of all ranks, by rank. Every rank must call it
    /// equally often.
    ///
    /// # Errors
    /// `Deadline` when some rank has not called it by `deadline`.
    fn all_gather(&self, message: Vec<u8>, deadline: Instant) -> Result<Vec<Vec<u8>>>;
}

/// A process group whose ranks are threads of one process.
#[derive(Debug)]
pub struct ThreadGroup {
    rank: u32,
    shared: Arc<GroupState>,
}

#[derive(Debug, Default)]
struct GroupState {
    world: usize,
    rounds: Mutex<Rounds>,
    signal: Signal,
}

/// The messages of the current round, and those of the last complete one.
#[derive(Debug, Default)]
struct Rounds {
    coming: Vec<Option<Vec<u8>>>,
    complete: Vec<Vec<u8>>,
    number: u64,
}

impl ThreadGroup {
    /// Creates a group of `world_size` ranks; returns its members by rank.
    pub fn new(world_size: u32) -> Vec<Arc<ThreadGroup>> {
        let world = world_size as usize;
        let rounds = Mutex::new(Rounds { coming: vec![None; world], ..Rounds::default() });
        let shared = Arc::new(GroupState { world, rounds, signal: Signal::default() });
        (0..world_size).map(|rank| Arc::new(Self { rank, shared: shared.clone() })).collect()
    }
}

impl ProcessGroup for ThreadGroup {
    fn rank(&self) -> u32 {
        self.rank
    }

    fn world_size(&self) -> u32 {
        self.shared.world as u32
    }

    fn all_gather(&self, message: Vec<u8>, deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let GroupState { rounds, signal, .. } = &*self.shared;
        let number = {
            let mut rounds = lock(rounds);
            rounds.coming[self.rank as usize] = Some(message);
            let number = rounds.number;
            if rounds.coming.iter().all(Option::is_some) {
                // No rank waits for the previous round any more: all of its ranks are in this one.
                rounds.complete = rounds.coming.iter_mut().filter_map(Option::take).collect();
                rounds.number += 1;
                signal.notify();
            }
            number
        };
        let look = || {
            let rounds = lock(rounds);
            (rounds.number > number).then(|| rounds.complete.clone())
        };
        if let Some(gathered) = signal.wait_until(deadline, look) {
            return Ok(gathered);
        }
        let mut rounds = lock(rounds);
        if rounds.number > number {
            // The round was completed just now: the other ranks use the message of this rank.
            return Ok(rounds.complete.clone());
        }
        rounds.coming[self.rank as usize] = None;
        Err(Error::new(ErrorKind::Deadline, "some rank did not take part in a save before its deadline")
            .with_rank(self.rank))
    }
}
