//! Whatever a store answers, or does not, what a commit is told is true.

use super::{LONG, NAME, URL, begun, faulty, published};
use crate::faulty::{Fault, Faulty};
use ashore::storage::{ObjectStore, Storage};
use ashore::testing::AlignedBuffer;
use ashore::{Attempt, ErrorKind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

const FOREVER: usize = 10_000;

/// A storage that gives up soon.
fn hasty(store: &Arc<Faulty>) -> ObjectStore {
    ObjectStore::over(store.clone(), URL).unwrap().patience(Duration::from_millis(300))
}

/// Publishes a new attempt while the store does `faults`; returns the attempt and the outcome.
fn commit(storage: &ObjectStore, store: &Faulty, faults: &[Fault]) -> (Attempt, Result<(), ErrorKind>) {
    let (attempt, writing) = begun(storage, NAME, true);
    store.script(faults.iter().copied());
    let ended = writing.publish(true).map_err(|error| error.kind());
    store.script([]);
    (attempt, ended)
}

#[test]
fn a_commit_that_landed_is_durable_whatever_its_answer_says() {
    for fault in [Fault::LoseAnswer, Fault::DoneAndRefused] {
        let store = faulty();
        let (attempt, ended) = commit(&hasty(&store), &store, &[fault]);
        assert_eq!(ended, Ok(()), "{fault:?}");
        assert_eq!(published(&store, NAME), Some(attempt));
    }
}

#[test]
fn a_refusal_of_a_root_that_nobody_changed_is_asked_again() {
    for fault in [Fault::FalselyRefused, Fault::FalselyThere, Fault::Unavailable] {
        let store = faulty();
        let (attempt, ended) = commit(&hasty(&store), &store, &[fault, fault]);
        assert_eq!(ended, Ok(()), "{fault:?}");
        assert_eq!(published(&store, NAME), Some(attempt));
    }
}

#[test]
fn a_commit_that_arrives_late_is_durable_or_has_failed_for_ever() {
    for after in [1, 20, 100, 280, 310, 600, 900] {
        let store = faulty();
        let late = Fault::Late(Duration::from_millis(after));
        let (attempt, ended) = commit(&hasty(&store), &store, &[late; FOREVER]);
        store.settle();
        let there = published(&store, NAME) == Some(attempt);
        match ended {
            Ok(()) => assert!(there, "told durable, after {after} ms"),
            Err(ErrorKind::Indeterminate) => {}
            Err(kind) => assert!(!there, "told {kind:?} and there, after {after} ms"),
        }
    }
}

#[test]
fn a_store_that_never_takes_a_change_leaves_a_commit_unknown_at_its_deadline() {
    for fault in [Fault::Unavailable, Fault::Silent] {
        let store = faulty();
        let (_, ended) = commit(&hasty(&store), &store, &[fault; FOREVER]);
        assert_eq!(ended, Err(ErrorKind::Indeterminate), "{fault:?}");
    }
}

#[test]
fn a_save_whose_deadline_has_passed_sends_no_commit() {
    let store = faulty();
    let (_, writing) = begun(&hasty(&store), NAME, false);
    let sent = store.contents.lock().unwrap().len();
    writing.expires(std::time::Instant::now());
    assert_eq!(writing.publish(false).unwrap_err().kind(), ErrorKind::Deadline);
    assert_eq!(store.contents.lock().unwrap().len(), sent);
}

#[test]
fn a_commit_that_may_not_be_made_has_failed_for_certain() {
    let store = faulty();
    let (attempt, ended) = commit(&hasty(&store), &store, &[Fault::Forbidden; FOREVER]);
    assert_eq!(ended, Err(ErrorKind::Invalid));
    assert_ne!(published(&store, NAME), Some(attempt));
}

/// Every request of the commit is on its way when its deadline passes, and the store takes other changes: the
/// root is changed before they arrive.
#[test]
fn a_commit_that_is_given_up_never_lands() {
    let store = faulty();
    let storage = ObjectStore::over(store.clone(), URL).unwrap().patience(Duration::from_secs(1));
    let (attempt, writing) = begun(&storage, NAME, true);
    *store.late_for.lock().unwrap() = Some((attempt.to_string(), Duration::from_secs(6)));
    let error = writing.publish(true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "failed for certain: {error:#}");
    assert!(store.late.load(Ordering::SeqCst) > 0, "and the requests are still on their way");
    store.settle();
    assert_eq!(published(&store, NAME), None);
}

#[test]
fn a_root_that_cannot_be_read_back_leaves_a_commit_unknown() {
    let store = faulty();
    let storage = hasty(&store);
    let (attempt, writing) = begun(&storage, NAME, true);
    store.script([Fault::LoseAnswer]);
    store.blind.store(true, Ordering::SeqCst);
    let error = writing.publish(true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Indeterminate, "{error:#}");
    store.blind.store(false, Ordering::SeqCst);
    assert_eq!(writing.abandon().unwrap_err().kind(), ErrorKind::Indeterminate, "what may be a step is left alone");
    drop(writing);
    storage.sweep(Default::default()).unwrap();
    assert_eq!(published(&store, NAME), Some(attempt), "and it was one");
}

#[test]
fn a_commit_that_landed_before_more_changes_than_the_root_remembers_is_durable() {
    let store = faulty();
    let (attempt, writing) = begun(&super::over(&store), NAME, true);
    store.script([Fault::LoseAnswer]);
    store.blind.store(true, Ordering::SeqCst);
    let publishing = std::thread::spawn(move || {
        let ended = writing.publish(true).map_err(|error| error.kind());
        (ended, writing)
    });
    let other = ObjectStore::over(store.plain().clone(), URL).unwrap();
    while other.open(NAME).is_err() {
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..40 {
        other.write_marks(b"{}").unwrap();
    }
    store.blind.store(false, Ordering::SeqCst);
    let (ended, writing) = publishing.join().unwrap();
    assert_eq!(ended, Ok(()));
    writing.settle().unwrap();
    assert_eq!(published(&store, NAME), Some(attempt));
}

#[test]
fn a_removal_that_landed_before_more_changes_than_the_root_remembers_has_removed_the_step() {
    let store = faulty();
    let storage = super::over(&store);
    let (_, writing) = begun(&storage, NAME, true);
    writing.publish(true).unwrap();
    writing.settle().unwrap();
    store.script([Fault::LoseAnswer]);
    store.blind.store(true, Ordering::SeqCst);
    let removing = std::thread::spawn(move || storage.remove(NAME));
    let other = ObjectStore::over(store.plain().clone(), URL).unwrap();
    while other.open(NAME).is_ok() {
        std::thread::sleep(Duration::from_millis(5));
    }
    for _ in 0..40 {
        other.write_marks(b"{}").unwrap();
    }
    store.blind.store(false, Ordering::SeqCst);
    removing.join().unwrap().unwrap();
    assert_eq!(published(&store, NAME), None);
    assert_eq!(store.keys(), ["runs/a/ashore.json"], "its objects are deleted, too");
}

#[test]
fn an_attempt_that_the_root_names_is_not_deleted_whatever_its_publish_was_told() {
    let store = faulty();
    let storage = hasty(&store);
    let (attempt, writing) = begun(&storage, NAME, true);
    store.script([Fault::LateAndForbidden(Duration::from_millis(100))]);
    assert_eq!(writing.publish(true).unwrap_err().kind(), ErrorKind::Invalid);
    store.settle();
    assert_eq!(writing.abandon().unwrap_err().kind(), ErrorKind::Indeterminate);
    drop(writing);
    storage.sweep(Default::default()).unwrap();
    assert_eq!(published(&store, NAME), Some(attempt));
}

#[test]
fn a_commit_that_others_pass_by_is_made_anew_on_what_they_have_made() {
    let store = faulty();
    let storage = hasty(&store);
    let (attempt, writing) = begun(&storage, "step-1", false);
    let (other, pruner) = begun(&storage, "step-2", false);
    pruner.publish(false).unwrap();
    // Another process prunes, so that what this one knows of the root is old.
    super::over(&store).remove("step-2").unwrap();
    writing.publish(false).unwrap();
    assert_eq!(published(&store, "step-1"), Some(attempt));
    assert_ne!(published(&store, "step-2"), Some(other));
}

#[test]
fn the_root_object_never_has_the_same_content_twice() {
    let store = faulty();
    let storage = hasty(&store);
    let (attempt, writing) = begun(&storage, NAME, false);
    writing.publish(false).unwrap();
    writing.settle().unwrap();
    for _ in 0..3 {
        storage.remove(NAME).unwrap();
        let writing = storage.begin(NAME, attempt, false).unwrap();
        writing.put("manifest.json", attempt.to_string().as_bytes()).unwrap();
        writing.publish(false).unwrap();
        writing.settle().unwrap();
    }
    let mut contents = store.contents.lock().unwrap().clone();
    let all = contents.len();
    contents.sort();
    contents.dedup();
    assert_eq!((contents.len(), all), (8, 8));
}

/// Four writers of one step in one session, and a store that does its worst: exactly one wins at each number,
/// and what every writer is told is true.
#[test]
fn of_writers_of_one_step_exactly_one_wins_and_each_loser_knows() {
    let mut seed = 7_u64;
    let mut random = move |below: u64| {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed % below
    };
    for round in 0..60 {
        let store = faulty();
        let storage = hasty(&store);
        let name = format!("step-{round}");
        let attempts: Vec<_> = (0..4).map(|_| begun(&storage, &name, false)).collect();
        store.script((0..12).map(|_| match random(8) {
            0 => Fault::LoseAnswer,
            1 => Fault::DoneAndRefused,
            2 => Fault::FalselyRefused,
            3 => Fault::FalselyThere,
            4 => Fault::Unavailable,
            5 => Fault::Late(Duration::from_millis(random(60))),
            _ => Fault::None,
        }));
        let ended: Vec<_> = std::thread::scope(|scope| {
            let publish = |(attempt, writing)| scope.spawn(move || (attempt, publish(writing)));
            let threads: Vec<_> = attempts.iter().map(|(attempt, writing)| publish((*attempt, writing))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        store.settle();
        let there = published(&store, &name);
        for (attempt, ended) in ended {
            let won = there == Some(attempt);
            match ended {
                Ok(()) => assert!(won, "round {round}: told durable, and it is not there"),
                Err(ErrorKind::Indeterminate) => {}
                Err(kind) => assert!(!won, "round {round}: told {kind:?}, and it is there"),
            }
        }
        assert!(there.is_some(), "round {round}: no writer won");
    }
}

fn publish(writing: &Arc<dyn ashore::storage::Writing>) -> Result<(), ErrorKind> {
    writing.publish(false).map_err(|error| error.kind())
}

/// The same attempt of the same session has the same prefix: the second put its objects over those of the
/// step, and its failure deleted them.
#[test]
fn an_attempt_that_is_the_step_is_not_begun_again() {
    let store = faulty();
    let storage = hasty(&store);
    let (attempt, writing) = begun(&storage, NAME, false);
    writing.publish(false).unwrap();
    writing.settle().unwrap();
    let error = storage.begin(NAME, attempt, true).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict, "{error}");
    assert!(error.message().contains("give another attempt"), "{error}");
    assert_eq!(published(&store, NAME), Some(attempt));
}

/// A writer that got an error of a file waited for itself, with the lock of the file: the threads of all
/// later chunks of the file hung behind it.
#[test]
fn an_error_of_a_file_reaches_every_writer_of_it() {
    let store = faulty();
    let writing = hasty(&store).begin(NAME, Attempt::new(), false).unwrap();
    let file = writing.create("shard.safetensors", 8192).unwrap();
    let (send, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        for _ in 0..3 {
            // From the second on, the bytes are there already.
            send.send(file.write_at(0, &AlignedBuffer::new(4096)).map_err(|error| error.kind())).unwrap();
        }
    });
    let ended: Vec<_> = (0..3).map(|_| ended.recv_timeout(LONG).expect("a writer hangs")).collect();
    assert!(ended[0].is_ok() && ended[1].is_err() && ended[2].is_err(), "{ended:?}");
}
