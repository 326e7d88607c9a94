//! Several ranks save one step by the engine: boxes, planners, the parameters of torch, failures, messages.

use super::job::Job;
use crate::compat::engine;
use crate::fixtures::executor::LONG;
use ashore::compat::torch::{
    AsyncCheckpointExecutor, CheckpointFuture, DefaultSavePlanner, EngineWriter, ExecuteOptions, Metadata, SavePlan,
    SavePlanner, Staging, StorageMeta, StorageMetadata, ThreadGroup, WriteItem, WriteKind,
};
use ashore::{Catalog, Dtype, Error, ErrorKind, HostTensor, Layout, Result, StateDict, Targets};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

const COLUMNS: usize = 5;

fn element(row: usize, column: usize) -> i64 {
    (row * 100 + column) as i64
}

/// Rank 1 has one row more of a matrix than the others; every rank has the scale, and a tensor of its own.
fn state(rank: usize, world: usize) -> StateDict<'static> {
    let (rows, more) = (3 * world + 1, usize::from(world > 1));
    let first = 3 * rank + usize::from(rank > more);
    let mine = first..first + 3 + usize::from(rank == more);
    let elements: Vec<i64> =
        mine.clone().flat_map(|row| (0..COLUMNS).map(move |column| element(row, column))).collect();
    let mut state = StateDict::new();
    let source = HostTensor::new(Arc::new(elements), [mine.len(), COLUMNS]);
    state.tensor_box("rows", [rows, COLUMNS], [first, 0], source).unwrap();
    state.tensor("scale", Arc::new(vec![0.5_f32; 7])).unwrap();
    state.tensor(format!("rank.{rank}"), Arc::new(vec![rank as u8; 9])).unwrap();
    state.value("epoch", &3).unwrap().rank_value("seed", &(rank * 10)).unwrap();
    state
}

fn to(step: u64) -> ExecuteOptions {
    ExecuteOptions::new().checkpoint_id(format!("step-{step}"))
}

fn ended(future: Result<CheckpointFuture>) -> Result<Metadata> {
    Ok(future?.result(LONG)?.expect("nothing else was being saved"))
}

/// Saves a step by all ranks, each with the options that `change` makes of the usual ones.
fn save(
    job: &Job,
    step: u64,
    change: impl Fn(usize, ExecuteOptions) -> ExecuteOptions + Sync,
) -> Vec<Result<Metadata>> {
    let world = job.ranks.len();
    job.each(|rank, executor, _| ended(executor.execute_save(state(rank, world).into(), change(rank, to(step)))))
}

/// Checks the step, as 1, 2 and 3 readers read it, each its part of the rows.
fn assert_holds(root: &Path, step: u64, world: usize, name: impl Fn(&str) -> String) {
    let checkpoint = Catalog::open(root).unwrap().checkpoint(step).unwrap();
    assert_eq!(checkpoint.world() as usize, world);
    let rows = 3 * world + 1;
    for readers in 1..=3 {
        for reader in 0..readers {
            let (first, last) = (rows * reader / readers, rows * (reader + 1) / readers);
            let mut part = vec![0_i64; (last - first) * COLUMNS];
            let slice = [first..last, 0..COLUMNS];
            checkpoint.read_into(Targets::new().slice_elements(name("rows"), &slice, &mut part)).unwrap();
            let rows = first..last;
            let expected: Vec<i64> =
                rows.flat_map(|row| (0..COLUMNS).map(move |column| element(row, column))).collect();
            assert_eq!(part, expected);
        }
    }
    assert_eq!(checkpoint.read_as::<f32>(&name("scale")).unwrap(), [0.5; 7]);
    for rank in 0..world {
        assert_eq!(checkpoint.read(&name(&format!("rank.{rank}"))).unwrap(), [rank as u8; 9]);
        assert_eq!(checkpoint.rank_value::<usize>(rank as u32, "seed").unwrap(), rank * 10);
    }
    assert_eq!(checkpoint.value::<u32>(&name("epoch")).unwrap(), 3);
    assert!(checkpoint.verify().unwrap().is_sound());
}

#[test]
fn ranks_save_one_step_of_boxes_and_each_learns_what_all_have_saved() {
    let root = tempfile::tempdir().unwrap();
    for world in 1..=3 {
        let job = Job::start(root.path(), world);
        let world = world as usize;
        for step in [10 * world as u64, 10 * world as u64 + 1] {
            let told = save(&job, step, |_, options| options);
            assert_holds(root.path(), step, world, str::to_owned);
            let metadata = told[0].as_ref().unwrap();
            assert!(told.iter().all(|told| told.as_ref().unwrap() == metadata), "the same on every rank");
            let StorageMetadata::Tensor(rows) = &metadata.state_dict_metadata["rows"] else { panic!() };
            assert_eq!((&rows.size[..], rows.chunks.len()), (&[3 * world + 1, COLUMNS][..], world));
            assert_eq!(metadata.state_dict_metadata["epoch"], StorageMetadata::Bytes);
            // Where it says, the bytes are.
            let directory = metadata.storage_meta.as_ref().unwrap().checkpoint_id.clone();
            for written in metadata.storage_data.iter().filter(|written| written.fqn == "rows") {
                let data = &written.storage_data;
                let file = std::fs::read(directory.join(data["file"].as_str().unwrap())).unwrap();
                let at = data["offset"].as_u64().unwrap() as usize;
                let first = element(data["at"][0].as_u64().unwrap() as usize, 0);
                assert_eq!(file[at..at + 8], first.to_le_bytes());
                assert_eq!(written.size_in_bytes as usize % (8 * COLUMNS), 0);
            }
        }
        drop(job);
    }
}

/// What a planner was told, and what it does.
#[derive(Clone, Default)]
struct Told {
    coordinators: Arc<Mutex<Vec<usize>>>,
    /// How many plans each call of `create_global_plan` got.
    planned: Arc<Mutex<Vec<usize>>>,
}

/// Renames everything in plan and data, and fails where it is told to.
struct Renames {
    planner: DefaultSavePlanner,
    rank: usize,
    told: Told,
    fails_in: &'static str,
    /// Plans without checks, as for a part of a state.
    plain: bool,
}

fn renamed(name: &str) -> String {
    format!("new.{name}")
}

impl Renames {
    fn new(rank: usize, told: &Told) -> Self {
        Self { planner: DefaultSavePlanner::new(), rank, told: told.clone(), fails_in: "", plain: false }
    }

    fn step(&self, step: &'static str) -> Result<()> {
        match self.fails_in {
            "panic" if step == "resolve_data" => panic!("on purpose"),
            fails if fails == step => Err(Error::new(ErrorKind::NoSpace, format!("{step} failed"))),
            _ => Ok(()),
        }
    }
}

impl SavePlanner for Renames {
    fn set_up_planner(&mut self, state: &StateDict<'_>, meta: Option<&StorageMeta>, coordinator: bool) -> Result<()> {
        self.step("set_up_planner")?;
        if coordinator {
            self.told.coordinators.lock().unwrap().push(self.rank);
        }
        self.planner.set_up_planner(state, meta, coordinator)
    }

    fn create_local_plan(&mut self) -> Result<SavePlan> {
        self.step("create_local_plan")?;
        let plan = self.planner.create_local_plan()?;
        let items = plan.items.iter().map(|item| WriteItem { fqn: renamed(&item.fqn), kind: item.kind.clone() });
        let mut plan = SavePlan::new(items.collect());
        plan.planner_data = Some(serde_json::json!({ "of": self.rank }));
        Ok(plan)
    }

    fn create_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<(Vec<SavePlan>, Metadata)> {
        self.step("create_global_plan")?;
        self.told.planned.lock().unwrap().push(plans.len());
        if self.plain {
            return Ok((plans, Metadata::default()));
        }
        let (mut plans, metadata) = self.planner.create_global_plan(plans)?;
        // Data of the writer reaches the rank that it is for, and no other.
        for (rank, plan) in plans.iter_mut().enumerate() {
            plan.storage_data = Some(serde_json::json!(format!("for {rank}")));
        }
        Ok((plans, metadata))
    }

    fn finish_plan(&mut self, plan: SavePlan) -> Result<SavePlan> {
        self.step("finish_plan")?;
        if !self.plain {
            assert_eq!(plan.storage_data, Some(serde_json::json!(format!("for {}", self.rank))));
            assert_eq!(plan.planner_data, Some(serde_json::json!({ "of": self.rank })));
        }
        Ok(plan)
    }

    fn resolve_data(&mut self, plan: &SavePlan, state: StateDict<'static>) -> Result<StateDict<'static>> {
        self.step("resolve_data")?;
        let planned = |item: &WriteItem, name: &str| item.fqn == renamed(name);
        // Values of the rank alone are not planned; their names stay.
        state.renamed(|name| match name {
            "seed" => Some(name.to_owned()),
            _ => plan.items.iter().any(|item| planned(item, name)).then(|| renamed(name)),
        })
    }
}

#[test]
fn a_planner_renames_on_all_ranks_and_the_coordinator_has_all_plans() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3);
    for step in 1..=2 {
        let told = Told::default();
        let saved = save(&job, step, |rank, options| options.planner(Renames::new(rank, &told)));
        for metadata in saved {
            let metadata = metadata.unwrap();
            assert!(metadata.state_dict_metadata.keys().all(|name| name.starts_with("new.")));
            assert_eq!(metadata.planner_data, Some(serde_json::json!({ "of": 0 })), "on every rank");
        }
        assert_holds(root.path(), step, 3, renamed);
        assert_eq!((&told.coordinators.lock().unwrap()[..], &told.planned.lock().unwrap()[..]), (&[0][..], &[3][..]));
    }
}

/// The engine keeps the values of rank 0; a planner may let another rank write one.
#[test]
fn a_value_that_only_another_rank_has_is_saved_where_a_planner_plans() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3);
    let saved = job.each(|rank, executor, _| {
        let mut state = state(rank, 3);
        state.value(format!("only.{rank}"), &rank)?;
        ended(executor.execute_save(state.into(), to(1).planner(DefaultSavePlanner::new())))
    });
    for metadata in saved {
        assert_eq!(metadata.unwrap().state_dict_metadata["only.2"], StorageMetadata::Bytes);
    }
    let checkpoint = Catalog::open(root.path()).unwrap().checkpoint(1).unwrap();
    assert_eq!([0, 1, 2].map(|rank| checkpoint.value::<usize>(&format!("only.{rank}")).unwrap()), [0, 1, 2]);
    assert_holds(root.path(), 1, 3, str::to_owned);
}

#[test]
fn without_collectives_every_rank_plans_for_itself_and_the_step_is_still_one() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3);
    let told = Told::default();
    let options = |rank, options: ExecuteOptions| {
        options.planner(Renames { plain: true, ..Renames::new(rank, &told) }).use_collectives(false)
    };
    for saved in save(&job, 1, options) {
        saved.unwrap();
    }
    assert_holds(root.path(), 1, 3, renamed);
    // As in torch, rank 0 is the coordinator all the same, and each planner has its own plan.
    assert_eq!((&told.coordinators.lock().unwrap()[..], &told.planned.lock().unwrap()[..]), (&[0][..], &[1, 1, 1][..]));
    // torch's default planner refuses a plan of one rank that does not cover a tensor.
    let default = |_, options: ExecuteOptions| options.planner(DefaultSavePlanner::new()).use_collectives(false);
    for refused in save(&job, 2, default) {
        let error = refused.unwrap_err();
        assert!(error.message().contains("cover") && error.kind() == ErrorKind::Invalid, "{error}");
    }
    for saved in save(&job, 3, |_, options| options.use_collectives(false)) {
        saved.unwrap();
    }
    assert_holds(root.path(), 3, 3, str::to_owned);
}

#[test]
fn no_dist_saves_with_one_rank_alone_and_the_others_do_not_notice() {
    let (root, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let job = Job::start(root.path(), 3);
    let alone = Arc::new(engine(other.path()).alone().build().unwrap());
    let whole = || {
        let mut state = StateDict::new();
        state.tensor("scale", Arc::new(vec![2.0_f32; 3])).unwrap();
        state
    };
    let told = Told::default();
    let saved = job.each(|rank, executor, group| {
        if rank == 2 {
            // A group is ignored, whichever it is.
            let options = || to(1).no_dist(true).process_group(ThreadGroup::new(9).remove(5));
            let refused = executor.execute_save(whole().into(), options()).unwrap_err();
            assert!(refused.kind() == ErrorKind::Invalid && refused.message().contains("no_dist"), "{refused}");
            // So is an engine that saves with others, as a storage writer.
            let with_others = EngineWriter::new(executor.executor().clone());
            let refused = ended(executor.execute_save(whole().into(), options().storage_writer(with_others)));
            assert!(refused.is_err_and(|error| error.message().contains("several ranks")));
            let planner = Renames { plain: true, ..Renames::new(0, &told) };
            let options = options().use_collectives(false).planner(planner);
            ended(executor.execute_save(whole().into(), options.storage_writer(EngineWriter::new(alone.clone()))))?;
        }
        ended(executor.execute_save(state(rank, 3).into(), to(1).process_group(group)))
    });
    saved.into_iter().for_each(|saved| drop(saved.unwrap()));
    assert_holds(root.path(), 1, 3, str::to_owned);
    let checkpoint = alone.checkpoint(1).unwrap();
    assert_eq!((checkpoint.world(), checkpoint.read_as::<f32>("new.scale").unwrap()), (1, vec![2.0; 3]));
    assert_eq!((&told.coordinators.lock().unwrap()[..], &told.planned.lock().unwrap()[..]), (&[0][..], &[1][..]));

    // An executor of one rank has nothing else; none of the parameters changes what it does.
    let single = ashore::compat::torch::ThreadExecutor::new(alone).unwrap();
    for (step, options) in (2..).zip([to(2).no_dist(true), to(3).use_collectives(false), to(4)]) {
        ended(single.execute_save(whole().into(), options)).unwrap();
        assert_eq!(single.executor().checkpoint(step).unwrap().read_as::<f32>("scale").unwrap(), [2.0; 3]);
    }
}

/// Whatever fails on a rank, all of them fail and name it, nothing becomes visible, and the next save works.
#[test]
fn a_planner_that_fails_on_one_rank_fails_the_save_on_all() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3);
    let steps = ["set_up_planner", "create_local_plan", "finish_plan", "resolve_data", "panic", "create_global_plan"];
    for (step, fails_in) in (1..).zip(steps) {
        for collectives in [true, false] {
            let failing = if fails_in == "create_global_plan" && collectives { 0 } else { 1 };
            let options = |rank, options: ExecuteOptions| {
                let fails_in = if rank == failing { fails_in } else { "" };
                let planner = Renames { fails_in, plain: !collectives, ..Renames::new(rank, &Told::default()) };
                options.planner(planner).use_collectives(collectives)
            };
            let kind = if fails_in == "panic" { ErrorKind::Internal } else { ErrorKind::NoSpace };
            for (rank, failed) in save(&job, step, options).into_iter().enumerate() {
                let error = failed.unwrap_err();
                assert_eq!(error.kind(), kind, "{fails_in} {rank} {error}");
                assert_eq!(error.ranks(), [failing as u32], "{fails_in} collectives={collectives} {rank}: {error}");
            }
            assert!(Catalog::open(root.path()).unwrap().checkpoint(step).is_err());
        }
    }
    // Two ranks that fail are both named.
    let both = |rank, options: ExecuteOptions| {
        let fails_in = if rank > 0 { "create_local_plan" } else { "" };
        options.planner(Renames { fails_in, ..Renames::new(rank, &Told::default()) })
    };
    for failed in save(&job, 20, both) {
        assert_eq!(failed.unwrap_err().ranks(), [1, 2]);
    }
    save(&job, 21, |_, options| options).into_iter().for_each(|saved| drop(saved.unwrap()));
    assert_holds(root.path(), 21, 3, str::to_owned);
}

/// A call that one rank refuses counts on all: the ranks would be out of step afterwards otherwise.
#[test]
fn a_call_that_is_refused_on_one_rank_fails_on_all_and_the_next_one_works() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2);
    let wrong: [fn(ExecuteOptions) -> ExecuteOptions; 3] = [
        |options| options.process_group(ThreadGroup::new(3).remove(1)),
        |options| options.checkpoint_id("/elsewhere/step-1"),
        |options| options.attempt(ashore::Attempt::new()),
    ];
    for (turn, wrong) in (1..).zip(wrong) {
        for planner in [false, true] {
            let options = |rank, options: ExecuteOptions| {
                let options = if planner { options.planner(DefaultSavePlanner::new()) } else { options };
                if rank == 1 { wrong(options) } else { options }
            };
            for (rank, refused) in save(&job, turn, options).into_iter().enumerate() {
                let error = refused.unwrap_err();
                assert_eq!(error.kind(), ErrorKind::Invalid, "{turn} {planner} {rank} {error}");
                assert!(rank == 1 || error.ranks() == [1], "{turn} {planner} {error}");
            }
            save(&job, 10 + turn, |_, options| options).into_iter().for_each(|saved| drop(saved.unwrap()));
            assert_holds(root.path(), 10 + turn, 2, str::to_owned);
        }
    }
}

#[test]
fn a_state_that_comes_later_is_saved_by_all_ranks_in_the_order_of_calls() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 2);
    let saved = job.each(|rank, executor, _| {
        let slow = async move {
            std::thread::sleep(Duration::from_millis(300 * rank as u64));
            Ok(state(rank, 2))
        };
        let later = executor.execute_save(Staging::future(slow).into(), to(1));
        // Made when rank 0 saves the first already, and its state has not come on rank 1.
        std::thread::sleep(Duration::from_millis(100));
        let direct = executor.execute_save(state(rank, 2).into(), to(2));
        (ended(later), ended(direct))
    });
    for (later, direct) in saved {
        assert!(later.is_ok() && direct.is_ok(), "{later:?} {direct:?}");
    }
    for step in [1, 2] {
        assert_holds(root.path(), step, 2, str::to_owned);
    }
    // A staging future that fails on one rank fails the save on both, and names it.
    let failed = job.each(|rank, executor, _| {
        let state =
            async move { if rank == 1 { Err(Error::new(ErrorKind::Device, "no copy")) } else { Ok(state(rank, 2)) } };
        ended(executor.execute_save(Staging::future(state).into(), to(3)))
    });
    for (rank, failed) in failed.into_iter().enumerate() {
        let error = failed.unwrap_err();
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Device, &[1][..]), "{rank} {error}");
    }
    // So does a tensor that never comes, when the ranks have agreed and write.
    let failed = job.each(|rank, executor, _| {
        let late = (format!("late.{rank}"), Layout::new(Dtype::U8, [3]));
        let (stage, staging) = Staging::channel(state(rank, 2), [late])?;
        let future = executor.execute_save(staging.into(), to(3))?;
        if rank == 1 {
            stage.fail(Error::new(ErrorKind::Device, "no copy"));
            return ended(Ok(future));
        }
        let mut stage = stage;
        stage.deliver("late.0", vec![7_u8; 3])?;
        ended(Ok(future))
    });
    for (rank, failed) in failed.into_iter().enumerate() {
        let error = failed.unwrap_err();
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Device, &[1][..]), "{rank} {error}");
    }
    assert!(Catalog::open(root.path()).unwrap().checkpoint(3).is_err());
    // So does one that is cancelled before its state has come.
    let cancelled = job.each(|rank, executor, _| {
        let coming = if rank == 1 {
            Staging::future(std::future::pending())
        } else {
            Staging::future(async { Ok(state(0, 2)) })
        };
        let future = executor.execute_save(coming.into(), to(4))?;
        assert!(rank == 0 || future.cancel());
        ended(Ok(future))
    });
    for cancelled in cancelled {
        assert_eq!(cancelled.unwrap_err().kind(), ErrorKind::Cancelled);
    }
    save(&job, 5, |_, options| options).into_iter().for_each(|saved| drop(saved.unwrap()));
    assert_holds(root.path(), 5, 2, str::to_owned);
}

/// Plans, metadata and results lie on the storage: what ranks send each other does not grow with them.
#[test]
fn messages_do_not_grow_with_the_number_of_tensors() {
    let root = tempfile::tempdir().unwrap();
    let job = Job::start(root.path(), 3);
    let many = |rank: usize, tensors: usize| {
        let mut state = StateDict::new();
        for number in 0..tensors {
            let source = HostTensor::new(vec![rank as u8; 2], [2]);
            state.tensor_box(format!("layer.{number}.weights"), [6], [2 * rank], source).unwrap();
        }
        state
    };
    let mut before = None;
    for (step, tensors) in [(1, 10), (2, 2000)] {
        for planner in [false, true] {
            job.groups.iter().for_each(|group| group.sent.lock().unwrap().clear());
            let saved = job.each(|rank, executor, _| {
                let options = if planner { to(step).planner(DefaultSavePlanner::new()) } else { to(step) };
                ended(executor.execute_save(many(rank, tensors).into(), options))
            });
            for metadata in saved {
                assert_eq!(metadata.unwrap().state_dict_metadata.len(), tensors);
            }
            for group in &job.groups {
                let sent = group.sent.lock().unwrap();
                // Agree, plan, receipt and outcome, gathered and told; with a planner two exchanges more.
                assert!(sent.len() <= 12, "{}", sent.len());
                assert!(sent.iter().all(|message| message.len() <= 512), "{:?}", sent.iter().map(Vec::len).max());
                assert!(!sent.iter().any(|m| m.windows(5).any(|part| part == b"layer")), "a plan was sent");
            }
            let bytes = job.groups[1].sent.lock().unwrap().iter().map(Vec::len).sum::<usize>();
            if planner {
                let few = *before.get_or_insert(bytes);
                assert!(bytes < few + 64, "{few} bytes with few tensors, {bytes} with many");
            }
        }
    }
    let checkpoint = Catalog::open(root.path()).unwrap().checkpoint(2).unwrap();
    assert_eq!(checkpoint.read("layer.1999.weights").unwrap(), [0, 0, 1, 1, 2, 2]);
}

/// Boxes without elements are no items: their index would be that of the box that begins there.
#[test]
fn empty_boxes_are_not_planned() {
    let mut state = StateDict::new();
    state.tensor_box("t", [3], [0], HostTensor::new(Vec::<u8>::new(), [0])).unwrap();
    state.tensor_box("t", [3], [1], HostTensor::new(vec![1_u8; 2], [2])).unwrap();
    state.tensor("nothing", HostTensor::new(Vec::<u8>::new(), [0])).unwrap();
    let plan = SavePlan::of(&state);
    let sizes: Vec<_> = plan
        .items
        .iter()
        .map(|item| match &item.kind {
            WriteKind::Tensor { chunk, .. } => (item.fqn.as_str(), chunk.offsets[0], chunk.sizes[0]),
            WriteKind::Value => unreachable!(),
        })
        .collect();
    assert_eq!(sizes, [("t", 1, 2), ("nothing", 0, 0)]);
    let kept = DefaultSavePlanner::new().resolve_data(&plan, state).unwrap();
    assert_eq!(kept.len(), 2);
}
