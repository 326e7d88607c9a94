//! The catalog, an overwrite, a save and a prune agree on which steps are ours and damaged, whatever is left
//! of them. A step of ours with a manifest of 0 bytes was foreign to an overwrite, and damaged to the
//! catalog.

use crate::fixtures::checkpoint::{Disturbance, MadeCheckpoint, Watched, noise, publish};
use crate::fixtures::executor::{LONG, one};
use ashore::catalog::Problem;
use ashore::id::step_name;
use ashore::storage::{Memory, Storage};
use ashore::{Catalog, CheckpointExecutor, Dtype, ErrorKind, OnDamaged, Outcome, PruneOptions, SaveOptions};
use std::sync::Arc;

type Files = Vec<(String, Vec<u8>)>;

fn made(step: u64) -> MadeCheckpoint {
    MadeCheckpoint::new(step)
        .tensor("x", Dtype::U8, &[5000], noise(5000, step))
        .tensor("y", Dtype::U8, &[64], noise(64, step))
        .shards(2)
}

/// The name of a damage, and how it changes the files of a step.
type Damaging = (&'static str, fn(&mut Files));

/// Every damage. The manifest is the last of the files, the shards are the first two.
const DAMAGES: [Damaging; 9] = [
    ("a manifest of 0 bytes", |files| files.last_mut().unwrap().1.clear()),
    ("a manifest of zeros", |files| files.last_mut().unwrap().1.fill(0)),
    ("a manifest that is cut", |files| files.last_mut().unwrap().1.truncate(200)),
    ("a manifest that is cut in its first word", |files| files.last_mut().unwrap().1.truncate(5)),
    ("a manifest whose first byte is another", |files| files.last_mut().unwrap().1[0] ^= 1),
    ("no manifest", |files| drop(files.pop())),
    ("a shard of 0 bytes", |files| files[0].1.clear()),
    ("a shard that is cut", |files| files[1].1.truncate(4100)),
    ("no shard", |files| drop(files.remove(0))),
];

fn damaged(storage: &Memory, step: u64, damage: fn(&mut Files)) {
    let mut files = made(step).files();
    damage(&mut files);
    publish(storage, &step_name(step), &files);
}

fn executor(storage: &Memory, damaged: OnDamaged) -> CheckpointExecutor {
    let storage: Arc<dyn Storage> = Arc::new(storage.clone());
    let builder = CheckpointExecutor::builder("in memory").storage(storage).arena(4 * 4096).chunk(4096);
    builder.damaged(damaged).build().unwrap()
}

#[test]
fn every_damage_is_listed_replaced_overwritten_and_pruned() {
    for (what, damage) in DAMAGES {
        let storage = Memory::new();
        made(10).publish(&storage, &step_name(10));
        damaged(&storage, 20, damage);
        let catalog = Catalog::over(Arc::new(storage.clone()));
        let (entries, problems) = catalog.survey().unwrap();
        assert_eq!(entries.len(), 1, "{what}");
        let found: Vec<_> = problems.iter().map(|problem| (problem.step, problem.error.kind())).collect();
        assert_eq!(found, [(20, ErrorKind::Corrupt)], "{what}");

        let refused = executor(&storage, OnDamaged::Refuse);
        let error = refused.save(20, one("x", vec![1_u8; 64])).unwrap().wait(LONG).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{what}");
        refused.shutdown(LONG).unwrap();

        for options in [SaveOptions::default(), SaveOptions::default().overwrite()] {
            damaged(&storage, 20, damage);
            let executor = executor(&storage, OnDamaged::Replace);
            assert_eq!(executor.latest_valid().unwrap().unwrap().checkpoint.step(), 10, "{what}");
            let outcome = executor.save_with(20, one("x", vec![1_u8; 64]), options).unwrap().wait(LONG).unwrap();
            assert!(matches!(outcome, Outcome::Durable(_)), "{what}: {outcome:?}");
            assert_eq!(executor.latest().unwrap().unwrap().read("x").unwrap(), [1; 64], "{what}");
            executor.shutdown(LONG).unwrap();
        }

        damaged(&storage, 20, damage);
        let pruned = catalog.delete_damaged(PruneOptions::new()).unwrap();
        assert_eq!(pruned.damaged.iter().map(|problem| problem.step).collect::<Vec<_>>(), [20], "{what}");
        assert_eq!(storage.list().unwrap(), [step_name(10)], "{what}");
    }
}

#[test]
fn a_run_gets_past_a_step_that_is_complete_and_damaged() {
    let storage = Memory::new();
    made(10).publish(&storage, &step_name(10));
    damaged(&storage, 20, |files| *files[0].1.last_mut().unwrap() ^= 1);
    let executor = executor(&storage, OnDamaged::default());
    let conflict = executor.save(20, one("x", vec![1_u8; 64])).unwrap().wait(LONG).unwrap_err();
    assert_eq!(conflict.kind(), ErrorKind::Conflict, "no call has read it yet");
    let found = executor.latest_valid().unwrap().unwrap();
    assert_eq!((found.checkpoint.step(), found.skipped.len()), (10, 1));
    executor.save(20, one("x", vec![1_u8; 64])).unwrap().wait(LONG).unwrap();
    assert_eq!(executor.latest_valid().unwrap().unwrap().checkpoint.read("x").unwrap(), [1; 64]);
    executor.shutdown(LONG).unwrap();
}

#[test]
fn a_foreign_or_sound_step_is_never_replaced() {
    let file = |name: &str, bytes: &[u8]| (name.to_string(), bytes.to_vec());
    let later = String::from_utf8(made(20).files().pop().unwrap().1).unwrap().replace("\"version\":2", "\"version\":3");
    let later = ashore::internal::format::seal::seal(later.rsplit_once(",\"digest\":").unwrap().0.into());
    let cases = [
        ("weights alone", vec![file("model.safetensors", b"theirs")]),
        ("the manifest of another program", vec![file("manifest.json", b"{\"format\":\"theirs\"}")]),
        ("a later version", vec![file("manifest.json", &later)]),
        ("a sound step", made(20).files()),
    ];
    for (what, files) in cases {
        let storage = Memory::new();
        made(10).publish(&storage, &step_name(10));
        publish(&storage, &step_name(20), &files);
        let executor = executor(&storage, OnDamaged::Replace);
        let error = executor.save(20, one("x", vec![1_u8; 64])).unwrap().wait(LONG).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Conflict, "{what}");
        assert_eq!(executor.catalog().delete_damaged(PruneOptions::new()).unwrap().damaged.len(), 0, "{what}");
        assert_eq!(storage.open(&step_name(20)).unwrap().list().unwrap().len(), files.len(), "{what}");
        executor.shutdown(LONG).unwrap();
    }
}

#[test]
fn a_sound_step_that_comes_in_place_of_a_damaged_one_wins() {
    let storage = Watched::default();
    made(10).publish(&storage.memory, &step_name(10));
    damaged(&storage.memory, 20, |files| files.last_mut().unwrap().1.clear());
    let (memory, other) = (storage.memory.clone(), made(20));
    // Another process replaces the damaged step while this one is about to.
    let replace = Disturbance(Box::new(move || other.publish(&memory, &step_name(20))));
    storage.seen.lock().unwrap().after_begin = Some(replace);
    let builder = CheckpointExecutor::builder("in memory").storage(storage.storage.clone());
    let executor = builder.arena(4 * 4096).chunk(4096).build().unwrap();
    let refused = executor.save(20, one("x", vec![1_u8; 64])).unwrap().wait(LONG).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Conflict);
    assert!(storage.seen.lock().unwrap().after_begin.is_none(), "the other process had its turn");
    assert_eq!(executor.catalog().checkpoint(20).unwrap().read("y").unwrap(), noise(64, 20));
    executor.shutdown(LONG).unwrap();
}

#[test]
fn the_deletion_of_one_damaged_step_or_of_those_after_a_step_leaves_all_others() {
    let storage = Memory::new();
    for step in [10, 40] {
        made(step).publish(&storage, &step_name(step));
    }
    for step in [20, 30, 50] {
        damaged(&storage, step, DAMAGES[7].1);
    }
    // Another step's, under this name: not damaged.
    made(60).publish(&storage, &step_name(70));
    let catalog = Catalog::over(Arc::new(storage.clone()));
    let steps = |problems: &[Problem]| problems.iter().map(|problem| problem.step).collect::<Vec<_>>();
    let left = || steps(&catalog.survey().unwrap().1);
    let pruned = catalog.delete(20, PruneOptions::new()).unwrap();
    assert_eq!((steps(&pruned.damaged), pruned.removed.len()), (vec![20], 0));
    assert_eq!(left(), [30, 50, 70]);
    let pruned = catalog.discard_after(40, PruneOptions::new()).unwrap();
    assert_eq!((steps(&pruned.damaged), steps(&pruned.failed)), (vec![50], vec![]));
    assert_eq!(left(), [30, 70]);
    assert!(catalog.delete(70, PruneOptions::new()).is_err());
    let pruned = catalog.delete_damaged(PruneOptions::new()).unwrap();
    assert_eq!((steps(&pruned.damaged), steps(&pruned.failed)), (vec![30], vec![]));
    assert_eq!((left(), catalog.list().unwrap().len()), (vec![70], 2));
}
