//! Coming from Orbax: a `CheckpointManager` with policies, composite items, metrics, and a handler that does
//! not know its path yet.

use ashore::compat::orbax::{
    AnyPreservationPolicy, BestN, CheckpointManager, CheckpointManagerOptions, CompositeArgs, DeferredPath,
    DeferredPathAsyncCheckpointHandler, FixedIntervalPolicy, HandlerAwaitableSignal, Item, LatestN, SaveArgs, SavePath,
    Signals, StandardCheckpointHandler,
};
use ashore::{CheckpointExecutor, StateDict};
use std::{sync::Arc, time::Duration};

const MINUTE: Duration = Duration::from_secs(60);

fn loss(metrics: &serde_json::Value) -> Option<f64> {
    metrics["loss"].as_f64()
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let directory = tempfile::tempdir()?; // dropped last, after the engine has ended
    let root = directory.path();
    let engine = Arc::new(CheckpointExecutor::builder(root).arena(16 << 20).chunk(1 << 20).build()?);
    let best = || BestN::new(Some(1), loss).reverse(true);
    let options = CheckpointManagerOptions::new()
        .save_decision_policy(FixedIntervalPolicy(10))
        .preservation_policy(AnyPreservationPolicy(vec![Box::new(LatestN(1)), Box::new(best())]))
        .best(best());
    let manager = CheckpointManager::new(engine.clone(), options)?;
    for step in (0..=40).filter(|step| manager.should_save(*step)) {
        let (mut model, mut loader) = (StateDict::new(), StateDict::new());
        model.tensor("weights", Arc::new(vec![step as f32; 1000]))?;
        loader.value("position", &step)?;
        let items = CompositeArgs::new().item("model", model)?.item("dataloader", loader)?;
        let metrics = serde_json::json!({ "loss": (step as f64 - 20.0).abs() });
        assert!(manager.save_with(step, items.into_state(), Some(&metrics), false)?);
    }
    manager.wait_until_finished(MINUTE)?;
    assert_eq!(
        (manager.all_steps()?, manager.best_step()?, manager.latest_step()?),
        (vec![20, 40], Some(20), Some(40))
    );
    let newest = manager.restore(None)?;
    assert_eq!(Item::of(&newest, "model")?.read_as::<f32>("weights")?[0], 40.0);
    assert_eq!(Item::of(&newest, "dataloader")?.value::<u64>("position")?, 40);

    // A handler may begin a save before the path of the step is known.
    let (handler, deferred, signals) = (StandardCheckpointHandler::new(engine), DeferredPath::new(), Signals::new());
    let id = signals.next_operation_id(&[HandlerAwaitableSignal::StepDirectoryCreation]);
    let mut state = StateDict::new();
    state.tensor("weights", Arc::new(vec![1.0_f32; 1000]))?;
    let path = SavePath::Deferred(deferred.awaiting().join("50")?);
    let futures = handler.async_save_deferred(path, state, SaveArgs::default().operation(&signals, id))?;
    deferred.set_path(root);
    signals.send(id, HandlerAwaitableSignal::StepDirectoryCreation);
    futures[0].result(MINUTE)?;
    manager.reload()?;
    assert_eq!(manager.latest_step()?, Some(50));
    manager.close(MINUTE)?;
    Ok(())
}
