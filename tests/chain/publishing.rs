//! What a publisher writes, and when.

use crate::fixtures::{MINUTE, Model, publish, small};
use ashore::chain::{Chain, Follow, Kind, Publisher, Weights};
use ashore::{Catalog, Checkpoint, ErrorKind, HostTensor, StateDict};
use std::sync::Arc;

fn names(root: &std::path::Path) -> Vec<String> {
    Chain::open(root).unwrap().versions().unwrap().into_iter().map(|version| version.name).collect()
}

#[test]
fn the_first_version_is_a_full_and_the_next_is_small() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let mut model = Model::new(1, 100_000);
    let first = publish(&publisher, &model).unwrap();
    assert_eq!((first.version, first.kind), (1, Kind::Full));
    // A full is a step that every reader knows, but not one of a catalog.
    assert_eq!(Checkpoint::open(root.path().join("v-00000001")).unwrap().tensors().unwrap().len(), 4);
    assert_eq!(Catalog::open(root.path()).unwrap().list().unwrap(), []);

    model.update(2, 100);
    let second = publish(&publisher, &model).unwrap();
    let Kind::Delta { base: 1, changed } = second.kind else { panic!("{second:?}") };
    assert!((1900..=2001).contains(&changed), "{changed}");
    // About two bytes for each element that changed, of two hundred; and a header of 4096.
    assert!((second.bytes - 4096) * 60 < second.full_bytes, "{second:?}");
    assert_eq!(second.state, {
        let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
        assert_eq!(follow.advance(MINUTE).unwrap(), Some(2));
        model.assert_equals(follow.weights());
        follow.weights().state_digest().unwrap()
    });
}

#[test]
fn a_version_without_changes_is_an_empty_delta() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let model = Model::new(1, 8000);
    publish(&publisher, &model).unwrap();
    assert_eq!(publish(&publisher, &model).unwrap().kind, Kind::Delta { base: 1, changed: 0 });
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(2));
    model.assert_equals(follow.weights());
}

#[test]
fn another_structure_or_other_weights_altogether_are_a_full() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let state = |bytes: Vec<u8>, shape: &[usize]| {
        let mut state = StateDict::new();
        state.tensor("w", HostTensor::new(Arc::new(bytes), shape)).unwrap();
        state
    };
    let kind =
        |bytes: Vec<u8>, shape: &[usize]| publisher.publish(state(bytes, shape)).unwrap().wait(MINUTE).unwrap().kind;
    let zeros = || vec![0; 1 << 16];
    assert_eq!(kind(zeros(), &[1 << 16]), Kind::Full);
    assert_eq!(kind(zeros(), &[1 << 8, 1 << 8]), Kind::Full, "the same bytes in another shape");
    assert_eq!(kind(zeros(), &[1 << 8, 1 << 8]), Kind::Delta { base: 2, changed: 0 });
    assert_eq!(kind(vec![1; 1 << 16], &[1 << 8, 1 << 8]), Kind::Full, "every element changed");
}

#[test]
fn when_deltas_are_half_of_a_full_one_is_written_beside_and_old_versions_go() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap().full_every(4).grace(3));
    let mut model = Model::new(1, 8000);
    for number in 1..=12 {
        model.update(number, 200);
        publish(&publisher, &model).unwrap();
    }
    // Waits for the thread that tidies, which may be some versions behind.
    drop(publisher);
    let listed = names(root.path());
    assert!(listed.iter().any(|name| name.ends_with(".full")), "{listed:?}");
    assert!(!listed.contains(&"v-00000001".to_owned()), "{listed:?}");
    assert!(listed.contains(&"v-00000010".to_owned()) && listed.contains(&"v-00000012".to_owned()), "{listed:?}");
    assert!(Chain::open(root.path()).unwrap().holes().unwrap().is_empty());
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(12));
    model.assert_equals(follow.weights());
}

#[test]
fn a_publisher_that_starts_again_goes_on_from_what_it_reads() {
    let root = tempfile::tempdir().unwrap();
    let mut model = Model::new(1, 8000);
    for number in 1..=5 {
        let publisher = small(Publisher::open(root.path()).unwrap());
        model.update(number, 100);
        let published = publish(&publisher, &model).unwrap();
        assert_eq!(published.version, number);
        assert_eq!(matches!(published.kind, Kind::Delta { .. }), number > 1, "{published:?}");
    }
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    follow.advance(MINUTE).unwrap();
    model.assert_equals(follow.weights());
}

#[test]
fn going_back_is_a_full_under_the_next_number() {
    let root = tempfile::tempdir().unwrap();
    let mut model = Model::new(1, 8000);
    let publisher = small(Publisher::open(root.path()).unwrap());
    publish(&publisher, &model).unwrap();
    let old = model.clone();
    for number in 2..=3 {
        model.update(number, 100);
        publish(&publisher, &model).unwrap();
    }
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(3));
    drop(publisher);
    let publisher = small(Publisher::open(root.path()).unwrap().begin_with_full());
    let again = publish(&publisher, &old).unwrap();
    assert_eq!((again.version, again.kind), (4, Kind::Full));
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(4));
    old.assert_equals(follow.weights());
}

#[test]
fn of_two_publishers_the_second_to_publish_a_number_ends() {
    let root = tempfile::tempdir().unwrap();
    let mut model = Model::new(1, 8000);
    let first = small(Publisher::open(root.path()).unwrap());
    publish(&first, &model).unwrap();
    let second = small(Publisher::open(root.path()).unwrap());
    model.update(2, 100);
    publish(&second, &model).unwrap();
    model.update(3, 100);
    assert_eq!(publish(&first, &model).unwrap_err().kind(), ErrorKind::Conflict);
    assert_eq!(publish(&first, &model).unwrap_err().kind(), ErrorKind::Conflict, "it has ended");
    assert_eq!(publish(&second, &model).unwrap().version, 3);
}

#[test]
fn versions_in_flight_are_committed_in_order() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let mut model = Model::new(1, 8000);
    let flight: Vec<_> = (1..=6)
        .map(|number| {
            model.update(number, 100);
            publisher.publish(model.state()).unwrap()
        })
        .collect();
    for (number, publish) in (1..).zip(flight) {
        assert_eq!(publish.wait(MINUTE).unwrap().version, number);
    }
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(6));
    model.assert_equals(follow.weights());
}
