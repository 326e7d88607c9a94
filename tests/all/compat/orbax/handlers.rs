//! Handlers and their commit futures; composites as one step.

use crate::compat::{engine, files, state};
use crate::fixtures::executor::{LONG, pattern};
use ashore::compat::orbax::{
    AsyncCheckpointHandler, CompositeArgs, CompositeCheckpointHandler, Item, SaveArgs, StandardCheckpointHandler,
};
use ashore::testing::{LateDevice, block_on};
use ashore::{Attempt, Checkpoint, ErrorKind, Outcome, SaveOptions, StateDict};
use std::sync::Arc;
use std::time::Duration;

fn values(name: &str, value: u64) -> StateDict<'static> {
    let mut state = StateDict::new();
    state.value(name, &value).unwrap();
    state
}

#[test]
fn a_handler_returns_futures_of_the_commit() {
    let root = tempfile::tempdir().unwrap();
    let device = LateDevice::default();
    let engine = engine(root.path()).made_device(Arc::new(device.clone())).build().unwrap();
    let handler: Box<dyn AsyncCheckpointHandler<Item = StateDict<'static>>> =
        Box::new(StandardCheckpointHandler::new(Arc::new(engine)));
    device.hold();
    let futures = handler.async_save(&root.path().join("100"), state(1), SaveArgs::default()).unwrap();
    let [future] = &futures[..] else { panic!() };
    assert_eq!(future.result(Duration::from_millis(5)).unwrap_err().kind(), ErrorKind::Deadline);
    device.release();
    assert!(matches!(block_on(future.clone()).unwrap(), Outcome::Durable(_)));
    assert!(matches!(future.result(LONG).unwrap(), Outcome::Durable(_)) && !future.cancel());
    assert_eq!(Checkpoint::open(root.path().join("100")).unwrap().read("model.weights").unwrap(), pattern(1, 20_000));

    let again = |args| handler.async_save(&root.path().join("100"), state(2), args).unwrap()[0].result(LONG);
    assert_eq!(again(SaveArgs::default()).unwrap_err().kind(), ErrorKind::Conflict);
    again(SaveArgs::default().force(true)).unwrap();
    assert_eq!(Checkpoint::open(root.path().join("100")).unwrap().value::<u64>("epoch").unwrap(), 2);

    device.hold();
    let cancelled = &handler.async_save(&root.path().join("200"), state(3), SaveArgs::default()).unwrap()[0];
    assert!(cancelled.cancel());
    assert_eq!(cancelled.result(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    device.release();
    let refused = handler.async_save("/".as_ref(), state(1), SaveArgs::default());
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
}

/// Orbax makes a temporary directory for each item of a step, hands those to the handlers, and renames them.
#[test]
fn a_handler_saves_into_the_directory_that_orbax_has_made() {
    let (root, step) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let handler = StandardCheckpointHandler::new(Arc::new(engine(root.path()).build().unwrap()));
    let item = |name: &str| step.path().join("7.orbax-checkpoint-tmp").join(name);
    let items = [item("model.orbax-checkpoint-tmp"), item("optimizer.orbax-checkpoint-tmp")];
    let saves = items.each_ref().map(|item| {
        std::fs::create_dir_all(item).unwrap();
        handler.async_save(item, state(7), SaveArgs::default()).unwrap()
    });
    saves.iter().for_each(|futures| drop(futures[0].result(LONG).unwrap()));
    std::fs::rename(items[0].parent().unwrap(), step.path().join("7")).unwrap();
    for name in ["model.orbax-checkpoint-tmp", "optimizer.orbax-checkpoint-tmp"] {
        let item = Checkpoint::open(step.path().join("7").join(name)).unwrap();
        assert_eq!(item.read("model.weights").unwrap(), pattern(7, 20_000));
    }
    assert_eq!(std::fs::read_dir(step.path().join("7")).unwrap().count(), 2, "nothing else is left beside the items");
}

#[test]
fn items_of_a_composite_are_one_commit_and_found_again_by_name() {
    let root = tempfile::tempdir().unwrap();
    let handler = CompositeCheckpointHandler::new(Arc::new(engine(root.path()).build().unwrap()));
    let args = CompositeArgs::new()
        .item("model", state(1))
        .unwrap()
        .item("optimizer", state(2))
        .unwrap()
        .item("dataloader", values("position", 17))
        .unwrap();
    let futures = handler.async_save(&root.path().join("step_5"), args, SaveArgs::default()).unwrap();
    assert_eq!(futures.len(), 3);
    let attempts: Vec<_> =
        futures.into_iter().map(|future| future.result(LONG).unwrap().committed().unwrap().attempt).collect();
    assert!(attempts.iter().all(|attempt| *attempt == attempts[0]));
    let checkpoint = Checkpoint::open(root.path().join("step_5")).unwrap();
    let (model, optimizer) = (Item::of(&checkpoint, "model").unwrap(), Item::of(&checkpoint, "optimizer").unwrap());
    assert_eq!(model.read("model.weights").unwrap(), pattern(1, 20_000));
    assert_eq!(optimizer.read_as::<f32>("model.bias").unwrap(), [2.0; 7]);
    assert_eq!((model.value::<u64>("epoch").unwrap(), optimizer.value::<u64>("epoch").unwrap()), (1, 2));
    assert_eq!(model.tensors().unwrap().count(), 2);
    assert_eq!(Item::of(&checkpoint, "dataloader").unwrap().value::<u64>("position").unwrap(), 17);
    assert_eq!(Item::of(&checkpoint, "mod").unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn items_that_could_not_be_found_again_are_refused() {
    let full = || CompositeArgs::new().item("model", values("a", 1)).unwrap();
    for (name, item) in
        [("model", values("b", 1)), ("", values("b", 1)), ("a.b", values("b", 1)), ("empty", StateDict::new())]
    {
        assert_eq!(full().item(name, item).unwrap_err().kind(), ErrorKind::Invalid, "{name}");
    }
}

#[test]
fn a_save_through_a_handler_leaves_the_bytes_that_the_engine_leaves() {
    let attempt = Attempt::new();
    let (ours, theirs) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let plain = engine(ours.path()).build().unwrap();
    plain.save_with(5, state(1), SaveOptions::default().attempt(attempt).name("5")).unwrap().wait(LONG).unwrap();
    let handler = StandardCheckpointHandler::new(Arc::new(engine(theirs.path()).build().unwrap()));
    let futures = handler.async_save("5".as_ref(), state(1), SaveArgs::default().attempt(attempt)).unwrap();
    futures[0].result(LONG).unwrap();
    assert_eq!(files(ours.path()), files(theirs.path()));
}
