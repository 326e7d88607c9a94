//! How followers get to the newest version.

use crate::fixtures::{MINUTE, Model, publish, small};
use ashore::chain::{Chain, Follow, Publisher, Switch, Weights};
use ashore::{Dtype, ErrorKind, Form};
use std::path::Path;
use std::time::Duration;

const NOW: Duration = Duration::ZERO;

/// A chain of as many versions, and the model after each.
fn chain(root: &Path, versions: u64, share: usize) -> Vec<Model> {
    let publisher = small(Publisher::open(root).unwrap());
    // Long enough that no full is due beside a delta.
    let mut model = Model::new(1, 80_000);
    let one = |number| {
        model.update(number, share);
        publish(&publisher, &model).unwrap();
        model.clone()
    };
    (1..=versions).map(one).collect()
}

#[test]
fn lent_memory_becomes_each_version_in_place() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let mut model = Model::new(1, 8000);
    let mut memory = vec![0_u8; 16_000];
    let address = memory.as_ptr();
    let mut weights = Weights::new();
    weights.lend("layer.weight", Dtype::BF16, &[1000, 8], &mut memory).unwrap();
    let mut follow = Follow::open(root.path()).unwrap().start(weights).unwrap();
    assert_eq!(follow.advance(NOW).unwrap(), None);
    for number in 1..=5 {
        model.update(number, 100);
        publish(&publisher, &model).unwrap();
        assert_eq!(follow.advance(MINUTE).unwrap(), Some(number));
        model.assert_equals(follow.weights());
        assert_eq!(follow.weights().bytes("layer.weight").unwrap().as_ptr(), address, "no other memory");
    }
}

#[test]
fn readers_of_two_copies_keep_their_version_while_the_next_is_made() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    let mut model = Model::new(1, 8000);
    let mut follow = Follow::open(root.path()).unwrap().switch(Switch::Double).start(Weights::new()).unwrap();
    let reader = follow.reader().unwrap();
    assert_eq!(reader.get().version(), None);
    let mut kept = Vec::new();
    for number in 1..=6 {
        model.update(number, 100);
        publish(&publisher, &model).unwrap();
        assert_eq!(follow.advance(MINUTE).unwrap(), Some(number));
        model.assert_equals(&reader.get());
        // Some readers keep what they have for a long time, which costs a copy.
        if number % 3 == 0 {
            kept.push((reader.get(), model.clone()));
        }
    }
    kept.iter().for_each(|(weights, model)| model.assert_equals(weights));
}

#[test]
fn values_travel_with_each_version_and_a_url_is_a_root() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("file://{}/chain", root.path().display());
    assert_eq!(Follow::open(&url).unwrap_err().kind(), ErrorKind::NotFound);
    let publisher = small(Publisher::open(&url).unwrap());
    let mut follow = Follow::open(&url).unwrap().start(Weights::new()).unwrap();
    for step in [10_u64, 20] {
        let mut state = Model::new(step, 8000).state();
        state.value("step", &step).unwrap();
        let publish = publisher.publish(state).unwrap();
        assert_eq!((publish.version(), publish.save().step()), (step / 10, step / 10));
        publish.wait(MINUTE).unwrap();
        let update = follow.next(MINUTE).unwrap().unwrap();
        assert_eq!(update.value_names().collect::<Vec<_>>(), ["step"]);
        assert_eq!(update.value::<u64>("step").unwrap(), step);
        for (error, kind) in [
            (update.value::<u64>("other").unwrap_err(), ErrorKind::NotFound),
            (update.value::<String>("step").unwrap_err(), ErrorKind::Invalid),
        ] {
            assert_eq!((error.kind(), error.step()), (kind, Some(step / 10)), "{error}");
        }
        follow.apply(update).unwrap();
    }
    assert_eq!(Chain::open(&url).unwrap().versions().unwrap().len(), 2);
}

#[test]
fn two_copies_lend_no_memory() {
    let root = tempfile::tempdir().unwrap();
    let (mut memory, mut weights) = (vec![0_u8; 8], Weights::new());
    weights.lend("w", Dtype::U8, &[8], &mut memory).unwrap();
    let started = Follow::open(root.path()).unwrap().switch(Switch::Double).start(weights);
    assert_eq!(started.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_follower_takes_the_way_that_reads_the_fewest_bytes() {
    let root = tempfile::tempdir().unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap().full_every(6).grace(100));
    let mut model = Model::new(1, 8000);
    let mut near = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    let mut far = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    for number in 1..=8 {
        model.update(number, 10);
        publish(&publisher, &model).unwrap();
        if number == 1 {
            far.advance(MINUTE).unwrap();
        }
        if number == 7 {
            near.advance(MINUTE).unwrap();
        }
    }
    // Waits for the thread that tidies, which may not have written the full yet.
    drop(publisher);
    let update = near.next(MINUTE).unwrap().unwrap();
    assert!(!update.is_full() && update.version() == 8, "{update:?}");
    // Seven deltas of a tenth and more are longer than a full and the deltas after it.
    let update = far.next(MINUTE).unwrap().unwrap();
    assert!(update.is_full() && update.version() > 1, "{update:?}");
    far.apply(update).unwrap();
    far.advance(NOW).unwrap();
    model.assert_equals(far.weights());
    near.advance(MINUTE).unwrap();
    model.assert_equals(near.weights());
}

#[test]
fn an_own_copy_is_durable_before_the_switch_and_begins_the_next_life() {
    let (root, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let models = chain(root.path(), 4, 100);
    let start = || Follow::open(root.path()).unwrap().copy_to(own.path()).unwrap().start(Weights::new()).unwrap();
    let mut follow = start();
    let update = follow.next(MINUTE).unwrap().unwrap();
    assert!(update.is_full());
    assert_eq!(Chain::open(own.path()).unwrap().versions().unwrap().len(), 1, "there before it is applied");
    follow.apply(update).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(4));
    drop(follow);
    // The publisher is gone, with all that it had.
    std::fs::remove_dir_all(root.path()).unwrap();
    std::fs::create_dir(root.path()).unwrap();
    let follow = start();
    assert_eq!(follow.version(), Some(4));
    models[3].assert_equals(follow.weights());
}

#[test]
fn an_own_copy_does_not_grow_for_ever() {
    let (root, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let publisher = small(Publisher::open(root.path()).unwrap().grace(2));
    let mut model = Model::new(1, 8000);
    let mut follow = Follow::open(root.path()).unwrap().copy_to(own.path()).unwrap().start(Weights::new()).unwrap();
    for number in 1..=30 {
        model.update(number, 20);
        publish(&publisher, &model).unwrap();
        follow.advance(MINUTE).unwrap();
    }
    model.assert_equals(follow.weights());
    let chain = Chain::open(own.path()).unwrap();
    let bytes = |versions: &[ashore::chain::Version]| versions.iter().map(|version| version.bytes).sum::<u64>();
    let versions = chain.versions().unwrap();
    let full = versions.iter().filter(|version| version.base.is_none()).map(|version| version.bytes).max().unwrap();
    assert!(bytes(&versions) < 3 * full, "{versions:?}");
    assert!(chain.holes().unwrap().is_empty());
}

#[test]
fn a_hole_is_waited_for_and_the_next_full_goes_past_it() {
    let root = tempfile::tempdir().unwrap();
    let models = chain(root.path(), 5, 100);
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    std::fs::remove_dir_all(root.path().join("v-00000003")).unwrap();
    assert_eq!(follow.advance(NOW).unwrap(), Some(2), "the newest that can be built");
    models[1].assert_equals(follow.weights());
    let chain = Chain::open(root.path()).unwrap();
    let holes: Vec<_> = chain.holes().unwrap().into_iter().map(|hole| (hole.number, hole.missing)).collect();
    assert_eq!(holes, [(4, 3), (5, 3)]);
    assert_eq!(follow.advance(NOW).unwrap(), None);
    // The publisher starts again, cannot build the newest, and begins with a full after it.
    let publisher = small(Publisher::open(root.path()).unwrap().begin_with_full());
    assert_eq!(publish(&publisher, &models[4]).unwrap().version, 6);
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(6));
    models[4].assert_equals(follow.weights());
    assert!(chain.holes().unwrap().is_empty());
}

#[test]
fn an_update_says_which_elements_change_for_memory_elsewhere() {
    for form in [Form::Packed, Form::Indices] {
        let root = tempfile::tempdir().unwrap();
        let publisher = small(Publisher::open(root.path()).unwrap().form(form));
        let mut model = Model::new(1, 8000);
        publish(&publisher, &model).unwrap();
        let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
        follow.advance(MINUTE).unwrap();
        let mut elsewhere = model.layer.clone();
        model.update(2, 100);
        publish(&publisher, &model).unwrap();
        let update = follow.next(MINUTE).unwrap().unwrap();
        let changes = update.changes(follow.weights()).unwrap();
        let layer = changes.iter().find(|changed| changed.name == "layer.weight").unwrap();
        for (at, value) in layer.indices.as_ref().unwrap().iter().zip(layer.values.chunks_exact(2)) {
            elsewhere[*at as usize] = u16::from_le_bytes([value[0], value[1]]);
        }
        assert_eq!(elsewhere, model.layer, "{form:?}");
        follow.apply(update).unwrap();
        model.assert_equals(follow.weights());
    }
}

#[test]
fn a_full_that_replaces_weights_in_place_is_checked_whole_before_the_first_write() {
    let root = tempfile::tempdir().unwrap();
    let models = chain(root.path(), 1, 100);
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    follow.advance(MINUTE).unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap().begin_with_full());
    let next = Model::new(2, 8000);
    publish(&publisher, &next).unwrap();
    let file = root.path().join("v-00000002/model.safetensors");
    let mut bytes = std::fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let error = follow.advance(MINUTE).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Corrupt, Some(2)), "{error}");
    models[0].assert_equals(follow.weights());
}

#[test]
fn what_a_killed_follower_has_half_copied_is_no_obstacle() {
    let (root, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    chain(root.path(), 2, 100);
    // The remains of a copy of version 1, made by a process that is gone.
    let attempt = Chain::open(root.path()).unwrap().versions().unwrap()[0].attempt;
    let record = own.path().join(format!(".v-00000001.{attempt}.owner"));
    std::fs::create_dir(own.path().join(format!(".v-00000001.{attempt}.tmp"))).unwrap();
    std::fs::write(record, "{}").unwrap();
    let mut follow = Follow::open(root.path()).unwrap().copy_to(own.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(2));
}

#[test]
fn a_damaged_full_on_the_cheapest_way_is_gone_around_and_is_no_own_copy() {
    for with_own in [false, true] {
        let (root, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let publisher = small(Publisher::open(root.path()).unwrap().full_every(2).grace(100));
        let mut model = Model::new(1, 8000);
        for number in 1..=3 {
            model.update(number, 10);
            publish(&publisher, &model).unwrap();
        }
        drop(publisher);
        let versions = Chain::open(root.path()).unwrap().versions().unwrap();
        let beside = versions.iter().rfind(|version| version.base.is_none()).unwrap();
        assert_eq!((beside.number, versions.len()), (3, 4), "{versions:?}");
        let file = root.path().join(&beside.name).join("model.safetensors");
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, bytes).unwrap();

        let follower = Follow::open(root.path()).unwrap();
        let follower = if with_own { follower.copy_to(own.path()).unwrap() } else { follower };
        let mut follow = follower.start(Weights::new()).unwrap();
        if !with_own {
            // Without a copy every byte is checked as it arrives.
            assert_eq!(follow.advance(NOW).unwrap_err().kind(), ErrorKind::Corrupt);
        }
        assert_eq!(follow.advance(NOW).unwrap(), Some(3));
        model.assert_equals(follow.weights());
        assert_eq!(follow.advance(NOW).unwrap(), None);
        let mine = Chain::open(own.path()).unwrap().versions().unwrap();
        assert!(mine.iter().all(|version| version.name != beside.name), "{mine:?}");
    }
}

#[test]
fn an_own_copy_forgets_a_chain_that_was_deleted_and_begun_again() {
    let (root, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    chain(root.path(), 4, 100);
    let start = || Follow::open(root.path()).unwrap().copy_to(own.path()).unwrap().start(Weights::new()).unwrap();
    let mut follow = start();
    follow.advance(MINUTE).unwrap();
    let wipe = || {
        std::fs::remove_dir_all(root.path()).unwrap();
        std::fs::create_dir(root.path()).unwrap();
    };
    wipe();
    let models = chain(root.path(), 2, 50);
    drop(follow);
    assert_eq!(start().advance(MINUTE).unwrap(), Some(2));
    wipe();
    let follow = start();
    assert_eq!(follow.version(), Some(2), "not the newest version of the chain that was deleted");
    models[1].assert_equals(follow.weights());
}
