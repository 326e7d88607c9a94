//! What only ranks in a shared directory meet: what others left there, tokens, and dead processes.

use super::{hello, member, session, within};
use ashore::ranks::{Coordinator, Hello, Member, Phase, Round, Session, SharedDirectory};
use ashore::{Error, ErrorKind, Result};
use std::fs;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

fn ok(_: u32, _: &[u8]) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn join(root: &Path, rank: u32, world: u32) -> SharedDirectory {
    SharedDirectory::new(root, member(rank, world)).unwrap()
}

fn meet(ranks: &SharedDirectory, millis: u64) -> Result<Session> {
    ranks.meet(&hello(ranks.member(), "run"), &mut |_| Ok(session()), within(millis))
}

/// Two ranks that have met.
fn pair(root: &Path) -> ([SharedDirectory; 2], Session) {
    let ranks = [join(root, 0, 2), join(root, 1, 2)];
    let sessions = thread::scope(|scope| {
        let threads = ranks.each_ref().map(|ranks| scope.spawn(move || meet(ranks, 20_000).unwrap()));
        threads.map(|thread| thread.join().unwrap())
    });
    assert_eq!(sessions[0], sessions[1]);
    (ranks, sessions[0])
}

fn files(root: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root.join(".ranks")).unwrap().map(|entry| entry.unwrap());
    let folders = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix));
    folders.flat_map(|folder| fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().path())).collect()
}

fn at(session: Session, save: u64) -> Round {
    Round { session: session.id, save, phase: Phase::Receipt }
}

#[test]
fn a_run_without_a_token_is_refused_with_what_to_set() {
    let root = tempfile::tempdir().unwrap();
    for token in ["", "none"] {
        let ranks = join(root.path(), 0, 1);
        let error = ranks.meet(&hello(member(0, 1), token), &mut |_| Ok(session()), within(100)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains("--rdzv-id") && error.to_string().contains(".run(name)"), "{error}");
    }
    let too_many = SharedDirectory::new(root.path(), Member { rank: 2, world: 2, local_rank: 0 });
    assert_eq!(too_many.unwrap_err().kind(), ErrorKind::Invalid);
    let long = "x".repeat(10_000);
    let error = join(root.path(), 0, 1).meet(&hello(member(0, 1), &long), &mut |_| Ok(session()), within(100));
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Invalid);
}

#[test]
fn a_meeting_in_an_object_store_is_refused_with_what_to_use() {
    let error = SharedDirectory::new("s3://bucket/run", member(0, 2)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    let text = error.to_string();
    for word in ["s3://bucket/run", "need not be the root", "Etcd", "Mpi", "Callback"] {
        assert!(text.contains(word), "{word}: {text}");
    }
}

#[test]
fn a_rank_that_ended_is_noticed_long_before_the_deadline() {
    let root = tempfile::tempdir().unwrap();
    let ([zero, one], session) = pair(root.path());
    let start = Instant::now();
    // Its locks are released, and its files stay, as when it is killed.
    drop(one);
    let error = zero.gather(at(session, 0), b"", &mut ok, within(60_000)).unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Unavailable, &[1][..]));
    assert!(error.to_string().contains("host=host-1 pid=1"), "{error}");
    assert!(start.elapsed() < Duration::from_secs(10));
    let ([zero, one], session) = pair(root.path());
    drop(zero);
    let error = one.tell(at(session, 0), None, within(60_000)).unwrap_err();
    assert_eq!((error.kind(), error.ranks()), (ErrorKind::Unavailable, &[0][..]));
}

/// A rank that dies after its receipt does not fail the save.
#[test]
fn the_message_of_a_rank_that_has_ended_counts() {
    let root = tempfile::tempdir().unwrap();
    let ([zero, one], session) = pair(root.path());
    one.gather(at(session, 0), b"receipt", &mut ok, within(5000)).unwrap();
    one.leave();
    drop(one);
    let mut seen = Vec::new();
    let each = &mut |rank: u32, message: &[u8]| {
        seen.push((rank, message.to_vec()));
        ControlFlow::Continue(())
    };
    zero.gather(at(session, 0), b"mine", each, within(5000)).unwrap();
    assert_eq!(seen, [(0, b"mine".to_vec()), (1, b"receipt".to_vec())]);
}

#[test]
fn a_session_keeps_few_files() {
    let root = tempfile::tempdir().unwrap();
    let mut most = 0;
    for _ in 0..3 {
        let (ranks, session) = pair(root.path());
        thread::scope(|scope| {
            let [zero, one] = &ranks;
            scope.spawn(move || {
                for save in 0..30 {
                    one.gather(at(session, save), b"m", &mut ok, within(20_000)).unwrap();
                    one.tell(at(session, save), None, within(20_000)).unwrap();
                }
            });
            for save in 0..30 {
                zero.gather(at(session, save), b"m", &mut ok, within(20_000)).unwrap();
                zero.tell(at(session, save), Some(b"go"), within(20_000)).unwrap();
                most = most.max(files(root.path(), "messages-").len() + files(root.path(), "meeting-").len());
            }
        });
    }
    assert!((1..=12).contains(&most), "files of two saves, and of one meeting: {most}");
}

/// A job that was killed leaves its call, greetings and verdict under the token of the next one.
#[test]
fn what_a_dead_job_left_under_the_same_token_is_no_answer() {
    let root = tempfile::tempdir().unwrap();
    let (old, first) = pair(root.path());
    drop(old);
    // The new rank 1 comes first, and finds the old verdict.
    let one = join(root.path(), 1, 2);
    thread::scope(|scope| {
        let joined = scope.spawn(|| meet(&one, 20_000).unwrap());
        thread::sleep(Duration::from_millis(200));
        let second = meet(&join(root.path(), 0, 2), 20_000).unwrap();
        assert_ne!(first.id, second.id);
        assert_eq!(joined.join().unwrap(), second);
    });
}

/// Elastic jobs come back with another number of ranks.
#[test]
fn a_dead_job_of_another_size_is_no_reason_to_refuse() {
    let root = tempfile::tempdir().unwrap();
    drop(pair(root.path()));
    meet(&join(root.path(), 0, 1), 5000).unwrap();
    drop(pair(root.path()));
    let three: Vec<_> = (0..3).map(|rank| join(root.path(), rank, 3)).collect();
    thread::scope(|scope| {
        for ranks in three.iter().rev() {
            scope.spawn(move || meet(ranks, 20_000).unwrap());
        }
    });
}

#[test]
fn a_second_process_of_a_rank_that_comes_late_is_refused_at_once() {
    let root = tempfile::tempdir().unwrap();
    let (_ranks, _) = pair(root.path());
    let named = |error: Error, rank: u32| {
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
        assert!(error.to_string().matches("host=").count() == 2, "{error}");
        assert!(error.ranks().contains(&rank), "{error}");
    };
    let meet = |rank, world| {
        let other = Hello { pid: 99, ..hello(member(rank, world), "run") };
        join(root.path(), rank, world).meet(&other, &mut |_| Ok(session()), within(60_000))
    };
    named(meet(1, 2).unwrap_err(), 1);
    named(meet(2, 3).unwrap_err(), 2);
}

#[test]
fn a_directory_of_ones_own_is_named_as_a_reason() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let zero = meet(&join(one.path(), 0, 2), 100).unwrap_err();
    let other = meet(&join(two.path(), 1, 2), 100).unwrap_err();
    for (error, missing) in [(zero, 1), (other, 0)] {
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Deadline, &[missing][..]));
        assert!(error.to_string().contains("see another directory"), "{error}");
    }
}

#[test]
fn hostile_files_are_no_messages() {
    let root = tempfile::tempdir().unwrap();
    let ([zero, one], session) = pair(root.path());
    one.gather(at(session, 5), b"save 5", &mut ok, within(5000)).unwrap();
    let folder = root.path().join(".ranks").join(format!("messages-{}", session.id));
    let real = fs::read(folder.join("5-receipt-1")).unwrap();
    let name = |save: u64| folder.join(format!("{save}-receipt-1"));
    let cases: [&dyn Fn(&Path); 6] = [
        &|path| fs::write(path, b"").unwrap(),
        &|path| fs::write(path, vec![0xff; 1 << 20]).unwrap(),
        &|path| fs::write(path, &real).unwrap(),
        &|path| fs::create_dir(path).unwrap(),
        &|path| std::os::unix::fs::symlink(folder.join("5-receipt-1"), path).unwrap(),
        &|path| assert!(std::process::Command::new("mkfifo").arg(path).status().unwrap().success()),
    ];
    for (save, make) in (10..).zip(cases) {
        make(&name(save));
        for hostile in ["1", "4294967295", "-1", "x"] {
            fs::write(folder.join(format!("{save}-agree-{hostile}")), b"x").unwrap();
        }
        fs::write(folder.join("agree-"), b"x").unwrap();
        let error = zero.gather(at(session, save), b"", &mut ok, within(80)).unwrap_err();
        assert_eq!((error.kind(), error.ranks()), (ErrorKind::Deadline, &[1][..]), "save={save}");
    }
}
