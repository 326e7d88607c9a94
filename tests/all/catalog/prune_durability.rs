use crate::fixtures::checkpoint::{MadeCheckpoint, Watched, noise, publish};
use ashore::storage::Storage;
use ashore::{Attempt, Catalog, Dtype, ErrorKind, PruneOptions, Retention};

fn steps(steps: impl IntoIterator<Item = u64>) -> (Watched, Catalog, Vec<Attempt>) {
    let storage = Watched::default();
    let mut attempts = Vec::new();
    for step in steps {
        let made = MadeCheckpoint::new(step).tensor("x", Dtype::U8, &[64], noise(64, step));
        made.publish(&storage.memory, &ashore::id::step_name(step));
        attempts.push(made.attempt);
    }
    (storage.clone(), Catalog::over(storage.storage), attempts)
}

fn left(storage: &Watched) -> Vec<u64> {
    let mut steps: Vec<_> =
        storage.memory.list().unwrap().iter().filter_map(|name| ashore::id::parse_step_name(name)).collect();
    steps.sort_unstable();
    steps
}

const LAST_TWO: Retention = Retention::last(2);

#[test]
fn the_last_ones_and_every_kth_survive() {
    let (storage, catalog, _) = steps([5, 10, 15, 20, 25, 30, 100]);
    let retention = Retention::last(2).every(10);
    let dry = catalog.prune(&retention, PruneOptions::new().dry_run(true)).unwrap();
    assert_eq!(left(&storage).len(), 7, "a dry run removes nothing");
    let pruned = catalog.prune(&retention, PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [10, 20, 30, 100]);
    assert_eq!(storage.seen.lock().unwrap().removed, ["step-00000005", "step-00000015", "step-00000025"]);
    let steps = |entries: &[ashore::catalog::Entry]| entries.iter().map(|entry| entry.step).collect::<Vec<_>>();
    assert_eq!((steps(&dry.removed), steps(&dry.kept)), (vec![5, 15, 25], vec![10, 20, 30, 100]));
    assert_eq!((steps(&pruned.removed), steps(&pruned.kept)), (steps(&dry.removed), steps(&dry.kept)));
}

#[test]
fn survivors_are_made_durable_before_anything_is_removed_and_only_once() {
    let (storage, catalog, attempts) = steps([1, 2, 3]);
    catalog.acknowledge(attempts[2]);
    catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    let seen = |storage: &Watched| storage.seen.lock().unwrap().confirmed.clone();
    assert_eq!(seen(&storage), ["step-00000002"], "the one that this process did not publish");
    assert_eq!(left(&storage), [2, 3]);
    catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(seen(&storage).len(), 1);
}

#[test]
fn a_step_that_cannot_be_made_durable_replaces_none() {
    let (storage, catalog, _) = steps([1, 2, 3, 4]);
    storage.seen.lock().unwrap().broken.insert("step-00000004".into());
    let pruned = catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [2, 3, 4]);
    assert_eq!(pruned.doubtful.iter().map(|problem| problem.step).collect::<Vec<_>>(), [4]);
    storage.seen.lock().unwrap().broken.extend(["step-00000002".into(), "step-00000003".into()]);
    let fresh = Catalog::over(storage.storage.clone());
    fresh.prune(&Retention::last(1), PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [2, 3, 4], "none of them counts");
}

/// Two prunes ran at once: one reported a step as doubtful, and as kept, that the other had just deleted.
#[test]
fn a_step_that_another_prune_deletes_meanwhile_is_neither_doubtful_nor_kept() {
    let (storage, catalog, _) = steps([1, 2, 3, 4]);
    storage.seen.lock().unwrap().vanishing = Some("step-00000003".into());
    let pruned = catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(pruned.doubtful.len(), 0, "{:?}", pruned.doubtful);
    assert_eq!(pruned.kept.iter().map(|entry| entry.step).collect::<Vec<_>>(), [2, 4]);
    assert_eq!(left(&storage), [2, 4]);
}

#[test]
fn an_indeterminate_step_never_counts() {
    let (storage, catalog, attempts) = steps([1, 2, 3]);
    catalog.acknowledge(attempts[2]);
    catalog.doubt(attempts[2]);
    let pruned = catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [1, 2, 3]);
    assert_eq!(pruned.doubtful[0].error.kind(), ErrorKind::Indeterminate);
    assert_eq!(pruned.removed.len(), 0);
}

#[test]
fn a_run_that_went_back_keeps_what_it_saves() {
    let (storage, catalog, attempts) = steps([100, 110, 120, 900, 1000]);
    for fresh in &attempts[..3] {
        catalog.acknowledge(*fresh);
        catalog.acknowledge(*fresh);
    }
    catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [110, 120, 900, 1000], "higher steps of the run before replace none of this one's");
    Catalog::over(storage.storage.clone()).prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [900, 1000]);
}

#[test]
fn foreign_and_broken_directories_stay() {
    let (storage, catalog, _) = steps([10, 20, 30]);
    publish(&storage.memory, "1", &[("weights.bin".into(), vec![0])]);
    publish(&storage.memory, "step-00000002", &[("manifest.json".into(), vec![0])]);
    let mut broken = MadeCheckpoint::new(3).tensor("x", Dtype::U8, &[64], noise(64, 1)).files();
    broken[0].1.pop();
    publish(&storage.memory, "step-00000003", &broken);
    publish(&storage.memory, "step-00000040", &broken);
    catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [1, 2, 3, 20, 30, 40], "and the broken newer one does not count");
}

#[test]
fn every_name_of_a_step_goes_with_it() {
    let (storage, catalog, _) = steps([1, 2, 3]);
    MadeCheckpoint::new(1).publish(&storage.memory, "ckpt-1");
    MadeCheckpoint::new(3).publish(&storage.memory, "ckpt-3");
    catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [2, 3, 3]);
}

#[test]
fn a_step_that_cannot_be_removed_is_reported_and_the_others_are_removed() {
    let (storage, catalog, _) = steps([1, 2, 3, 4]);
    storage.seen.lock().unwrap().broken.insert("step-00000001".into());
    let pruned = catalog.prune(&LAST_TWO, PruneOptions::new()).unwrap();
    let steps = |entries: &[ashore::catalog::Entry]| entries.iter().map(|entry| entry.step).collect::<Vec<_>>();
    assert_eq!((steps(&pruned.removed), steps(&pruned.kept)), (vec![2], vec![1, 3, 4]), "what was deleted is said");
    assert_eq!(pruned.failed.iter().map(|problem| problem.step).collect::<Vec<_>>(), [1]);
    let failed = pruned.complete().unwrap_err();
    assert_eq!((failed.kind(), failed.step()), (ErrorKind::Unavailable, Some(1)));
    assert_eq!(left(&storage), [1, 3, 4]);
}

#[test]
fn a_retention_of_nothing_is_refused_before_anything_is_read() {
    let (storage, catalog, _) = steps([1, 2]);
    for (keep_last, keep_every) in [(Some(0), None), (Some(1), Some(0)), (None, Some(0))] {
        let mut retention = Retention::default();
        (retention.keep_last, retention.keep_every) = (keep_last, keep_every);
        assert_eq!(catalog.prune(&retention, PruneOptions::new()).unwrap_err().kind(), ErrorKind::Invalid);
    }
    assert!(storage.seen.lock().unwrap().reads.is_empty());
    catalog.prune(&Retention::default(), PruneOptions::new()).unwrap();
    assert_eq!(left(&storage), [1, 2]);
}
