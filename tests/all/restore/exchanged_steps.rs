use crate::fixtures::checkpoint::{Disturbance, MadeCheckpoint, Watched, noise};
use ashore::{Catalog, Checkpoint, Dtype, ErrorKind};

fn made(seed: u64) -> MadeCheckpoint {
    MadeCheckpoint::new(7).tensor("x", Dtype::U8, &[9], noise(9, seed))
}

#[test]
fn the_new_step_is_opened_whole() {
    let storage = Watched::default();
    made(1).publish(&storage.memory, "step-7");
    let (memory, new) = (storage.memory.clone(), made(2));
    let exchange = {
        let new = new.clone();
        move || new.publish(&memory, "step-7")
    };
    storage.seen.lock().unwrap().before_shard = Some(Disturbance(Box::new(exchange)));
    let checkpoint = Checkpoint::from_storage(storage.storage, "step-7").unwrap();
    assert_eq!(checkpoint.attempt(), new.attempt);
    assert_eq!(checkpoint.read("x").unwrap(), new.tensors["x"].2);
}

#[test]
fn a_step_pruned_meanwhile_is_not_found_and_not_a_problem() {
    let storage = Watched::default();
    made(1).publish(&storage.memory, "step-7");
    let memory = storage.memory.clone();
    let prune = move || ashore::storage::Storage::remove(&memory, "step-7").unwrap();
    storage.seen.lock().unwrap().before_shard = Some(Disturbance(Box::new(prune)));
    let catalog = Catalog::over(storage.storage);
    let (entries, problems) = catalog.survey().unwrap();
    assert!(entries.is_empty() && problems.is_empty(), "{entries:?} {problems:?}");
    assert!(catalog.latest().unwrap().is_none());
    assert_eq!(catalog.checkpoint(7).unwrap_err().kind(), ErrorKind::NotFound);
}
