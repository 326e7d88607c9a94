//! Several ranks save one checkpoint: threads with an executor each, over one directory.

mod agreeing;
pub mod board;
mod committing;
mod sessions;

use ashore::{CheckpointExecutor, Result, Save, StateDict};
use board::Board;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const LONG: Duration = Duration::from_secs(60);

/// The executors of a job of `world` ranks over `root`.
struct Job {
    board: Arc<Board>,
    ranks: Vec<CheckpointExecutor>,
}

impl Job {
    fn start(root: &Path, world: u32, timeout: Duration) -> Self {
        let board = Board::new();
        let ranks = meet(&board, world, |_| root.to_owned(), timeout);
        Self { board, ranks: ranks.into_iter().map(Result::unwrap).collect() }
    }

    /// Calls `save` on all ranks at once. Each saves the tensor `rank.<its number>`, with bytes of the step.
    fn save(&self, step: u64) -> Vec<Result<Save>> {
        let saves = (0..).zip(&self.ranks).map(|(rank, executor)| executor.save(step, state(rank, step)));
        saves.collect()
    }

    /// How the save of every rank ended.
    fn saved(&self, step: u64) -> Vec<Result<ashore::Outcome>> {
        self.save(step).into_iter().map(|save| save?.wait(LONG)).collect()
    }
}

/// Builds the executors of `world` ranks, each of which sees the root that `root` gives it.
fn meet(
    board: &Arc<Board>,
    world: u32,
    root: impl Fn(u32) -> std::path::PathBuf,
    timeout: Duration,
) -> Vec<Result<CheckpointExecutor>> {
    let build = |rank: u32| {
        let (coordinator, root) = (board.rank(rank, world), root(rank));
        std::thread::spawn(move || {
            let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20).save_timeout(timeout);
            builder.ranks(coordinator).run("test").build()
        })
    };
    let threads: Vec<_> = (0..world).map(build).collect();
    threads.into_iter().map(|thread| thread.join().unwrap()).collect()
}

fn state(rank: usize, step: u64) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor(format!("rank.{rank}"), vec![step as u32; 1000 + rank]).unwrap();
    state.value("step", &step).unwrap();
    state
}

fn assert_holds(root: &Path, world: usize, step: u64) {
    let checkpoint = ashore::Catalog::open(root).unwrap().checkpoint(step).unwrap();
    assert_eq!(checkpoint.world() as usize, world);
    assert_eq!(checkpoint.value::<u64>("step").unwrap(), step);
    for rank in 0..world {
        let read = checkpoint.read_as::<u32>(&format!("rank.{rank}")).unwrap();
        assert_eq!(read, vec![step as u32; 1000 + rank]);
    }
    assert!(checkpoint.verify().unwrap().is_sound());
}

fn steps(root: &Path) -> Vec<u64> {
    let listing = ashore::Catalog::open(root).unwrap().list().unwrap();
    listing.iter().map(|step| step.step).collect()
}
