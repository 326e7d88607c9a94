//! Forgetting a handle or the executor leaks memory at worst: saves continue, and no freed memory is read.

use crate::fixtures::executor::{LONG, eventually, fixture, one, pattern};
use std::sync::Arc;

#[test]
fn a_forgotten_save_still_becomes_durable() {
    let fixture = fixture(|b| b);
    let tensor = Arc::new(pattern(1, 9000));
    std::mem::forget(fixture.executor.save(1, one("t", tensor.clone())).unwrap());
    fixture.executor.fence().unwrap();
    assert_eq!(Arc::strong_count(&tensor), 1);
    eventually("durable", || fixture.checkpoint(1).is_ok());
    fixture.executor.shutdown(LONG).unwrap();
}

#[test]
fn the_saves_of_a_forgotten_executor_still_become_durable() {
    let fixture = fixture(|b| b);
    let (storage, tensor) = (fixture.storage.clone(), Arc::new(pattern(1, 9000)));
    let save = fixture.executor.save(1, one("t", tensor.clone())).unwrap();
    std::mem::forget(fixture.executor);
    save.wait(LONG).unwrap();
    assert_eq!(Arc::strong_count(&tensor), 1);
    assert_eq!(storage.list().unwrap(), ["step-00000001"]);
}

#[test]
fn a_handle_outlives_its_executor() {
    let fixture = fixture(|b| b);
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    fixture.executor.shutdown(LONG).unwrap();
    assert!(save.wait(LONG).unwrap().committed().is_some());
    assert!(save.staged().wait(LONG).is_ok());
    assert!(!save.cancel());
}
