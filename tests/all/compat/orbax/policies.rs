//! Save decision and preservation policies, each by itself and through the manager.

use crate::compat::engine;
use crate::fixtures::executor::{LONG, eventually, one};
use ashore::compat::orbax::{
    AnyPreservationPolicy, AnySavePolicy, BestN, CheckpointInfo, CheckpointManager, CheckpointManagerOptions,
    ContinuousCheckpointingPolicy, CustomSteps, DecisionContext, EveryNSeconds, EveryNSteps, EveryNStepsClosest,
    FixedIntervalPolicy, InitialSavePolicy, LatestDuration, LatestN, PreemptionCheckpointingPolicy, PreservationPolicy,
    PreserveAll, SaveDecisionPolicy, SpecificStepsPolicy,
};
use ashore::testing::LateDevice;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

type Options = CheckpointManagerOptions;

fn decide(policy: impl SaveDecisionPolicy + 'static) -> Options {
    Options::new().save_decision_policy(policy)
}

/// The steps of 0 to 12 that are saved.
fn saved(options: Options) -> Vec<u64> {
    let root = tempfile::tempdir().unwrap();
    let manager = CheckpointManager::new(Arc::new(engine(root.path()).build().unwrap()), options).unwrap();
    let saved = (0..=12).filter(|&step| manager.save(step, one("t", vec![1_u8])).unwrap()).collect();
    manager.wait_until_finished(LONG).unwrap();
    assert_eq!(manager.all_steps().unwrap(), saved);
    saved
}

#[test]
fn steps_are_saved_as_the_policy_says() {
    assert_eq!(saved(Options::new()), (0..=12).collect::<Vec<_>>());
    assert_eq!(saved(decide(FixedIntervalPolicy(5))), [0, 5, 10]);
    assert!(saved(decide(FixedIntervalPolicy(0))).is_empty());
    assert_eq!(saved(decide(SpecificStepsPolicy([3, 7, 99].into()))), [3, 7]);
    assert_eq!(saved(decide(InitialSavePolicy)), [0]);
    assert!(saved(decide(PreemptionCheckpointingPolicy)).is_empty());
    assert_eq!(saved(decide(|step: u64, _: &DecisionContext| step == 11)), [11]);
    let any = AnySavePolicy(vec![Box::new(InitialSavePolicy), Box::new(SpecificStepsPolicy([9].into()))]);
    assert_eq!(saved(decide(any)), [0, 9]);
    let rarely = ContinuousCheckpointingPolicy { minimum_interval: LONG };
    assert_eq!(saved(decide(rarely)), [0]);
}

#[test]
fn continuous_saving_never_overlaps_and_a_preemption_is_saved() {
    let (root, device) = (tempfile::tempdir().unwrap(), LateDevice::default());
    let engine = engine(root.path()).made_device(Arc::new(device.clone())).build().unwrap();
    let policy = AnySavePolicy(vec![
        Box::new(ContinuousCheckpointingPolicy { minimum_interval: Duration::ZERO }),
        Box::new(PreemptionCheckpointingPolicy),
    ]);
    let manager = CheckpointManager::new(Arc::new(engine), decide(policy)).unwrap();
    device.hold();
    assert!(manager.save(1, one("t", vec![1_u8])).unwrap());
    assert!(manager.is_saving_in_progress() && !manager.should_save(2));
    manager.preempt();
    assert!(manager.reached_preemption() && manager.should_save(2));
    device.release();
    manager.wait_until_finished(LONG).unwrap();
    assert!(!manager.is_saving_in_progress());
}

/// The steps of 1 to 6 that are left; the metric of step n is (n - 3)^2, and step 6 has none.
fn kept(policy: impl PreservationPolicy + 'static) -> Vec<u64> {
    let root = tempfile::tempdir().unwrap();
    let options = Options::new().preservation_policy(policy);
    let manager = CheckpointManager::new(Arc::new(engine(root.path()).build().unwrap()), options).unwrap();
    for step in 1..=6_i32 {
        let metrics = (step != 6).then(|| json!({ "loss": (step - 3).pow(2) }));
        manager.save_with(step as u64, one("t", vec![1_u8]), metrics.as_ref(), false).unwrap();
        manager.wait_until_finished(LONG).unwrap();
    }
    let kept = manager.all_steps().unwrap();
    manager.reload().unwrap();
    assert_eq!(manager.all_steps().unwrap(), kept, "as it is on the medium");
    kept
}

fn loss(metrics: &serde_json::Value) -> Option<f64> {
    metrics["loss"].as_f64()
}

#[test]
fn steps_are_kept_as_the_policy_says_and_the_newest_always() {
    assert_eq!(kept(PreserveAll), [1, 2, 3, 4, 5, 6]);
    assert_eq!(kept(LatestN(2)), [5, 6]);
    assert_eq!(kept(LatestN(0)), [6], "the newest durable step always stays");
    assert_eq!(kept(EveryNSteps(3)), [3, 6]);
    assert_eq!(kept(CustomSteps([2, 4].into())), [2, 4, 6]);
    assert_eq!(kept(EveryNSeconds(3600)), [1, 6]);
    assert_eq!(kept(EveryNSeconds(0)), [1, 2, 3, 4, 5, 6]);
    assert_eq!(kept(EveryNStepsClosest(4)), [1, 4, 6], "the closest to 0, to 4, and the newest");
    assert_eq!(kept(LatestDuration(LONG)), [1, 2, 3, 4, 5, 6]);
    assert_eq!(kept(LatestDuration(Duration::ZERO)), [6]);
    assert_eq!(kept(|all: &[CheckpointInfo]| all.iter().map(|c| c.step == 2).collect::<Vec<_>>()), [2, 6]);
    assert_eq!(kept(|_: &[CheckpointInfo]| -> Vec<bool> { panic!("on purpose") }), [1, 2, 3, 4, 5, 6]);
    assert_eq!(kept(BestN::new(Some(2), loss)), [1, 5, 6], "most of the metric, and what has none");
    assert_eq!(kept(BestN::new(Some(2), loss).reverse(true)), [3, 4, 6], "least, of equals the newest");
    let strict = BestN::new(Some(1), loss).reverse(true).keep_checkpoints_without_metrics(false);
    assert_eq!(kept(AnyPreservationPolicy(vec![Box::new(strict), Box::new(LatestN(1))])), [3, 6]);
}

/// The manager kept listing a step that its policy had deleted before the manager came to follow that step's
/// save.
#[test]
fn a_step_that_is_deleted_before_its_turn_is_not_listed_afterwards() {
    let root = tempfile::tempdir().unwrap();
    let steps = root.path().to_owned();
    // At the turn of step 1 all four become durable, so that at the turn of step 2 the policy drops 3 as
    // well.
    let policy = move |seen: &[CheckpointInfo]| {
        if seen.iter().all(|checkpoint| checkpoint.step == 1) {
            eventually("four steps", || (1..=4).all(|step: u64| steps.join(step.to_string()).exists()));
        }
        seen.iter().map(|checkpoint| checkpoint.step == 1 || checkpoint.step == 4).collect::<Vec<_>>()
    };
    let engine = engine(root.path()).overlap(ashore::Overlap::Queue(8)).build().unwrap();
    let manager = CheckpointManager::new(Arc::new(engine), Options::new().preservation_policy(policy)).unwrap();
    for step in 1..=4 {
        assert!(manager.save(step, one("t", Arc::new(vec![step; 10]))).unwrap());
    }
    manager.wait_until_finished(LONG).unwrap();
    assert_eq!(manager.all_steps().unwrap(), [1, 4]);
}

/// With `keep_checkpoints_without_metrics(false)` and fewer steps than to keep, the policy deleted every step
/// without a metric. Orbax deletes nothing before there are more than `n`.
#[test]
fn the_best_so_many_are_kept_as_orbax_keeps_them() {
    let strict = |n| BestN::new(Some(n), loss).keep_checkpoints_without_metrics(false);
    assert_eq!(kept(strict(6)), [1, 2, 3, 4, 5, 6], "no more than are to be kept");
    assert_eq!(kept(strict(5)), [1, 2, 3, 4, 5, 6], "the newest always stays");
    assert_eq!(kept(strict(2)), [1, 5, 6]);
    assert_eq!(kept(BestN::new(Some(0), loss)), [6], "none is kept, whether it has a metric or not");
    assert_eq!(kept(BestN::new(Some(6), loss)), [1, 2, 3, 4, 5, 6]);
    // Most steps have no metric: the policy deletes nothing before there are five.
    let root = tempfile::tempdir().unwrap();
    let options = Options::new().preservation_policy(strict(4));
    let manager = CheckpointManager::new(Arc::new(engine(root.path()).build().unwrap()), options).unwrap();
    for (step, left) in [(1, &[1][..]), (2, &[1, 2]), (3, &[1, 2, 3]), (4, &[1, 2, 3, 4]), (5, &[2, 5])] {
        let metrics = (step == 2).then(|| json!({ "loss": 1 }));
        manager.save_with(step, one("t", vec![1_u8]), metrics.as_ref(), false).unwrap();
        manager.wait_until_finished(LONG).unwrap();
        assert_eq!(manager.all_steps().unwrap(), left);
    }
}

/// The policy took times from the file system, where a copy or a touch of the directory changes them.
#[test]
fn the_time_of_a_step_is_the_one_in_its_manifest() {
    let root = tempfile::tempdir().unwrap();
    let options = Options::new().preservation_policy(EveryNSeconds(3600));
    let manager = CheckpointManager::new(Arc::new(engine(root.path()).build().unwrap()), options).unwrap();
    for step in 1..=3 {
        manager.save(step, one("t", vec![1_u8])).unwrap();
        manager.wait_until_finished(LONG).unwrap();
        let directory = std::fs::File::open(root.path().join(step.to_string())).unwrap();
        directory
            .set_modified(std::time::SystemTime::UNIX_EPOCH + step as u32 * 2 * Duration::from_secs(3600))
            .unwrap();
    }
    assert_eq!(manager.all_steps().unwrap(), [1, 3]);
}
