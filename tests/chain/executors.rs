//! Versions that go through an executor of the program.

use crate::fixtures::{MINUTE, Model, small};
use ashore::CheckpointExecutor;
use ashore::chain::{Chain, Follow, Kind, Publisher, Weights};
use ashore::storage::local::{Linux, Local};
use ashore::testing::{Call, Faulty};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

#[test]
fn an_executor_saves_steps_and_publishes_versions_with_one_arena() {
    let (steps, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let executor = CheckpointExecutor::builder(steps.path()).arena(8 << 20).chunk(1 << 20).build().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let mut model = Model::new(1, 8000);
    for number in 1..=4 {
        model.update(number, 100);
        let publish = executor.publish_delta(&publisher, model.state()).unwrap();
        let save = executor.save(number * 10, model.state()).unwrap();
        executor.fence().unwrap();
        assert_eq!(matches!(publish.wait(MINUTE).unwrap().kind, Kind::Delta { .. }), number > 1);
        save.wait(MINUTE).unwrap();
    }
    assert_eq!(executor.latest().unwrap().unwrap().step(), 40);
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(4));
    model.assert_equals(follow.weights());
    executor.shutdown(MINUTE).unwrap();
}

#[test]
fn a_publish_is_a_future() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let publish = publisher.publish(Model::new(1, 80).state()).unwrap();
    assert_eq!(futures_executor::block_on(publish).unwrap().version, 1);
}

/// Numbers of the fulls in a chain.
fn fulls(root: &Path) -> Vec<u64> {
    let versions = Chain::open(root).unwrap().versions().unwrap();
    versions.iter().filter(|version| version.base.is_none()).map(|version| version.number).collect()
}

#[test]
fn a_version_is_acknowledged_before_a_full_is_written_beside_it() {
    let (steps, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let executor = CheckpointExecutor::builder(steps.path()).arena(8 << 20).chunk(1 << 20).build().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let storage = Arc::new(Local::with_sys(faulty.clone(), root.path()).unwrap());
    let publisher = small(Publisher::over(storage).full_every(2));
    let mut model = Model::new(1, 8000);
    let mut publish = |number| {
        model.update(number, 100);
        let publish = executor.publish_delta(&publisher, model.state()).unwrap();
        publish.wait(Duration::from_secs(20)).unwrap().kind
    };
    assert!(matches!(publish(1), Kind::Full));
    assert!(matches!(publish(2), Kind::Delta { .. }));
    // The first directory is that of the version, the second that of the full.
    let (later, (go_on, waiting)) = (faulty.clone(), mpsc::channel::<()>());
    faulty.interrupt(Call::Mkdir, move || {
        later.interrupt(Call::Mkdir, move || _ = waiting.recv_timeout(MINUTE));
    });
    assert!(matches!(publish(3), Kind::Delta { .. }));
    assert_eq!(fulls(root.path()), [1]);
    // Deltas that are committed while a full is written count for the next one.
    assert!(matches!(publish(4), Kind::Delta { .. }));
    assert!(matches!(publish(5), Kind::Delta { .. }));
    go_on.send(()).unwrap();
    executor.shutdown(MINUTE).unwrap();
    assert_eq!(fulls(root.path()), [1, 3, 5]);
}

#[test]
fn an_executor_keeps_nothing_of_a_publisher_that_was_dropped() {
    let (steps, root) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let executor = CheckpointExecutor::builder(steps.path()).arena(8 << 20).chunk(1 << 20).build().unwrap();
    let storage = Arc::new(Local::open(root.path()).unwrap());
    let kept = Arc::downgrade(&storage);
    let publisher = small(Publisher::over(storage));
    executor.publish_delta(&publisher, Model::new(1, 800).state()).unwrap().wait(MINUTE).unwrap();
    drop(publisher);
    // A thread of the executor may still tidy up.
    let deadline = Instant::now() + MINUTE;
    while kept.strong_count() > 0 {
        assert!(Instant::now() < deadline, "the executor keeps the publisher's storage");
        std::thread::sleep(Duration::from_millis(5));
    }
}
