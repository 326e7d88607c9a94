use crate::fixtures::checkpoint::{MadeCheckpoint, noise};
use ashore::catalog::{Entry, Mark};
use ashore::id::step_name;
use ashore::storage::{Memory, Storage};
use ashore::{Catalog, Dtype, ErrorKind, PruneOptions, Retention};
use std::sync::Arc;

/// A storage with these steps, which other processes have made.
fn steps<const N: usize>(steps: [u64; N]) -> (Memory, Catalog) {
    let storage = Memory::new();
    for step in steps {
        let made = MadeCheckpoint::new(step).tensor("x", Dtype::U8, &[64], noise(64, step));
        made.publish(&storage, &step_name(step));
    }
    let catalog = Catalog::over(Arc::new(storage.clone()));
    (storage, catalog)
}

fn numbers(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.step).collect()
}

fn newest(catalog: &Catalog) -> u64 {
    catalog.latest().unwrap().unwrap().step()
}

#[test]
fn a_step_marked_bad_is_not_the_newest_and_no_retention_counts_it() {
    let (_, catalog) = steps([10, 20, 30]);
    catalog.mark(30, Some(Mark::Bad)).unwrap();
    assert_eq!(newest(&catalog), 20);
    let valid = catalog.latest_valid().unwrap().unwrap();
    assert_eq!((valid.checkpoint.step(), valid.skipped[0].step, valid.skipped.len()), (20, 30, 1));
    let pruned = catalog.prune(&Retention::last(1), PruneOptions::new()).unwrap();
    assert_eq!((numbers(&pruned.removed), numbers(&pruned.kept)), (vec![10], vec![20, 30]));
    assert_eq!(pruned.doubtful[0].step, 30);
    catalog.mark(30, None).unwrap();
    assert_eq!((newest(&catalog), catalog.marks().unwrap()), (30, vec![]));
}

#[test]
fn a_step_marked_keep_is_deleted_neither_by_a_retention_nor_by_its_number() {
    let (_, catalog) = steps([10, 20, 30]);
    catalog.mark(10, Some(Mark::Keep)).unwrap();
    let pruned = catalog.prune(&Retention::last(1), PruneOptions::new()).unwrap();
    assert_eq!((numbers(&pruned.removed), numbers(&pruned.kept)), (vec![20], vec![10, 30]));
    let refused = catalog.delete(10, PruneOptions::new()).unwrap_err();
    assert_eq!((refused.kind(), refused.step()), (ErrorKind::Invalid, Some(10)));
    // The mark of one step protects no other.
    assert_eq!(numbers(&catalog.delete(30, PruneOptions::new()).unwrap().removed), [30]);
    assert_eq!(newest(&catalog), 10);
}

#[test]
fn marks_add_up_replace_each_other_and_go_with_their_steps() {
    let (storage, catalog) = steps([10, 20, 30]);
    let marks = || -> Vec<(u64, Mark)> { catalog.marks().unwrap().iter().map(|m| (m.step, m.mark)).collect() };
    catalog.mark(20, Some(Mark::Keep)).unwrap();
    catalog.mark(10, Some(Mark::Bad)).unwrap();
    assert_eq!(marks(), [(10, Mark::Bad), (20, Mark::Keep)]);
    catalog.mark(20, Some(Mark::Bad)).unwrap();
    assert_eq!(marks(), [(10, Mark::Bad), (20, Mark::Bad)]);
    storage.remove(&step_name(10)).unwrap();
    catalog.mark(30, Some(Mark::Keep)).unwrap();
    assert_eq!(marks(), [(20, Mark::Bad), (30, Mark::Keep)]);
    assert_eq!(catalog.mark(10, Some(Mark::Keep)).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn marks_of_a_newer_version_stop_deletion_and_nothing_else() {
    let (storage, catalog) = steps([10, 20]);
    storage.write_marks(br#"{"version":2,"marks":[]}"#).unwrap();
    let refused = catalog.prune(&Retention::last(1), PruneOptions::new()).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Invalid, "{refused}");
    assert_eq!((newest(&catalog), catalog.list().unwrap().len()), (20, 2));
    storage.write_marks(br#"{"version":1,"marks":[]}"#).unwrap();
    assert_eq!(numbers(&catalog.prune(&Retention::last(1), PruneOptions::new()).unwrap().removed), [10]);
}
