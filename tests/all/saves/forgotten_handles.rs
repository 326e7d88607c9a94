//! Forgetting a handle or the executor leaks memory at worst: saves continue, and no freed memory is read.

use crate::rig::{LONG, eventually, one, pattern, rig};
use std::sync::Arc;

#[test]
fn a_forgotten_save_still_becomes_durable() {
    let rig = rig(|b| b);
    let tensor = Arc::new(pattern(1, 9000));
    std::mem::forget(rig.executor.save(1, one("t", tensor.clone())).unwrap());
    rig.executor.fence().unwrap();
    assert_eq!(Arc::strong_count(&tensor), 1);
    eventually("durable", || rig.checkpoint(1).is_ok());
    rig.executor.shutdown(LONG).unwrap();
}

#[test]
fn the_saves_of_a_forgotten_executor_still_become_durable() {
    let rig = rig(|b| b);
    let (storage, tensor) = (rig.storage.clone(), Arc::new(pattern(1, 9000)));
    let save = rig.executor.save(1, one("t", tensor.clone())).unwrap();
    std::mem::forget(rig.executor);
    save.wait(LONG).unwrap();
    assert_eq!(Arc::strong_count(&tensor), 1);
    assert_eq!(storage.list().unwrap(), ["step-00000001"]);
}

#[test]
fn a_handle_outlives_its_executor() {
    let rig = rig(|b| b);
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    rig.executor.shutdown(LONG).unwrap();
    assert!(save.wait(LONG).unwrap().committed().is_some());
    assert!(save.staged().wait(LONG).is_ok());
    assert!(!save.cancel());
}
