//! A prune deleted the only sound step: the newest was complete with one flipped byte, and "complete" was
//! enough. A prune keeps a sound step.

use crate::fixtures::checkpoint::{MadeCheckpoint, noise, publish};
use ashore::catalog::{Entry, Problem, Verify};
use ashore::storage::{Memory, Storage};
use ashore::{Catalog, Dtype, ErrorKind, PruneOptions, Retention};
use std::sync::Arc;

const ONE: Retention = Retention::last(1);
const NOW: fn() -> PruneOptions = PruneOptions::new;

fn made(step: u64) -> MadeCheckpoint {
    MadeCheckpoint::new(step).tensor("x", Dtype::U8, &[64], noise(64, step))
}

/// Saves sound steps, and changes one byte of the tensor in those of `flipped`: they are complete but not
/// sound.
fn steps(sound: &[u64], flipped: &[u64]) -> (Memory, Catalog) {
    let storage = Memory::new();
    sound.iter().for_each(|&step| made(step).publish(&storage, &ashore::id::step_name(step)));
    for &step in flipped {
        let mut files = made(step).files();
        *files[0].1.last_mut().unwrap() ^= 1;
        publish(&storage, &ashore::id::step_name(step), &files);
    }
    (storage.clone(), Catalog::over(Arc::new(storage)))
}

fn left(storage: &Memory) -> Vec<u64> {
    let mut steps: Vec<_> = storage.list().unwrap().iter().filter_map(|n| ashore::id::parse_step_name(n)).collect();
    steps.sort_unstable();
    steps
}

fn numbers(entries: &[Entry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.step).collect()
}

fn problems(problems: &[Problem]) -> Vec<(u64, ErrorKind)> {
    problems.iter().map(|problem| (problem.step, problem.error.kind())).collect()
}

#[test]
fn a_step_with_a_flipped_byte_replaces_no_sound_one() {
    let (storage, catalog) = steps(&[5, 10], &[20]);
    assert_eq!(numbers(&catalog.list().unwrap()), [5, 10, 20], "all are complete");
    let pruned = catalog.prune(&ONE, NOW()).unwrap();
    assert_eq!(left(&storage), [10, 20], "10 is the newest that is sound");
    assert_eq!((numbers(&pruned.removed), numbers(&pruned.kept)), (vec![5], vec![10, 20]));
    assert_eq!(problems(&pruned.doubtful), [(20, ErrorKind::Corrupt)]);
}

#[test]
fn without_a_sound_step_only_an_unverified_prune_deletes() {
    let (storage, catalog) = steps(&[], &[10, 20]);
    assert_eq!(numbers(&catalog.prune(&ONE, NOW()).unwrap().removed), [0; 0]);
    assert_eq!(catalog.delete(10, NOW()).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(catalog.delete_damaged(NOW()).unwrap_err().kind(), ErrorKind::Invalid);
    assert_eq!(left(&storage), [10, 20]);
    let blind = Catalog::over(Arc::new(storage.clone()));
    blind.prune(&ONE, NOW().verify(Verify::No)).unwrap();
    assert_eq!(left(&storage), [20], "unverified: the newest that is complete");
}

#[test]
fn a_prune_reads_one_step_or_with_verify_each_that_counts() {
    let two = Retention::last(2);
    let (storage, catalog) = steps(&[10, 30], &[20]);
    catalog.prune(&two, NOW()).unwrap();
    assert_eq!(left(&storage), [20, 30], "30 was read and found sound, 20 was not read");
    let (storage, catalog) = steps(&[10, 30], &[20]);
    let pruned = catalog.prune(&two, NOW().verify(Verify::All)).unwrap();
    assert_eq!((left(&storage), problems(&pruned.doubtful)), (vec![10, 20, 30], vec![(20, ErrorKind::Corrupt)]));
}

#[test]
fn a_step_that_this_process_found_damaged_never_counts() {
    let (storage, catalog) = steps(&[5, 10], &[20]);
    let found = catalog.latest_valid().unwrap().unwrap();
    assert_eq!((found.checkpoint.step(), problems(&found.skipped)), (10, vec![(20, ErrorKind::Corrupt)]));
    catalog.prune(&ONE, NOW().verify(Verify::No)).unwrap();
    assert_eq!(left(&storage), [10, 20], "a step that is known to be damaged never counts");
}

#[test]
fn a_dry_run_reads_too_and_says_the_same() {
    let (storage, catalog) = steps(&[5, 10], &[20]);
    let dry = catalog.prune(&ONE, NOW().dry_run(true)).unwrap();
    assert_eq!((numbers(&dry.removed), problems(&dry.doubtful)), (vec![5], vec![(20, ErrorKind::Corrupt)]));
    assert_eq!(left(&storage), [5, 10, 20]);
}

#[test]
fn a_step_is_deleted_when_another_is_sound() {
    let (storage, catalog) = steps(&[5, 10], &[20]);
    made(20).publish(&storage, "ckpt-20");
    assert_eq!(catalog.delete(7, NOW()).unwrap_err().kind(), ErrorKind::NotFound);
    let deleted = catalog.delete(20, NOW()).unwrap();
    assert_eq!((numbers(&deleted.removed), left(&storage)), (vec![20, 20], vec![5, 10]), "under all of its names");
    catalog.delete(10, NOW()).unwrap();
    assert_eq!(catalog.delete(5, NOW()).unwrap_err().kind(), ErrorKind::Invalid, "the last one");
    assert_eq!(left(&storage), [5]);
}
