//! Publishes that fail, publishes of which it is unknown whether they failed, and power cuts.

use crate::fixtures::{MINUTE, Model, publish, small};
use ashore::chain::{Chain, Follow, Kind, Publisher, Weights};
use ashore::id::Attempt;
use ashore::storage::local::{Linux, Local, sys::Sys};
use ashore::storage::{Reading, Storage, Sweep, Swept, Writing};
use ashore::testing::simfs::SimFs;
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{ErrorKind, Result};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

fn fault(call: Call, code: i32) -> Fault {
    Fault { call: Some(call), after: 0, sticky: false, effect: Effect::Refused(code) }
}

/// Makes the fsync after the next rename fail: it is then unknown whether the version is published.
fn unclear(faulty: &Arc<Faulty>) {
    let later = faulty.clone();
    faulty.interrupt(Call::Rename, move || later.fail(fault(Call::Fsync, libc::EIO)));
}

#[test]
fn a_version_that_was_not_published_is_no_base() {
    let root = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let publisher = small(Publisher::over(Arc::new(Local::with_sys(faulty.clone(), root.path()).unwrap())));
    let mut model = Model::new(1, 8000);
    publish(&publisher, &model).unwrap();
    model.update(2, 100);
    faulty.fail(fault(Call::Rename, libc::EIO));
    assert_eq!(publish(&publisher, &model).unwrap_err().kind(), ErrorKind::Unavailable);
    model.update(3, 100);
    let third = publish(&publisher, &model).unwrap();
    assert!(matches!(third.kind, Kind::Delta { base: 1, .. }), "{third:?}");
    assert!(Chain::open(root.path()).unwrap().holes().unwrap().is_empty());
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(3));
    model.assert_equals(follow.weights());
}

#[test]
fn a_damaged_newest_version_ends_no_publisher() {
    let root = tempfile::tempdir().unwrap();
    let mut model = Model::new(1, 8000);
    for number in 1..=2 {
        model.update(number, 100);
        publish(&small(Publisher::open(root.path()).unwrap()), &model).unwrap();
    }
    std::fs::write(root.path().join("v-00000002/manifest.json"), b"damaged").unwrap();
    let publisher = small(Publisher::open(root.path()).unwrap());
    for number in 3..=4 {
        model.update(number, 100);
        assert_eq!(publish(&publisher, &model).unwrap().version, number);
    }
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(4));
    model.assert_equals(follow.weights());
}

#[test]
fn a_read_error_is_returned_and_the_next_read_finds_the_version() {
    let root = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let storage = Arc::new(Local::with_sys(faulty.clone(), root.path()).unwrap());
    let mut model = Model::new(1, 8000);
    let publisher = small(Publisher::over(storage.clone()));
    publish(&publisher, &model).unwrap();
    let mut follow = Follow::over(storage.clone()).start(Weights::new()).unwrap();
    follow.advance(MINUTE).unwrap();
    model.update(2, 100);
    publish(&publisher, &model).unwrap();
    drop(publisher);
    faulty.fail(fault(Call::Pread, libc::EIO));
    assert_eq!(follow.advance(Duration::ZERO).unwrap_err().kind(), ErrorKind::Unavailable);
    assert_eq!(follow.advance(Duration::ZERO).unwrap(), Some(2));
    faulty.fail(fault(Call::Pread, libc::EIO));
    let start = || Publisher::over(storage.clone()).arena(4 << 20).build();
    assert_eq!(start().unwrap_err().kind(), ErrorKind::Unavailable);
    model.update(3, 100);
    let third = publish(&start().unwrap(), &model).unwrap();
    assert!(matches!(third.kind, Kind::Delta { base: 2, .. }), "{third:?}");
}

#[test]
fn after_an_unclear_publish_the_next_version_is_a_full() {
    let root = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let publisher = small(Publisher::over(Arc::new(Local::with_sys(faulty.clone(), root.path()).unwrap())));
    let mut model = Model::new(1, 8000);
    publish(&publisher, &model).unwrap();
    model.update(2, 100);
    unclear(&faulty);
    assert_eq!(publish(&publisher, &model).unwrap_err().kind(), ErrorKind::Indeterminate);
    // A power cut takes the name away.
    std::fs::remove_dir_all(root.path().join("v-00000002")).unwrap();
    model.update(3, 100);
    assert_eq!(publish(&publisher, &model).unwrap().kind, Kind::Full);
    assert!(Chain::open(root.path()).unwrap().holes().unwrap().is_empty());
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(3));
    model.assert_equals(follow.weights());
}

#[test]
fn nothing_is_removed_behind_a_full_that_a_crash_can_take() {
    let root = tempfile::tempdir().unwrap();
    let faulty = Faulty::unsynced(Arc::new(Linux));
    let storage = Arc::new(Local::with_sys(faulty.clone(), root.path()).unwrap());
    let mut model = Model::new(1, 8000);
    let publisher = small(Publisher::over(storage.clone()).grace(0));
    for number in 1..=4 {
        model.update(number, 100);
        publish(&publisher, &model).unwrap();
    }
    drop(publisher);
    let publisher = small(Publisher::over(storage).grace(0).begin_with_full());
    let acknowledged = model.clone();
    model.update(5, 100);
    unclear(&faulty);
    assert_eq!(publish(&publisher, &model).unwrap_err().kind(), ErrorKind::Indeterminate);
    assert_eq!(publisher.prune().unwrap(), Vec::<String>::new());
    std::fs::remove_dir_all(root.path().join("v-00000005")).unwrap();
    let mut follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
    assert_eq!(follow.advance(MINUTE).unwrap(), Some(4), "an acknowledged version can be built");
    acknowledged.assert_equals(follow.weights());
}

/// A storage that becomes another one, as a mounted directory does when its server starts again.
#[derive(Clone, Debug)]
struct Mounted(Arc<Mutex<Arc<dyn Storage>>>);

impl Mounted {
    fn now(&self) -> Arc<dyn Storage> {
        self.0.lock().unwrap().clone()
    }
}

impl Storage for Mounted {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        self.now().begin(name, attempt, overwrite)
    }
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.now().open(name)
    }
    fn list(&self) -> Result<Vec<String>> {
        self.now().list()
    }
    fn confirm(&self, name: &str) -> Result<()> {
        self.now().confirm(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.now().remove(name)
    }
    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.now().sweep(how)
    }
    fn hint(&self, name: &str) -> Result<()> {
        self.now().hint(name)
    }
    fn describe(&self, name: &str) -> PathBuf {
        self.now().describe(name)
    }
}

fn local(sys: Arc<dyn Sys>) -> Arc<dyn Storage> {
    Arc::new(Local::with_sys(sys, "/chain").unwrap())
}

/// A version becomes visible and not durable, a follower takes it, and the power fails. Whatever the disk
/// then has, the publisher starts again with other weights under the same numbers.
#[test]
fn a_follower_never_holds_a_state_that_was_not_published() {
    for confirm in [true, false] {
        let fs = SimFs::new();
        let faulty = Faulty::new(Arc::new(fs.clone()));
        let storage = local(faulty.clone());
        let publisher = small(Publisher::over(storage.clone()));
        let mut model = Model::new(1, 800);
        publish(&publisher, &model).unwrap();
        let first = model.clone();
        model.update(2, 20);
        unclear(&faulty);
        assert_eq!(publish(&publisher, &model).unwrap_err().kind(), ErrorKind::Indeterminate);
        drop(publisher);
        faulty.heal();

        // Followers of every disk are at the version that may be lost.
        let before = fs.position();
        let images: Vec<_> = {
            let mut probe = Follow::over(storage.clone()).confirm(confirm).start(Weights::new()).unwrap();
            assert_eq!(probe.advance(Duration::ZERO).unwrap(), Some(2));
            let history = fs.history();
            assert!(!confirm || history.len() > before, "the follower made it durable");
            history.crashes(history.len()..history.len() + 1, 7, 40).map(|crash| crash.image).collect()
        };
        assert!(!images.is_empty());
        let mut lost = 0;
        for image in images {
            let mounted = Mounted(Arc::new(Mutex::new(storage.clone())));
            let mut follow = Follow::over(Arc::new(mounted.clone())).confirm(confirm).start(Weights::new()).unwrap();
            follow.advance(Duration::ZERO).unwrap();
            model.assert_equals(follow.weights());
            let after = local(Arc::new(SimFs::boot(&image)));
            *mounted.0.lock().unwrap() = after.clone();
            let publisher = small(Publisher::over(after));
            let gone = publisher.newest() == Some(1);
            lost += u64::from(gone);
            let mut other = if gone { first.clone() } else { model.clone() };
            for number in 0..2 {
                other.update(100 + number, 20);
                publish(&publisher, &other).unwrap();
            }
            // With the same or with higher numbers: it must get to the newest, and hold nothing else.
            follow.advance(Duration::from_secs(5)).unwrap();
            other.assert_equals(follow.weights());
        }
        assert_eq!(lost == 0, confirm, "what a follower confirms is not lost; what it does not confirm can be");
    }
}

/// After every power cut during versions that are published one after the other: what was acknowledged can be
/// built, and a publisher goes on.
#[test]
fn acknowledged_versions_survive_every_power_cut() {
    let fs = SimFs::new();
    let publisher = small(Publisher::over(local(Arc::new(fs.clone()))).full_every(3).grace(1));
    let (mut model, mut acknowledged) = (Model::new(1, 800), Vec::new());
    for number in 1..=8 {
        model.update(number, 20);
        publish(&publisher, &model).unwrap();
        acknowledged.push((fs.position(), number, model.clone()));
    }
    drop(publisher);
    let history = fs.history();
    for crash in history.crashes(0..history.len() + 1, 3, 2) {
        let storage = local(Arc::new(SimFs::boot(&crash.image)));
        let mut follow = Follow::over(storage.clone()).start(Weights::new()).unwrap();
        let reached = follow.advance(Duration::ZERO).unwrap().unwrap_or(0);
        let promised = acknowledged.iter().filter(|(at, ..)| *at <= crash.position).map(|(_, number, _)| *number).max();
        assert!(reached >= promised.unwrap_or(0), "reached={reached} promised={promised:?} at={}", crash.position);
        if reached > 0 {
            acknowledged[reached as usize - 1].2.assert_equals(follow.weights());
        }
    }
}
