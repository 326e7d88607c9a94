//! A planner or storage writer of the program that hangs keeps the ranks for a bounded time.

use crate::fixtures::executor::LONG;
use crate::ranks::board::Board;
use ashore::compat::torch::{
    AsyncCheckpointExecutor, CheckpointFuture, ExecuteOptions, Metadata, SavePlan, StorageWriter, ThreadExecutor,
    WriteFuture, WriteResult,
};
use ashore::{CheckpointExecutor, ErrorKind, Outcome, Result, SaveOptions, StateDict};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

const SHORT: Duration = Duration::from_millis(300);
/// Much longer than any bound that is tested.
const HANGS: Duration = Duration::from_secs(20);

fn state(rank: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.tensor(format!("rank.{rank}"), vec![rank as u8; 100]).unwrap();
    state
}

/// A storage writer whose `finish` waits until the test lets it go on.
struct Hanging {
    entered: Sender<()>,
    go_on: Receiver<()>,
    returned: Arc<AtomicBool>,
}

impl StorageWriter for Hanging {
    fn reset(&mut self, _: Option<&Path>) -> Result<()> {
        Ok(())
    }
    fn set_up_storage_writer(&mut self, _: bool) -> Result<()> {
        Ok(())
    }
    fn prepare_local_plan(&mut self, plan: SavePlan) -> Result<SavePlan> {
        Ok(plan)
    }
    fn prepare_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<Vec<SavePlan>> {
        Ok(plans)
    }
    fn write_data(&mut self, plan: &SavePlan, _: StateDict<'static>) -> Result<WriteFuture> {
        let result = |fqn| WriteResult { fqn, size_in_bytes: 0, storage_data: serde_json::Value::Null };
        let results = plan.items.iter().map(|item| result(item.fqn.clone())).collect();
        Ok(Box::pin(async move { Ok(results) }))
    }
    fn finish(&mut self, _: &mut Metadata, _: Vec<Vec<WriteResult>>) -> Result<()> {
        self.entered.send(()).unwrap();
        let _ = self.go_on.recv_timeout(HANGS);
        self.returned.store(true, Ordering::Release);
        Ok(())
    }
}

/// Two ranks that save step 1 with a storage writer which hangs on rank 0.
struct Hung {
    ranks: Vec<ThreadExecutor>,
    saves: Vec<CheckpointFuture>,
    go_on: Sender<()>,
    returned: Arc<AtomicBool>,
}

impl Hung {
    fn start(root: &Path, timeout: Duration) -> Self {
        let board = Board::new();
        let build = |rank| {
            let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20);
            let builder = builder.ranks(board.rank(rank, 2)).run("test");
            std::thread::spawn(move || ThreadExecutor::new(Arc::new(builder.build().unwrap())).unwrap())
        };
        let ranks: Vec<_> = [0, 1].map(build).into_iter().map(|rank| rank.join().unwrap()).collect();
        let ((entered, hangs), returned) = (channel(), Arc::new(AtomicBool::new(false)));
        let (mut release, mut saves) = (None, Vec::new());
        for (rank, executor) in ranks.iter().enumerate() {
            let (go_on, wait) = channel();
            release.get_or_insert(go_on);
            let writer = Hanging { entered: entered.clone(), go_on: wait, returned: returned.clone() };
            let options = ExecuteOptions::new().storage_writer(writer).timeout(timeout);
            saves.push(executor.execute_save(state(rank).into(), options).unwrap());
        }
        hangs.recv_timeout(LONG).unwrap();
        Self { ranks, saves, go_on: release.unwrap(), returned }
    }

    /// Saves a step on both ranks by their engines, whose threads do not wait for the storage writer.
    fn saved(&self, step: u64, timeout: Duration) -> Vec<Result<Outcome>> {
        let save = |rank: usize| {
            let engine = self.ranks[rank].executor();
            engine.save_with(step, state(rank), SaveOptions::default().timeout(timeout))?.wait(LONG)
        };
        std::thread::scope(|scope| {
            let threads = [0, 1].map(|rank| scope.spawn(move || save(rank)));
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }
}

/// The rounds thread waited for the storage writer without a deadline, and so did every later save.
#[test]
fn a_storage_writer_that_hangs_does_not_keep_the_ranks_after_its_deadline() {
    let root = tempfile::tempdir().unwrap();
    let hung = Hung::start(root.path(), SHORT);
    hung.saved(2, LONG).into_iter().for_each(|saved| drop(saved.unwrap()));
    assert!(!hung.returned.load(Ordering::Acquire), "the storage writer still hangs");
    hung.go_on.send(()).unwrap();
    for save in &hung.saves {
        assert_eq!(save.result(LONG).unwrap_err().kind(), ErrorKind::Deadline);
    }
    hung.saved(3, LONG).into_iter().for_each(|saved| drop(saved.unwrap()));
}

/// A call of `save` with a new structure waited for the share of the plan without a deadline.
#[test]
fn a_save_with_a_new_structure_does_not_wait_for_a_storage_writer_after_its_own_deadline() {
    let root = tempfile::tempdir().unwrap();
    let hung = Hung::start(root.path(), LONG);
    for saved in hung.saved(2, SHORT) {
        let error = saved.unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(2)), "{error}");
        assert!(error.message().contains("storage writer that has the ranks"), "{error}");
    }
    assert!(!hung.returned.load(Ordering::Acquire), "the storage writer still hangs");
    hung.go_on.send(()).unwrap();
    for save in &hung.saves {
        assert!(save.result(LONG).unwrap().is_some());
    }
    hung.saved(3, LONG).into_iter().for_each(|saved| drop(saved.unwrap()));
}
