//! Versions that go through an executor of the program.

use crate::fixtures::{MINUTE, Model, small};
use ashore::CheckpointExecutor;
use ashore::chain::{Follow, Kind, Publisher, Weights};

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
