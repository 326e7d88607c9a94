//! A run that goes back to an early step keeps its saves, though steps of the run before have higher numbers.
//! Each save by a new process once deleted the step that the branch had saved before it.

use crate::fixtures::checkpoint::{MadeCheckpoint, noise, publish};
use crate::fixtures::executor::{LONG, one};
use ashore::id::step_name;
use ashore::storage::{Memory, Storage};
use ashore::{Catalog, CheckpointExecutor, Dtype, ErrorKind, PruneOptions, Retention, SaveOptions};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

fn made(step: u64) -> MadeCheckpoint {
    MadeCheckpoint::new(step).tensor("x", Dtype::U8, &[64], noise(64, step))
}

fn left(storage: &dyn Storage) -> Vec<u64> {
    let mut steps: Vec<_> = storage.list().unwrap().iter().filter_map(|n| ashore::id::parse_step_name(n)).collect();
    steps.sort_unstable();
    steps
}

#[test]
fn a_branch_that_is_saved_by_one_process_after_the_other_keeps_its_steps() {
    let storage = Memory::new();
    [10, 90, 100].iter().for_each(|&step| made(step).publish(&storage, &step_name(step)));
    for step in 11..=14 {
        let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(storage.clone()));
        let executor = builder.arena(4 * 4096).chunk(4096).keep_last(2).build().unwrap();
        executor.save(step, one("x", vec![1_u8; 64])).unwrap().wait(LONG).unwrap();
        executor.shutdown(LONG).unwrap();
        assert_eq!(left(&storage), [step - 1, step, 90, 100]);
    }
}

#[test]
fn steps_after_one_are_discarded_when_that_one_is_sound() {
    let storage = Memory::new();
    [10, 14, 90, 100].iter().for_each(|&step| made(step).publish(&storage, &step_name(step)));
    publish(&storage, &step_name(95), &[("manifest.json".into(), Vec::new())]);
    let mut flipped = made(12).files();
    *flipped[0].1.last_mut().unwrap() ^= 1;
    publish(&storage, &step_name(12), &flipped);
    let catalog = Catalog::over(Arc::new(storage.clone()));
    assert_eq!(catalog.discard_after(13, PruneOptions::new()).unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(catalog.discard_after(12, PruneOptions::new()).unwrap_err().kind(), ErrorKind::Invalid, "12 is damaged");
    assert_eq!(left(&storage), [10, 12, 14, 90, 95, 100]);
    let discarded = catalog.discard_after(14, PruneOptions::new()).unwrap();
    assert_eq!(discarded.removed.iter().map(|entry| entry.step).collect::<Vec<_>>(), [90, 100]);
    assert_eq!(discarded.damaged.iter().map(|problem| problem.step).collect::<Vec<_>>(), [95]);
    assert_eq!(left(&storage), [10, 12, 14]);
    assert_eq!(catalog.latest().unwrap().unwrap().step(), 14);
}

/// Steps on a disk, each written at the given second.
fn written(root: &std::path::Path, steps: &[(u64, u64)]) {
    for &(step, second) in steps {
        let dir = root.join(step_name(step));
        std::fs::create_dir(&dir).unwrap();
        for (name, bytes) in made(step).files() {
            std::fs::write(dir.join(name), bytes).unwrap();
        }
        let manifest = std::fs::File::options().write(true).open(dir.join("manifest.json")).unwrap();
        manifest.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(second)).unwrap();
    }
}

#[test]
fn a_process_that_saved_nothing_goes_by_the_clock_of_the_storage() {
    let root = tempfile::tempdir().unwrap();
    written(root.path(), &[(10, 1), (90, 2), (100, 3), (11, 4), (12, 5), (13, 6)]);
    let catalog = Catalog::open(root.path()).unwrap();
    let (last, newest) = catalog.branched().unwrap().unwrap();
    assert_eq!((last.step, newest.step), (13, 100));
    catalog.prune(&Retention::last(2), PruneOptions::new()).unwrap();
    let kept: Vec<_> = catalog.list().unwrap().iter().map(|entry| entry.step).collect();
    assert_eq!(kept, [12, 13, 90, 100], "the running branch, and the newest by number");
    catalog.discard_after(13, PruneOptions::new()).unwrap();
    assert!(catalog.branched().unwrap().is_none());
}

#[test]
fn a_step_that_is_there_under_another_name_is_a_conflict_not_a_second_step() {
    let storage = Memory::new();
    made(12).publish(&storage, "step_12");
    let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(storage.clone()));
    let executor = builder.arena(4 * 4096).chunk(4096).build().unwrap();
    let save = |step, name: Option<&str>| {
        let options = name.map_or_else(SaveOptions::default, |name| SaveOptions::default().name(name));
        executor.save_with(step, one("x", vec![1_u8; 64]), options).unwrap().wait(LONG).map(drop)
    };
    for name in [None, Some("ckpt-12"), Some("12")] {
        let refused = save(12, name).unwrap_err();
        assert_eq!((refused.kind(), refused.step()), (ErrorKind::Conflict, Some(12)), "{name:?}");
        assert!(refused.message().contains("other=\"step_12\""), "{refused}");
    }
    save(13, None).unwrap();
    assert_eq!(save(13, Some("ckpt-13")).unwrap_err().kind(), ErrorKind::Conflict);
    save(14, Some("ckpt-14")).unwrap();
    assert_eq!(save(14, None).unwrap_err().kind(), ErrorKind::Conflict);
    let mut names = storage.list().unwrap();
    names.sort_unstable();
    assert_eq!(names, ["ckpt-14", "step-00000013", "step_12"]);
    executor.catalog().delete(14, PruneOptions::new()).unwrap();
    save(14, None).unwrap();
    executor.shutdown(LONG).unwrap();
}
