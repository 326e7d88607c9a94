//! Attempts of several ranks: claim, veto, sessions, and what a new session takes over.

use ashore::storage::local::{Linux, Local};
use ashore::storage::shared::{SessionRecord, Shared, SharedAttempt, SharedWriting, Vetoed};
use ashore::storage::{Storage, Sweep};
use ashore::testing::{Call, Effect, Fault, Faulty};
use ashore::{Attempt, ErrorKind};
use std::fs;
use std::path::Path;
use std::sync::Arc;

fn names(root: &Path) -> Vec<String> {
    let names = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name != ".ranks").collect();
    names.sort();
    names
}

fn record() -> SessionRecord {
    let session = uuid::Uuid::new_v4();
    SessionRecord { session, token: "run".into(), host: "h".into(), pid: 1, nonces: vec![session] }
}

/// A root, its storage, and a session in it.
struct Root {
    directory: tempfile::TempDir,
    faulty: Arc<Faulty>,
    storage: Local,
    shared: Arc<dyn Shared>,
    generation: u64,
}

impl Root {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let faulty = Faulty::new(Arc::new(Linux));
        let storage = Local::with_sys(faulty.clone(), directory.path()).unwrap();
        let shared = storage.shared().unwrap();
        let generation = shared.open_session(&record()).unwrap();
        Self { directory, faulty, storage, shared, generation }
    }

    fn attempt(&self, attempt: Attempt) -> SharedAttempt<'static> {
        SharedAttempt { name: "step-1", attempt, generation: self.generation }
    }

    /// An attempt of two ranks, each of which has written its files.
    fn written(&self, overwrite: bool) -> (Arc<dyn SharedWriting>, Arc<dyn SharedWriting>) {
        let attempt = self.attempt(Attempt::new());
        let first = self.shared.begin(attempt, overwrite).unwrap();
        let second = self.shared.join(attempt).unwrap();
        second.put("rank-1", b"one").unwrap();
        second.sync_names().unwrap();
        first.put("manifest.json", b"{}").unwrap();
        (first, second)
    }

    fn names(&self) -> Vec<String> {
        names(self.directory.path())
    }
}

#[test]
fn an_attempt_of_two_ranks_is_published_whole() {
    let root = Root::new();
    for overwrite in [false, true] {
        let (first, second) = root.written(overwrite);
        assert_eq!(second.publish(false).unwrap_err().kind(), ErrorKind::Internal, "only rank 0 publishes");
        first.claim().unwrap();
        first.publish(overwrite).unwrap();
        first.settle().unwrap();
        assert_eq!(root.names(), ["step-1"]);
        let mut files = root.storage.open("step-1").unwrap().list().unwrap();
        files.sort();
        assert_eq!(files, ["manifest.json", "rank-1"]);
    }
}

#[test]
fn a_veto_before_the_claim_forbids_the_publish() {
    let root = Root::new();
    let (first, second) = root.written(false);
    assert_eq!(second.veto().unwrap(), Vetoed::Done);
    let gone = first.claim().unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::Cancelled, "{gone}");
    assert_eq!(second.veto().unwrap(), Vetoed::TooLate, "the outcome of another's veto is not known here");
    first.abandon().unwrap();
    root.storage.sweep(Sweep::default()).unwrap();
    assert_eq!(root.names(), Vec::<String>::new());
}

/// The order decides: once rank 0 has claimed the attempt, no rank may report that it failed.
#[test]
fn a_veto_after_the_claim_or_the_publish_is_too_late() {
    let root = Root::new();
    let (first, second) = root.written(false);
    first.claim().unwrap();
    assert_eq!(second.veto().unwrap(), Vetoed::TooLate);
    first.publish(false).unwrap();
    assert_eq!(second.veto().unwrap(), Vetoed::TooLate);
    assert!(root.storage.open("step-1").is_ok());
    first.settle().unwrap();

    // The replaced step has the hidden name of the attempt that replaced it; a veto does not take it.
    let (first, second) = root.written(true);
    first.claim().unwrap();
    first.publish(true).unwrap();
    assert_eq!(second.veto().unwrap(), Vetoed::TooLate);
    first.settle().unwrap();
    assert_eq!(root.names(), ["step-1"]);
}

/// A rank reports "failed" after its veto: a power failure must not bring the attempt back.
#[test]
fn a_veto_is_durable_before_it_is_reported() {
    let root = Root::new();
    let (_first, second) = root.written(false);
    let before = root.faulty.log().len();
    second.veto().unwrap();
    let log = root.faulty.log();
    let calls: Vec<Call> = log[before..].iter().map(|logged| logged.call).collect();
    assert_eq!(calls, [Call::Rename, Call::Fsync]);

    let (_first, second) = root.written(false);
    root.faulty.fail(Fault { call: Some(Call::Fsync), after: 0, sticky: false, effect: Effect::Refused(libc::EIO) });
    assert_eq!(second.veto().unwrap_err().kind(), ErrorKind::Unavailable);
}

#[test]
fn names_are_durable_before_a_receipt_and_before_a_claim() {
    let root = Root::new();
    let attempt = root.attempt(Attempt::new());
    let first = root.shared.begin(attempt, false).unwrap();
    let second = root.shared.join(attempt).unwrap();
    second.put("rank-1", b"one").unwrap();
    let temp = root.directory.path().join(root.names().into_iter().find(|name| name.ends_with(".tmp")).unwrap());
    let synced = |from: usize| {
        let log = root.faulty.log();
        log[from..].iter().any(|logged| logged.call == Call::Fsync && logged.path == temp)
    };
    let before = root.faulty.log().len();
    second.sync_names().unwrap();
    assert!(synced(before), "the rank's own");
    first.put("manifest.json", b"{}").unwrap();
    let before = root.faulty.log().len();
    first.claim().unwrap();
    assert!(synced(before), "the manifest's");
    let unsealed = root.shared.begin(root.attempt(Attempt::new()), true).unwrap();
    let _file = unsealed.create("shard", 4096).unwrap();
    assert_eq!(unsealed.claim().unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn every_session_has_its_own_generation() {
    let root = Root::new();
    let open = || {
        let storage = Local::open(root.directory.path()).unwrap();
        std::thread::spawn(move || storage.shared().unwrap().open_session(&record()).unwrap())
    };
    let threads: Vec<_> = (0..8).map(|_| open()).collect();
    let mut generations: Vec<u64> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    generations.push(root.generation);
    generations.sort_unstable();
    assert_eq!(generations, (1..=9).collect::<Vec<u64>>());
    assert_eq!(root.shared.newest().unwrap().unwrap().0, 9);
    let last = record();
    assert_eq!(root.shared.open_session(&last).unwrap(), 10);
    assert_eq!(root.shared.newest().unwrap(), Some((10, Some(last))));
}

/// A session claims the root by its record: a power failure after that must not make an older one the newest.
#[test]
fn the_record_of_a_session_is_durable_before_it_counts() {
    let root = Root::new();
    let before = root.faulty.log().len();
    root.shared.open_session(&record()).unwrap();
    let log = root.faulty.log();
    let story: Vec<_> = log[before..]
        .iter()
        .filter(|logged| matches!(logged.call, Call::Pwrite | Call::Fsync | Call::Rename))
        .map(|logged| {
            let name = logged.path.file_name().unwrap().to_string_lossy();
            let kind = if name.ends_with(".new") { "aside" } else { &name };
            let kind = if logged.path == root.directory.path() { "root" } else { kind };
            format!("{:?} {kind}", logged.call).to_lowercase()
        })
        .collect();
    let expected =
        ["fsync root", "pwrite session.json", "fsync session.json", "fsync aside", "rename aside", "fsync .ranks"];
    assert_eq!(story, expected);
    let before = root.faulty.log().len();
    root.shared.take_over(2).unwrap();
    let log = root.faulty.log();
    assert!(log[before..].iter().any(|logged| logged.call == Call::Fsync && logged.path == root.directory.path()));
}

/// A process of the old session that goes on later publishes nothing, whether it had claimed or not.
#[test]
fn a_new_session_renames_the_attempts_of_older_ones_away() {
    let root = Root::new();
    let (open, _) = root.written(false);
    let (claimed, _) = root.written(false);
    claimed.claim().unwrap();
    let alone = root.storage.begin("step-9", Attempt::new(), false).unwrap();
    let generation = root.shared.open_session(&record()).unwrap();
    let own = root.shared.begin(SharedAttempt { generation, ..root.attempt(Attempt::new()) }, false).unwrap();
    root.shared.take_over(generation).unwrap();
    assert_eq!(open.claim().unwrap_err().kind(), ErrorKind::Cancelled);
    assert_eq!(claimed.publish(false).unwrap_err().kind(), ErrorKind::Indeterminate);
    assert!(root.storage.open("step-1").is_err());
    for mine in [&*own as &dyn ashore::storage::Writing, &*alone] {
        mine.put("manifest.json", b"{}").unwrap();
    }
    own.claim().unwrap();
    own.publish(false).unwrap();
    alone.publish(false).unwrap();
    own.settle().unwrap();
    alone.settle().unwrap();
    drop((open, claimed));
    root.storage.sweep(Sweep::default()).unwrap();
    assert_eq!(root.names(), ["step-1", "step-9"]);
}

/// What a rank 0 that died between claim and publish left is swept on its host as any attempt is.
#[test]
fn a_claimed_attempt_of_a_dead_owner_is_swept() {
    let root = Root::new();
    let (first, _) = root.written(false);
    first.claim().unwrap();
    let swept = root.storage.sweep(Sweep::default()).unwrap();
    assert_eq!((swept.removed.len(), swept.left.len()), (0, 1), "its owner is alive: {swept:?}");
    drop(first);
    let swept = root.storage.sweep(Sweep::default()).unwrap();
    assert!(swept.removed[0].name.ends_with(".claimed"), "{swept:?}");
    assert_eq!(root.names(), Vec::<String>::new());
}

#[test]
fn notes_are_whole_bounded_and_of_their_session() {
    let root = Root::new();
    let note = |name| root.shared.note(root.generation, name, 4);
    assert_eq!(note("a").unwrap(), None);
    root.shared.put_note(root.generation, "a", b"long").unwrap();
    root.shared.put_note(root.generation, "a", b"new").unwrap();
    assert_eq!(note("a").unwrap().unwrap(), b"new");
    root.shared.put_note(root.generation, "b", b"too long").unwrap();
    assert_eq!(note("b").unwrap_err().kind(), ErrorKind::Corrupt);
    root.shared.delete_note(root.generation, "a").unwrap();
    root.shared.delete_note(root.generation, "a").unwrap();
    assert_eq!(note("a").unwrap(), None);
    assert_eq!(note("../a").unwrap_err().kind(), ErrorKind::Invalid);
    let next = root.shared.open_session(&record()).unwrap();
    assert_eq!(root.shared.note(next, "b", 100).unwrap(), None);
    root.shared.take_over(next).unwrap();
    let gone = root.shared.put_note(root.generation, "c", b"late").unwrap_err();
    assert_eq!(gone.kind(), ErrorKind::NotFound, "{gone}");
}
