//! Several ranks save one checkpoint: threads with an executor each, over one directory.

mod agreeing;
pub mod board;
mod committing;
mod restoring;
mod sessions;

use ashore::{Builder, CheckpointExecutor, Outcome, Result, StateDict};
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
        Self::with(root, world, timeout, |_, builder| builder)
    }

    /// The same, with the builder of each rank as `with` makes it.
    fn with(root: &Path, world: u32, timeout: Duration, with: impl Fn(u32, Builder) -> Builder) -> Self {
        let board = Board::new();
        let ranks = build(&board, world, |_| root.to_owned(), timeout, with);
        Self { board, ranks: ranks.into_iter().map(Result::unwrap).collect() }
    }

    /// Calls `work` for each rank, all at once: the first save of a structure waits for the other ranks.
    fn each<T: Send>(&self, work: impl Fn(usize, &CheckpointExecutor) -> T + Sync) -> Vec<T> {
        let work = &work;
        std::thread::scope(|scope| {
            let threads =
                self.ranks.iter().enumerate().map(|(rank, executor)| scope.spawn(move || work(rank, executor)));
            threads.collect::<Vec<_>>().into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// How the save of every rank ended. Each saves the tensor `rank.<its number>`, with bytes of the step.
    fn saved(&self, step: u64) -> Vec<Result<Outcome>> {
        self.each(|rank, executor| executor.save(step, state(rank, step))?.wait(LONG))
    }

    /// Saves a step on all ranks, so that they have a plan for later ones.
    fn warm(&self, step: u64) {
        self.saved(step).into_iter().for_each(|ended| drop(ended.unwrap()));
    }
}

/// Builds the executors of `world` ranks, each of which sees the root that `root` gives it.
fn meet(
    board: &Arc<Board>,
    world: u32,
    root: impl Fn(u32) -> std::path::PathBuf,
    timeout: Duration,
) -> Vec<Result<CheckpointExecutor>> {
    build(board, world, root, timeout, |_, builder| builder)
}

fn build(
    board: &Arc<Board>,
    world: u32,
    root: impl Fn(u32) -> std::path::PathBuf,
    timeout: Duration,
    with: impl Fn(u32, Builder) -> Builder,
) -> Vec<Result<CheckpointExecutor>> {
    let build = |rank: u32| {
        let (coordinator, root) = (board.rank(rank, world), root(rank));
        let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20).save_timeout(timeout);
        let builder = with(rank, builder.ranks(coordinator).run("test"));
        std::thread::spawn(move || builder.build())
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
