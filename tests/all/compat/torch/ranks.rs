//! Several ranks, as threads of one process, with a storage writer of their own: plans and failures of all of
//! them.

use super::job::Job;
use crate::fixtures::executor::LONG;
use ashore::compat::torch::{
    AsyncCheckpointExecutor, DefaultSavePlanner, ExecuteOptions, Metadata, SavePlan, StorageMetadata, StorageWriter,
    WriteFuture, WriteResult,
};
use ashore::{Error, ErrorKind, Result, StateDict};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What the ranks did, in the order in which each did it.
#[derive(Default)]
struct Log {
    calls: Vec<String>,
    written: Vec<Vec<String>>,
    finished: usize,
    /// How many ranks were told that they are the coordinator.
    coordinators: usize,
}

/// Records its calls, and fails where the test tells it to.
struct Noting {
    log: Arc<Mutex<Log>>,
    fails_in: Option<&'static str>,
}

impl Noting {
    fn note(&self, call: &'static str) -> Result<()> {
        self.log.lock().unwrap().calls.push(call.into());
        if self.fails_in == Some(call) {
            return Err(Error::new(ErrorKind::NoSpace, format!("{call} failed")));
        }
        Ok(())
    }
}

impl StorageWriter for Noting {
    fn reset(&mut self, _: Option<&Path>) -> Result<()> {
        self.note("reset")
    }
    fn set_up_storage_writer(&mut self, is_coordinator: bool) -> Result<()> {
        self.log.lock().unwrap().coordinators += usize::from(is_coordinator);
        self.note("set_up_storage_writer")
    }
    fn prepare_local_plan(&mut self, plan: SavePlan) -> Result<SavePlan> {
        self.note("prepare_local_plan").map(|()| plan)
    }
    fn prepare_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<Vec<SavePlan>> {
        self.note("prepare_global_plan").map(|()| plans)
    }
    fn write_data(&mut self, plan: &SavePlan, state: StateDict<'static>) -> Result<WriteFuture> {
        self.note("write_data")?;
        let names: Vec<String> = plan.items.iter().map(|item| item.fqn.clone()).collect();
        assert!(
            names.iter().all(|name| state.layouts().any(|(n, _)| n == name) || state.value_names().any(|n| n == name))
        );
        self.log.lock().unwrap().written.push(names.clone());
        // A writer thread that dies loses its items: one result is missing.
        let lost = usize::from(self.fails_in == Some("lost"));
        let result = |fqn| WriteResult { fqn, size_in_bytes: 0, storage_data: serde_json::Value::Null };
        Ok(Box::pin(async move { Ok(names.into_iter().skip(lost).map(result).collect()) }))
    }
    fn finish(&mut self, _: &mut Metadata, _: Vec<Vec<WriteResult>>) -> Result<()> {
        self.note("finish")?;
        self.log.lock().unwrap().finished += 1;
        Ok(())
    }
}

/// A replicated table, and a tensor of the rank's own.
fn part(rank: usize) -> StateDict<'static> {
    let mut state = StateDict::new();
    for (name, len) in [("a", 4000), ("b", 3000), ("c", 500), ("d", 400)] {
        state.tensor(name, vec![1_u8; len]).unwrap();
    }
    state.tensor(format!("rank{rank}"), vec![rank as u8; 100]).unwrap();
    state.value("epoch", &1).unwrap();
    state
}

type Ended = Vec<Result<Option<Metadata>>>;

fn save(
    world: u32,
    change: impl Fn(usize, ExecuteOptions) -> ExecuteOptions + Sync,
    fails_in: impl Fn(usize) -> Option<&'static str> + Sync,
) -> (Ended, Log) {
    let root = tempfile::tempdir().unwrap();
    let log = Arc::new(Mutex::new(Log::default()));
    let job = Job::start(root.path(), world);
    let ended = job.each(|rank, executor, group| {
        let writer = Noting { log: log.clone(), fails_in: fails_in(rank) };
        let options = change(rank, ExecuteOptions::new().process_group(group).storage_writer(writer));
        executor.execute_save(part(rank).into(), options)?.result(LONG)
    });
    drop(job);
    (ended, Arc::into_inner(log).unwrap().into_inner().unwrap())
}

#[test]
fn items_of_several_ranks_are_written_once_and_the_bytes_are_shared_out() {
    let (ended, log) = save(2, |_, options| options, |_| None);
    let metadata = ended[0].as_ref().unwrap().as_ref().unwrap();
    assert_eq!(ended[1].as_ref().unwrap().as_ref().unwrap(), metadata, "the same on every rank");
    assert_eq!(metadata.state_dict_metadata.len(), 7);
    assert_eq!(metadata.storage_data.len(), 7);
    let StorageMetadata::Tensor(a) = &metadata.state_dict_metadata["a"] else { panic!() };
    assert_eq!(a.chunks.len(), 1);
    let mut all: Vec<_> = log.written.concat();
    all.sort();
    assert_eq!(all, ["a", "b", "c", "d", "epoch", "rank0", "rank1"]);
    let bytes = |names: &Vec<String>| -> usize {
        names
            .iter()
            .map(|n| [("a", 4000), ("b", 3000), ("c", 500), ("d", 400)].iter().find(|(m, _)| n == m).map_or(0, |x| x.1))
            .sum()
    };
    let mut loads: Vec<_> = log.written.iter().map(bytes).collect();
    loads.sort();
    assert_eq!(loads, [3900, 4000]);
    assert_eq!(
        (log.finished, log.coordinators),
        (1, 1),
        "the coordinator alone commits, and is told that it is the one"
    );

    let lowest =
        |_, options: ExecuteOptions| options.planner(DefaultSavePlanner::new().dedup_save_to_lowest_rank(true));
    let (_, log) = save(2, lowest, |_| None);
    let mut loads: Vec<_> = log.written.iter().map(bytes).collect();
    loads.sort();
    assert_eq!(loads, [0, 7900]);
}

#[test]
fn the_steps_are_those_of_torch_in_its_order() {
    let (ended, log) = save(1, |_, options| options, |_| None);
    assert!(ended[0].as_ref().unwrap().is_some());
    let order = ["reset", "set_up_storage_writer", "prepare_local_plan", "prepare_global_plan", "write_data", "finish"];
    assert_eq!(log.calls, order);
}

#[test]
fn without_collectives_every_rank_commits_for_itself() {
    let (ended, log) = save(3, |_, options| options.use_collectives(false), |_| None);
    for (rank, ended) in ended.iter().enumerate() {
        let metadata = ended.as_ref().unwrap().as_ref().unwrap();
        assert_eq!(metadata.state_dict_metadata.len(), 6);
        assert!(metadata.state_dict_metadata.contains_key(&format!("rank{rank}")));
    }
    assert_eq!(
        (log.finished, log.written.len(), log.coordinators),
        (3, 3, 1),
        "rank 0 is the coordinator, as in torch"
    );
}

#[test]
fn a_failure_of_one_rank_in_any_step_fails_all_of_them_and_names_it() {
    for collectives in [true, false] {
        for step in ["reset", "set_up_storage_writer", "prepare_local_plan", "write_data", "lost"] {
            let fails = |rank| (rank == 1).then_some(step);
            let (ended, log) = save(3, |_, options| options.use_collectives(collectives), fails);
            let kind = if step == "lost" { ErrorKind::Internal } else { ErrorKind::NoSpace };
            for ended in ended {
                let error = ended.unwrap_err();
                assert_eq!((error.kind(), error.rank()), (kind, Some(1)), "{step}");
            }
            assert!(!collectives || log.finished == 0, "{step}");
        }
    }
    for step in ["prepare_global_plan", "finish"] {
        let (ended, _) = save(3, |_, options| options, |rank| (rank == 0).then_some(step));
        for ended in ended {
            assert_eq!(ended.unwrap_err().rank(), Some(0), "{step}");
        }
    }
}

#[test]
fn ranks_that_disagree_and_ranks_that_never_come_fail_the_others() {
    let plans = |dtype: usize| {
        let mut state = StateDict::new();
        if dtype == 0 {
            state.tensor("t", vec![1_u8; 8]).unwrap()
        } else {
            state.tensor("t", vec![1_i8; 8]).unwrap()
        };
        SavePlan::of(&state)
    };
    let mut planner = DefaultSavePlanner::new();
    use ashore::compat::torch::{SavePlanner, WriteKind};
    let mut shifted = plans(0);
    let items = Arc::make_mut(&mut shifted.items);
    let WriteKind::Tensor { chunk, .. } = &mut items[0].kind else { panic!() };
    chunk.offsets[0] = 4;
    assert!(planner.create_global_plan(vec![shifted.clone()]).unwrap_err().to_string().contains("bounds"));
    let WriteKind::Tensor { chunk, .. } = &mut Arc::make_mut(&mut shifted.items)[0].kind else { panic!() };
    chunk.sizes[0] = 4;
    assert!(planner.create_global_plan(vec![shifted.clone()]).unwrap_err().to_string().contains("cover"));
    assert!(planner.create_global_plan(vec![plans(0), shifted.clone()]).unwrap_err().to_string().contains("overlap"));
    let mut other = plans(1);
    let WriteKind::Tensor { chunk, .. } = &mut Arc::make_mut(&mut other.items)[0].kind else { panic!() };
    (chunk.offsets[0], chunk.sizes[0]) = (0, 4);
    assert!(planner.create_global_plan(vec![other, shifted]).unwrap_err().to_string().contains("disagree"));

    // A rank that makes no call is missing at the deadline.
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3);
    let ended = job.each(|rank, executor, _| {
        let writer = Noting { log: Arc::default(), fails_in: None };
        let options = ExecuteOptions::new().storage_writer(writer).timeout(Duration::from_millis(300));
        (rank != 1).then(|| executor.execute_save(part(rank).into(), options).unwrap().result(LONG))
    });
    for ended in ended.into_iter().flatten() {
        let error = ended.unwrap_err();
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Deadline, &[1][..]), "{error}");
    }
}
