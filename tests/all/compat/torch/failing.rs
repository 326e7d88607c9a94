//! Failures of planners, writers and storage are always in the future, never silent, and retried on request.

use crate::compat::{Gate, engine, files, publishing_after, refusing_attempts, state};
use crate::fixtures::executor::{LONG, one};
use ashore::compat::torch::{
    AsyncCheckpointExecutor, DefaultSavePlanner, ExecuteOptions, Metadata, SavePlan, SavePlanner, StorageMeta,
    ThreadExecutor, WriteItem,
};
use ashore::{Dtype, Error, ErrorKind, Layout, OnUnseenError, Result, StateDict};
use std::sync::Arc;
use std::time::Duration;

fn to(id: &str) -> ExecuteOptions {
    ExecuteOptions::new().checkpoint_id(id)
}

/// Fails in one of its steps, or leaves something out.
struct Odd {
    planner: DefaultSavePlanner,
    fails_in: usize,
    leaves_out: Option<&'static str>,
}

impl Odd {
    fn new(fails_in: usize, leaves_out: Option<&'static str>) -> Self {
        Self { planner: DefaultSavePlanner::new(), fails_in, leaves_out }
    }

    fn step(&self, number: usize) -> Result<()> {
        match self.fails_in {
            9 if number == 2 => panic!("on purpose"),
            n if n == number => Err(Error::new(ErrorKind::Unavailable, format!("step={number}"))),
            _ => Ok(()),
        }
    }
}

impl SavePlanner for Odd {
    fn set_up_planner(&mut self, state: &StateDict<'_>, meta: Option<&StorageMeta>, first: bool) -> Result<()> {
        self.step(0)?;
        assert!(first && meta.unwrap().checkpoint_id.ends_with("step-1"));
        self.planner.set_up_planner(state, meta, first)
    }

    fn create_local_plan(&mut self) -> Result<SavePlan> {
        self.step(1)?;
        self.planner.create_local_plan()
    }

    fn create_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<(Vec<SavePlan>, Metadata)> {
        self.step(2)?;
        self.planner.create_global_plan(plans)
    }

    fn finish_plan(&mut self, plan: SavePlan) -> Result<SavePlan> {
        self.step(3)?;
        let kept = plan.items.iter().filter(|item| Some(item.fqn.as_str()) != self.leaves_out);
        Ok(SavePlan::new(kept.cloned().collect()))
    }
}

#[test]
fn a_failure_of_any_step_of_a_planner_is_in_the_future_and_changes_nothing() {
    let root = tempfile::tempdir().unwrap();
    let executor = ThreadExecutor::new(Arc::new(engine(root.path()).build().unwrap())).unwrap();
    for (step, kind) in [(0, ErrorKind::Unavailable), (1, ErrorKind::Unavailable), (2, ErrorKind::Unavailable)]
        .into_iter()
        .chain([(3, ErrorKind::Unavailable), (9, ErrorKind::Internal)])
    {
        let future = executor.execute_save(state(1).into(), to("step-1").planner(Odd::new(step, None))).unwrap();
        assert_eq!(future.result(LONG).unwrap_err().kind(), kind);
        assert!(files(root.path()).is_empty());
    }
    // The next call returns an unseen failure.
    drop(executor.execute_save(state(1).into(), to("step-1").planner(Odd::new(1, None))).unwrap());
    assert_eq!(executor.execute_save(state(1).into(), to("step-1")).unwrap_err().kind(), ErrorKind::Unavailable);
    executor.execute_save(state(1).into(), to("step-1")).unwrap().result(LONG).unwrap().unwrap();
}

#[test]
fn a_planner_decides_what_is_saved() {
    let root = tempfile::tempdir().unwrap();
    let executor = ThreadExecutor::new(Arc::new(engine(root.path()).build().unwrap())).unwrap();
    let planner = Odd::new(99, Some("model.weights"));
    executor.execute_save(state(1).into(), to("step-1").planner(planner)).unwrap().result(LONG).unwrap().unwrap();
    let saved = executor.executor().checkpoint(1).unwrap();
    assert_eq!(saved.tensors().unwrap().map(|t| t.name).collect::<Vec<_>>(), ["model.bias"]);
    assert_eq!((saved.value::<u64>("epoch").unwrap(), saved.metadata::<String>("run").unwrap()), (1, "a test".into()));
}

/// A planner that gives a tensor another name or type, and converts it, or does not.
struct Converts {
    planner: DefaultSavePlanner,
    renames: bool,
    resolves: bool,
}

impl SavePlanner for Converts {
    fn set_up_planner(&mut self, state: &StateDict<'_>, meta: Option<&StorageMeta>, first: bool) -> Result<()> {
        self.planner.set_up_planner(state, meta, first)
    }
    fn create_local_plan(&mut self) -> Result<SavePlan> {
        let mut plan = self.planner.create_local_plan()?;
        let mut items = plan.items.to_vec();
        for item in items.iter_mut().filter(|item| item.fqn == "model.bias") {
            *item = match self.renames {
                true => WriteItem::tensor("bias", &Layout::new(Dtype::F32, [7])),
                false => WriteItem::tensor("model.bias", &Layout::new(Dtype::I64, [7])),
            };
        }
        plan.items = Arc::new(items);
        Ok(plan)
    }
    fn create_global_plan(&mut self, plans: Vec<SavePlan>) -> Result<(Vec<SavePlan>, Metadata)> {
        self.planner.create_global_plan(plans)
    }
    fn finish_plan(&mut self, plan: SavePlan) -> Result<SavePlan> {
        Ok(plan)
    }
    fn resolve_data(&mut self, _: &SavePlan, state: StateDict<'static>) -> Result<StateDict<'static>> {
        if !self.resolves {
            return Ok(state);
        }
        if self.renames {
            return state.renamed(|name| Some(if name == "model.bias" { "bias" } else { name }.to_owned()));
        }
        let mut converted = state.renamed(|name| (name != "model.bias").then(|| name.to_owned()))?;
        converted.tensor("model.bias", Arc::new(vec![5_i64; 7]))?;
        Ok(converted)
    }
}

/// The executor compared only the counts of a plan and a state: when a planner renamed or converted an item,
/// it saved the original bytes with the plan's metadata.
#[test]
fn a_save_writes_what_its_plan_says_or_fails() {
    let root = tempfile::tempdir().unwrap();
    for retries in [0, 1] {
        let executor = ThreadExecutor::new(Arc::new(engine(root.path()).build().unwrap())).unwrap().retry(retries);
        for renames in [true, false] {
            let planner = |resolves| Converts { planner: DefaultSavePlanner::new(), renames, resolves };
            let refused = executor.execute_save(state(1).into(), to("step-1").planner(planner(false))).unwrap();
            let error = refused.result(LONG).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid);
            assert!(error.to_string().contains("bias"), "{error}");
            let saved = executor.execute_save(state(1).into(), to("step-1").planner(planner(true))).unwrap();
            let metadata = saved.result(LONG).unwrap().unwrap();
            let checkpoint = executor.executor().checkpoint(1).unwrap();
            let names: Vec<_> = checkpoint.tensors().unwrap().map(|t| t.name).chain(checkpoint.value_names()).collect();
            let mut told: Vec<_> = metadata.state_dict_metadata.keys().map(String::as_str).collect();
            told.sort_unstable_by_key(|name| names.iter().position(|there| there == name));
            assert_eq!(told, names);
            match renames {
                true => assert_eq!(checkpoint.read_as::<f32>("bias").unwrap(), [1.0; 7]),
                false => assert_eq!(checkpoint.read_as::<i64>("model.bias").unwrap(), [5; 7]),
            }
        }
    }
}

#[test]
fn the_default_planner_keeps_its_plans_while_the_structure_stays() {
    let mut planner = DefaultSavePlanner::new();
    let mut plan = |state: StateDict<'static>| {
        planner.set_up_planner(&state, None, true).unwrap();
        let local = planner.create_local_plan().unwrap();
        planner.create_global_plan(vec![local]).unwrap();
        planner.reused()
    };
    assert_eq!((plan(state(1)), plan(state(2)), plan(state(3))), (0, 1, 2));
    assert_eq!(plan(one("other", vec![1_u8])), 2);
    let mut more = state(1);
    more.value("more", &1).unwrap();
    assert_eq!((plan(state(1)), plan(more)), (2, 2));
    let unready = DefaultSavePlanner::new().create_local_plan().unwrap_err();
    assert_eq!(unready.kind(), ErrorKind::Invalid);
}

fn flaky(refusals: usize, failed: OnUnseenError) -> ThreadExecutor {
    let engine = engine("in memory".as_ref())
        .storage(Arc::new(refusing_attempts(refusals)))
        .on_unseen_error(failed)
        .build()
        .unwrap();
    ThreadExecutor::new(Arc::new(engine)).unwrap()
}

#[test]
fn a_failure_that_may_pass_is_tried_again_as_often_as_was_asked_for() {
    let executor = flaky(2, OnUnseenError::NextCall).retry(2);
    executor.execute_save(state(1).into(), to("step-1")).unwrap().result(LONG).unwrap().unwrap();
    assert_eq!(
        executor.executor().checkpoint(1).unwrap().read("model.weights").unwrap(),
        crate::fixtures::executor::pattern(1, 20_000)
    );
    executor.close(LONG).unwrap();

    let executor = flaky(3, OnUnseenError::NextCall).retry(2);
    let future = executor.execute_save(state(1).into(), to("step-1")).unwrap();
    assert_eq!(future.result(LONG).unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn an_unseen_failure_stops_the_next_call_or_is_logged() {
    for (failed, stops) in [(OnUnseenError::NextCall, true), (OnUnseenError::Warn, false)] {
        let executor = flaky(1, failed);
        drop(executor.execute_save(state(1).into(), to("step-1")).unwrap());
        crate::fixtures::executor::eventually("it has failed", || executor.executor().arena().free() == 4);
        // The engine ends the save a moment after its slabs are returned; its step is free again then.
        let second = loop {
            match executor.execute_save(state(2).into(), to("step-1")) {
                Err(error) if error.kind() == ErrorKind::Conflict => std::thread::yield_now(),
                other => break other,
            }
        };
        assert_eq!(second.is_err(), stops, "{failed:?}");
        if let Ok(second) = second {
            second.result(LONG).unwrap().unwrap();
        }
    }
}

/// `close` reported success for a save that was still being published at its deadline.
#[test]
fn a_save_that_is_being_published_when_the_executor_closes_is_indeterminate() {
    for retries in [0, 1] {
        let gate = Arc::new(Gate::default());
        let engine = engine("in memory".as_ref()).storage(Arc::new(publishing_after(&gate))).build().unwrap();
        let engine = Arc::new(engine);
        let executor = ThreadExecutor::new(engine.clone()).unwrap().retry(retries);
        let future = executor.execute_save(state(1).into(), to("step-1")).unwrap();
        gate.reached();
        let error = executor.close(Duration::from_millis(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error}");
        gate.open();
        future.result(LONG).unwrap().unwrap();
        assert_eq!(engine.checkpoint(1).unwrap().value::<u64>("epoch").unwrap(), 1);
    }
}
