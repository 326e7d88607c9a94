//! Process groups: the exchange of messages between the ranks of a save.

use crate::completion::Signal;
use crate::error::{Error, ErrorKind, Result};
use crate::ranks::{Callback, Member};
use crate::sync::{Mutex, lock};
use std::sync::Arc;
use std::time::Instant;

/// The ranks that save together. One collective is enough: it implements all other exchanges.
pub trait ProcessGroup: Send + Sync {
    /// This rank, below `world_size`.
    fn rank(&self) -> u32;

    /// The number of ranks.
    fn world_size(&self) -> u32;

    /// Sends `message` to all ranks, and returns the messages of all ranks, by rank. Every rank must make the
    /// same number of calls.
    ///
    /// # Errors
    /// `Deadline` when some rank has not made the call by `deadline`.
    fn all_gather(&self, message: Vec<u8>, deadline: Instant) -> Result<Vec<Vec<u8>>>;
}

/// The coordinator over a process group, for the engine of each of its ranks.
///
/// ```
/// use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, ThreadExecutor, ThreadGroup, coordinator};
/// use ashore::{CheckpointExecutor, HostTensor, StateDict};
/// use std::{sync::Arc, time::Duration};
/// # let dir = tempfile::tempdir().unwrap();
/// # let root = dir.path();
/// let rank = |group: Arc<ThreadGroup>| -> ashore::Result<()> {
///     let first = 2 * ashore::compat::torch::ProcessGroup::rank(&*group) as usize;
///     let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20);
///     let engine = builder.ranks(Arc::new(coordinator(group)?)).run("run-7").build()?;
///     let executor = ThreadExecutor::new(Arc::new(engine))?;
///     let mut state = StateDict::new();
///     state.tensor_box("weights", [4], [first], HostTensor::new(vec![first as f32; 2], [2]))?;
///     let future = executor.execute_save(state.into(), ExecuteOptions::new().checkpoint_id("step-1"))?;
///     let metadata = future.result(Duration::from_secs(60))?.expect("no other save was under way");
///     assert_eq!(metadata.storage_data.len(), 2, "the boxes of both ranks");
///     executor.close(Duration::from_secs(60))
/// };
/// std::thread::scope(|scope| {
///     let ranks: Vec<_> = ThreadGroup::new(2).into_iter().map(|group| scope.spawn(|| rank(group))).collect();
///     ranks.into_iter().try_for_each(|rank| rank.join().unwrap())
/// })?;
/// let step = ashore::Catalog::open(root)?.checkpoint(1)?;
/// assert_eq!(step.read_as::<f32>("weights")?, [0.0, 0.0, 2.0, 2.0]);
/// # Ok::<(), ashore::Error>(())
/// ```
///
/// # Errors
/// As [`Callback::new`].
pub fn coordinator(group: Arc<dyn ProcessGroup>) -> Result<Callback> {
    // The rank on its host is unknown, and no coordinator uses it.
    let member = Member { rank: group.rank(), world: group.world_size(), local_rank: group.rank() };
    Callback::new(member, move |message, deadline| group.all_gather(message.to_vec(), deadline))
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

/// The messages of the current round, and the messages of the last complete round.
#[derive(Debug, Default)]
struct Rounds {
    coming: Vec<Option<Vec<u8>>>,
    /// Whether each rank has come to the current round. A rank may have left again at its deadline.
    came: Vec<bool>,
    complete: Vec<Vec<u8>>,
    number: u64,
}

impl ThreadGroup {
    /// Creates a group of `world_size` ranks; returns its members by rank.
    pub fn new(world_size: u32) -> Vec<Arc<ThreadGroup>> {
        let world = world_size as usize;
        let rounds = Mutex::new(Rounds { coming: vec![None; world], came: vec![false; world], ..Rounds::default() });
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
            rounds.came[self.rank as usize] = true;
            let number = rounds.number;
            if rounds.coming.iter().all(Option::is_some) {
                // No rank waits for the previous round any more: all ranks are in this round.
                rounds.complete = rounds.coming.iter_mut().filter_map(Option::take).collect();
                rounds.came.fill(false);
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
        let missing = (0..).zip(&rounds.came).filter(|(_, came)| !**came).map(|(rank, _)| rank);
        Err(Error::new(ErrorKind::Deadline, "some rank did not take part in a save before its deadline")
            .with_ranks(missing))
    }
}
