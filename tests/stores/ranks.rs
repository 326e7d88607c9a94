//! Several ranks in one process save together on one store.

use super::board::Board;
use super::{LONG, NAME, faulty, over, published, state};
use crate::faulty::Faulty;
use ashore::{Catalog, CheckpointExecutor, ErrorKind, Outcome, Result};
use std::sync::Arc;

fn meet(store: &Arc<Faulty>, world: u32) -> Vec<CheckpointExecutor> {
    let board = Board::new();
    let build = |rank: u32| {
        let builder = CheckpointExecutor::builder("unused").arena(4 << 20).chunk(1 << 20).save_timeout(LONG);
        let builder = builder.storage(over(store)).ranks(board.rank(rank, world)).run("test");
        std::thread::spawn(move || builder.build())
    };
    let threads: Vec<_> = (0..world).map(build).collect();
    threads.into_iter().map(|thread| thread.join().unwrap().unwrap()).collect()
}

fn save(ranks: &[CheckpointExecutor], step: u64) -> Vec<Result<Outcome>> {
    std::thread::scope(|scope| {
        let one = |(rank, executor): (usize, &CheckpointExecutor)| {
            executor.save(step, state(&format!("rank.{rank}"), step, 1000 + rank))?.wait(LONG)
        };
        let threads: Vec<_> = ranks.iter().enumerate().map(|rank| scope.spawn(move || one(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn four_ranks_save_one_step_together_and_another_number_of_ranks_goes_on() {
    let store = faulty();
    let ranks = meet(&store, 4);
    for step in 1..=3 {
        save(&ranks, step).into_iter().for_each(|ended| drop(ended.unwrap()));
    }
    drop(ranks);
    let checkpoint = Catalog::over(over(&store)).latest_valid().unwrap().unwrap().checkpoint;
    assert_eq!((checkpoint.step(), checkpoint.world()), (3, 4));
    for rank in 0..4 {
        let read = checkpoint.read_as::<u32>(&format!("rank.{rank}")).unwrap();
        assert_eq!(read, vec![3; 1000 + rank]);
    }
    let fewer = meet(&store, 2);
    save(&fewer, 4).into_iter().for_each(|ended| drop(ended.unwrap()));
    assert_eq!(Catalog::over(over(&store)).latest().unwrap().unwrap().world(), 2);
}

#[test]
fn ranks_of_an_older_session_publish_nothing() {
    let store = faulty();
    let old = meet(&store, 2);
    save(&old, 1).into_iter().for_each(|ended| drop(ended.unwrap()));
    let new = meet(&store, 2);
    for ended in save(&old, 2) {
        let error = ended.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Conflict | ErrorKind::Cancelled), "{error:#}");
    }
    save(&new, 2).into_iter().for_each(|ended| drop(ended.unwrap()));
    let steps: Vec<_> = Catalog::over(over(&store)).list().unwrap().iter().map(|entry| entry.step).collect();
    assert_eq!(steps, [1, 2]);
}

/// Rank 1 has promised its files and hears nothing more; rank 0 is only slow.
#[test]
fn a_vetoed_attempt_is_never_published_and_a_veto_after_the_publish_is_too_late() {
    use ashore::storage::Storage;
    use ashore::storage::shared::{SessionRecord, SharedAttempt, Vetoed};
    let store = faulty();
    let (zero, one) = (over(&store).shared().unwrap(), over(&store).shared().unwrap());
    let session = uuid::Uuid::new_v4();
    let record = SessionRecord { session, token: "run".into(), host: "a".into(), pid: 1, nonces: vec![session] };
    let generation = zero.open_session(&record).unwrap();
    let newest = one.newest().unwrap().unwrap();
    assert_eq!((newest.0, newest.1.unwrap()), (generation, record));
    for late in [false, true] {
        let attempt = ashore::Attempt::new();
        let shared = SharedAttempt { name: NAME, attempt, generation };
        let leading = zero.begin(shared, false).unwrap();
        let joined = one.join(shared).unwrap();
        joined.put("part", b"of rank 1").unwrap();
        joined.sync_names().unwrap();
        leading.put("manifest.json", attempt.to_string().as_bytes()).unwrap();
        leading.claim().unwrap();
        if late {
            leading.publish(false).unwrap();
            assert_eq!(joined.veto().unwrap(), Vetoed::TooLate);
            assert_eq!(published(&store, NAME), Some(attempt));
        } else {
            assert_eq!(joined.veto().unwrap(), Vetoed::Done);
            assert_eq!(leading.publish(false).unwrap_err().kind(), ErrorKind::Cancelled);
            assert_eq!(published(&store, NAME), None);
            leading.abandon().unwrap();
        }
    }
}

#[test]
fn notes_are_whole_and_go_with_their_session() {
    use ashore::storage::Storage;
    use ashore::storage::shared::SessionRecord;
    let store = faulty();
    let shared = over(&store).shared().unwrap();
    let open = || {
        let session = uuid::Uuid::new_v4();
        let record = SessionRecord { session, token: String::new(), host: "a".into(), pid: 1, nonces: vec![] };
        let generation = shared.open_session(&record).unwrap();
        shared.take_over(generation).unwrap();
        generation
    };
    let first = open();
    assert_eq!(shared.note(first, "n", 100).unwrap(), None);
    shared.put_note(first, "n", b"bytes").unwrap();
    assert_eq!(shared.note(first, "n", 100).unwrap().unwrap(), b"bytes");
    assert_eq!(shared.note(first, "n", 4).unwrap_err().kind(), ErrorKind::Corrupt);
    shared.delete_note(first, "n").unwrap();
    shared.delete_note(first, "n").unwrap();
    assert_eq!(shared.note(first, "n", 100).unwrap(), None);
    shared.put_note(first, "n", b"bytes").unwrap();
    let second = open();
    assert_eq!((second, shared.note(first, "n", 100).unwrap()), (first + 1, None));
    assert_eq!(shared.put_note(second, "../n", b"").unwrap_err().kind(), ErrorKind::Invalid);
}
