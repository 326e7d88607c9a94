//! Uploads from slabs and reads into place, against a store in memory and a server that misbehaves.

use super::ObjectStore;
use super::client::{Client, Store};
use super::file::{Counted, ObjectFile};
use super::parts::Limits;
use super::peer::{Answer, Asked, Peer};
use super::reading::{ObjectReading, WhyMissing};
use crate::completion::Signal;
use crate::device::Host;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::CheckpointExecutor;
use crate::memory::{ALIGNMENT, Arena, Slab};
use crate::state::StateDict;
use crate::storage::{FileReading, FileWriting, Storage, Writers};
use crate::sync::{Mutex, lock};
use object_store::memory::InMemory;
use object_store::path::Path as Key;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(20);
const PAGE: usize = ALIGNMENT;

/// Records the calls that an attempt would receive.
#[derive(Default)]
struct Heard {
    sealed: AtomicUsize,
    lost: AtomicUsize,
    writers: Option<Writers>,
    expires: Option<Instant>,
}

impl Counted for Heard {
    fn sealed(&self) {
        self.sealed.fetch_add(1, Ordering::AcqRel);
    }
    fn lost(&self) {
        self.lost.fetch_add(1, Ordering::AcqRel);
    }
    fn writers(&self) -> Option<Writers> {
        self.writers
    }
    fn expires(&self) -> Option<Instant> {
        self.expires
    }
}

/// The slabs of a test.
struct Slabs {
    arena: Arena,
    home: Arc<Signal>,
    all: usize,
}

impl Slabs {
    fn new(count: usize, slab: usize) -> Self {
        let home = Arc::new(Signal::default());
        let arena = Arena::quietly((count * slab) as u64, slab as u64, &Host, home.clone()).unwrap();
        Self { arena, home, all: count }
    }

    /// Writes `bytes` into `file` from slabs, in order, with `writers` threads.
    fn write(&self, file: &ObjectFile, bytes: &[u8], writers: usize) -> Result<()> {
        let slab = (self.arena.report().bytes as usize) / self.all;
        let chunks = Mutex::new(bytes.chunks(slab).enumerate());
        let failed = Mutex::new(None);
        thread::scope(|scope| {
            for _ in 0..writers {
                scope.spawn(|| {
                    loop {
                        // The lock is held while a slab is waited for, so that chunks get slabs in order.
                        let mut next = lock(&chunks);
                        let Some((index, chunk)) = next.next().filter(|_| lock(&failed).is_none()) else { return };
                        let late = Instant::now() + Duration::from_secs(60);
                        let mut lease = self.home.wait_until(late, || self.arena.try_lease()).expect("a slab in time");
                        drop(next);
                        lease.bytes_mut()[..chunk.len()].copy_from_slice(chunk);
                        let len = chunk.len().next_multiple_of(PAGE);
                        let slab = Slab::new(lease, len).unwrap();
                        if let Err(error) = file.write_slab((index * self.slab()) as u64, slab) {
                            lock(&failed).get_or_insert(error);
                        }
                    }
                });
            }
        });
        failed.into_inner().unwrap().map_or(Ok(()), Err)
    }

    fn slab(&self) -> usize {
        (self.arena.report().bytes as usize) / self.all
    }

    /// Waits until every slab is in the arena.
    #[track_caller]
    fn return_all(&self, within: Duration) {
        let late = Instant::now() + within;
        let all = || (self.arena.free() == self.all).then_some(());
        assert!(self.home.wait_until(late, all).is_some(), "slabs are missing: {:?}", self.arena);
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| ((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect()
}

fn in_memory() -> (Arc<InMemory>, Client) {
    let store = Arc::new(InMemory::new());
    let shared: Arc<dyn Store> = store.clone();
    (store, Client::new(shared, Key::default(), "memory://").with_patience(PATIENCE))
}

fn whole(client: &Client, key: &str) -> Vec<u8> {
    client.get("look", key, 1 << 30, client.deadline()).unwrap().expect("an object").0.to_vec()
}

fn why() -> WhyMissing {
    Arc::new(|key| Error::corrupt("a file is missing").with_path(key))
}

#[track_caller]
fn read(client: &Client, key: &str, offset: u64, len: usize) -> Result<Vec<u8>> {
    let file = ObjectReading::open(client, key.into(), why()).unwrap().expect("a file");
    let mut bytes = vec![0; len];
    file.read_at(offset, &mut bytes).map(|()| bytes)
}

const SMALL: Limits = Limits { least: 3 * PAGE as u64, unit: PAGE as u64, count: 10_000, most: 1 << 30 };

#[test]
fn files_longer_than_the_arena_arrive_whole_and_their_records_go() {
    let (_, client) = in_memory();
    let part = 3 * PAGE;
    for slab in [PAGE, 2 * PAGE, 3 * PAGE, 8 * PAGE] {
        let slabs = Slabs::new(12, slab);
        for len in [0, 1, part - 1, part, part + 1, 2 * part, 40 * part + 17] {
            let (key, heard) = (format!("attempt/{slab}-{len}"), Arc::new(Heard::default()));
            let file = ObjectFile::within(SMALL, &client, key.clone(), len as u64, heard.clone()).unwrap();
            let bytes = pattern(len);
            slabs.write(&file, &bytes, 3).unwrap();
            file.seal().unwrap();
            assert_eq!(file.seal().unwrap_err().kind(), ErrorKind::Invalid, "a second seal");
            assert!(whole(&client, &key) == bytes, "slab={slab} len={len}");
            assert_eq!((heard.sealed.load(Ordering::Acquire), heard.lost.load(Ordering::Acquire)), (1, 1));
            assert!(
                client.get("look", &format!("attempt/uploads/{slab}-{len}"), 99, client.deadline()).unwrap().is_none()
            );
        }
        slabs.return_all(Duration::from_secs(1));
    }
}

#[test]
fn a_file_of_ten_thousand_parts_arrives_whole() {
    let (_, client) = in_memory();
    let (slabs, bytes) = (Slabs::new(8, 5 * PAGE), pattern(10_000 * PAGE - 5));
    let limits = Limits { least: PAGE as u64, ..SMALL };
    let file =
        ObjectFile::within(limits, &client, "a/f".into(), bytes.len() as u64, Arc::new(Heard::default())).unwrap();
    slabs.write(&file, &bytes, 2).unwrap();
    file.seal().unwrap();
    assert!(whole(&client, "a/f") == bytes);
    slabs.return_all(Duration::from_secs(1));
}

#[test]
fn an_arena_that_cannot_hold_the_parts_in_flight_is_refused_before_a_byte_moves() {
    let (_, client) = in_memory();
    let create = |len: u64, arena: u64| {
        let writers = Some(Writers::new(arena, 8 << 20, 4));
        let heard = Arc::new(Heard { writers, ..Heard::default() });
        ObjectFile::create(&client, "a/f".into(), len, heard).map(drop)
    };
    // Five parts of 39 MiB. Each lies in five slabs and in one slab that it shares with the next part. One
    // more slab.
    let needed = (5 * 6 + 1) * (8 << 20);
    create(405_000_000_000, needed).unwrap();
    let error = create(405_000_000_000, needed - 1).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
    assert!(error.message().contains("raise `arena`") && error.message().contains(&needed.to_string()), "{error}");
    create(100, 8 << 20).unwrap();
    assert_eq!(create(u64::MAX / 2, u64::MAX).unwrap_err().kind(), ErrorKind::Invalid);
}

/// Uploads a file of four parts of `part` bytes by two writers.
fn upload_parts(
    part: usize,
    peer: &Peer,
    patience: Duration,
    expires: Option<Duration>,
) -> (Slabs, Result<()>, Arc<Heard>, Duration) {
    let (slabs, bytes) = (Slabs::new(12, part / 4), pattern(4 * part - 100));
    let limits = Limits { least: part as u64, unit: part as u64, ..SMALL };
    let began = Instant::now();
    let heard = Arc::new(Heard { expires: expires.map(|after| began + after), ..Heard::default() });
    let client = peer.client(patience);
    let file = ObjectFile::within(limits, &client, "a/f".into(), bytes.len() as u64, heard.clone()).unwrap();
    let done = slabs.write(&file, &bytes, 2).and_then(|()| file.seal());
    if done.is_ok() {
        assert!(peer.object("a/f").unwrap() == bytes);
    }
    (slabs, done, heard, began.elapsed())
}

fn upload(peer: &Peer, patience: Duration, expires: Option<Duration>) -> (Slabs, Result<()>, Arc<Heard>, Duration) {
    upload_parts(1 << 20, peer, patience, expires)
}

#[test]
fn a_part_that_failed_is_sent_again_from_the_same_slabs() {
    for answer in [Answer::Status(500), Answer::Status(429), Answer::Lost] {
        let tries = AtomicUsize::new(0);
        let peer = Peer::start(move |asked: &Asked| {
            let fails = asked.is_part() && tries.fetch_add(1, Ordering::AcqRel) < 3;
            if fails { answer } else { Answer::Well }
        });
        let (slabs, done, heard, _) = upload(&peer, PATIENCE, None);
        done.unwrap();
        assert_eq!((peer.uploads(), peer.object("a/uploads/f")), (0, None));
        assert_eq!((heard.sealed.load(Ordering::Acquire), heard.lost.load(Ordering::Acquire)), (1, 0));
        slabs.return_all(Duration::from_secs(3));
    }
}

#[test]
fn a_completion_whose_answer_was_lost_is_judged_by_what_is_there() {
    for answer in [Answer::Lost, Answer::Status(500)] {
        let peer = Peer::start(move |asked: &Asked| {
            let completes = asked.method == "POST" && asked.query.contains("uploadId");
            if completes && asked.number < 9 { answer } else { Answer::Well }
        });
        let (slabs, done, ..) = upload(&peer, PATIENCE, None);
        done.unwrap();
        slabs.return_all(Duration::from_secs(3));
    }
}

#[test]
fn a_part_that_the_store_refuses_loses_the_file_and_returns_its_slabs() {
    let peer = Peer::start(|asked: &Asked| if asked.is_part() { Answer::Status(403) } else { Answer::Well });
    let (slabs, done, heard, took) = upload(&peer, PATIENCE, None);
    let error = done.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:#}");
    assert!(format!("{error:#}").contains("s3://bucket/a/f") && took < PATIENCE / 2, "{error:#} {took:?}");
    assert_eq!((heard.sealed.load(Ordering::Acquire), heard.lost.load(Ordering::Acquire)), (0, 1));
    slabs.return_all(Duration::from_secs(3));
}

#[test]
fn a_peer_that_never_reads_holds_slabs_no_longer_than_the_save() {
    let peer = Peer::start(|asked: &Asked| if asked.is_part() { Answer::Deaf } else { Answer::Well });
    // More bytes than the system buffers for a connection whose peer does not read.
    let (slabs, done, heard, took) = upload_parts(16 << 20, &peer, PATIENCE, Some(Duration::from_secs(2)));
    let error = done.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Deadline, "{error:#}");
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert_eq!(heard.lost.load(Ordering::Acquire), 1);
    slabs.return_all(Duration::from_secs(5));
    peer.recover();
    let (slabs, done, ..) = upload(&peer, PATIENCE, None);
    done.unwrap();
    slabs.return_all(Duration::from_secs(3));
}

#[test]
fn a_connection_that_keeps_slabs_after_an_early_answer_is_ended() {
    let peer = Peer::start(|asked: &Asked| if asked.is_part() { Answer::Early(403) } else { Answer::Well });
    let (slabs, done, ..) = upload_parts(16 << 20, &peer, PATIENCE, None);
    assert_eq!(done.unwrap_err().kind(), ErrorKind::Invalid);
    slabs.return_all(Duration::from_secs(10));
}

#[test]
fn a_range_arrives_whole_from_bodies_that_break_off_stall_and_fail() {
    for answer in
        [Answer::Well, Answer::Cut(100_000), Answer::Cut(0), Answer::Stall(70_000), Answer::Status(503), Answer::Lost]
    {
        let bytes = pattern(1 << 20);
        let peer = Peer::start(move |asked: &Asked| {
            let first = asked.method == "GET" && asked.range.as_ref().is_some_and(|range| range.end > 20_000);
            if first && asked.number < 3 { answer } else { Answer::Well }
        });
        peer.insert("f", bytes.clone());
        let client = peer.client(PATIENCE);
        for (offset, len) in [(0, 1 << 20), (5, 20), (30_000, 300_001), ((1 << 20) - 1, 1), (1 << 20, 0)] {
            assert!(
                read(&client, "f", offset as u64, len).unwrap() == bytes[offset..offset + len],
                "{answer:?} {offset}"
            );
        }
        assert_eq!(read(&client, "f", 1 << 20, 1).unwrap_err().kind(), ErrorKind::Corrupt);
    }
}

#[test]
fn a_body_that_stalls_for_ever_fails_by_the_patience_and_what_is_missing_is_said_why() {
    let peer =
        Peer::start(
            |asked: &Asked| {
                if asked.range.as_ref().is_some_and(|r| r.end > 20_000) { Answer::Stall(9) } else { Answer::Well }
            },
        );
    peer.insert("f", pattern(1 << 20));
    peer.insert("empty", Vec::new());
    let client = peer.client(Duration::from_secs(3));
    let began = Instant::now();
    let error = read(&client, "f", 0, 1 << 20).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable, "{error:#}");
    assert!(began.elapsed() < Duration::from_secs(9), "{:?}", began.elapsed());
    assert!(ObjectReading::open(&client, "absent".into(), why()).unwrap().is_none());
    assert_eq!(ObjectReading::open(&client, "empty".into(), why()).unwrap().unwrap().len(), 0);
    let file = ObjectReading::open(&client, "f".into(), why()).unwrap().unwrap();
    peer.remove("f");
    peer.recover();
    let error = file.read_at(0, &mut vec![0; 1 << 20]).unwrap_err();
    assert_eq!((error.kind(), error.message()), (ErrorKind::Corrupt, "a file is missing"));
}

/// A save of 24 MiB in three parts by an executor whose arena holds little more than the parts in flight.
struct Saving {
    executor: CheckpointExecutor,
    data: Arc<Vec<u32>>,
}

impl Saving {
    fn on(peer: &Peer, save_timeout: Duration) -> Self {
        let storage = Arc::new(ObjectStore::of(peer.client(PATIENCE)));
        let builder = CheckpointExecutor::builder("unused").storage(storage).save_timeout(save_timeout);
        let executor = builder.arena(44 << 20).chunk(4 << 20).writers(2).keep_last(9).build().unwrap();
        Self { executor, data: Arc::new((0..6 << 20).collect()) }
    }

    fn save(&self, step: u64) -> Result<()> {
        let mut state = StateDict::new();
        state.tensor("weights", self.data.clone()).unwrap();
        self.executor.save(step, state)?.wait(Duration::from_secs(60)).map(drop)
    }
}

#[test]
fn an_executor_goes_on_when_a_peer_that_never_read_is_well_again() {
    let peer = Peer::start(|asked: &Asked| if asked.is_part() { Answer::Deaf } else { Answer::Well });
    let saving = Saving::on(&peer, Duration::from_secs(2));
    for step in 1..3 {
        let began = Instant::now();
        let error = saving.save(step).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Deadline, "{error:#}");
        assert!(began.elapsed() < Duration::from_secs(12), "{:?}", began.elapsed());
    }
    peer.recover();
    // The arena has no room for the save as long as a slab of an earlier save is missing.
    let late = Instant::now() + Duration::from_secs(40);
    while let Err(error) = saving.save(3) {
        assert!(Instant::now() < late, "{error:#}");
    }
    let found = saving.executor.latest().unwrap().unwrap().read_as::<u32>("weights").unwrap();
    assert!(found == *saving.data);
    saving.executor.shutdown(Duration::from_secs(30)).unwrap();
    assert_eq!(peer.uploads(), 0, "what was abandoned is aborted");
}

#[test]
fn bits_that_flipped_on_their_way_are_fetched_again_and_those_that_flip_always_are_damage() {
    let (flips, long) =
        (Arc::new(AtomicUsize::new(0)), |asked: &Asked| asked.range.as_ref().is_some_and(|r| r.len() > 1 << 20));
    let left = flips.clone();
    let peer = Peer::start(move |asked: &Asked| {
        let flip = long(asked) && left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1)).is_ok();
        if flip { Answer::Flip } else { Answer::Well }
    });
    let saving = Saving::on(&peer, Duration::from_secs(60));
    saving.save(1).unwrap();
    let step = saving.executor.latest().unwrap().unwrap().with_threads(1);
    flips.store(1, Ordering::Release);
    assert!(step.read_as::<u32>("weights").unwrap() == *saving.data);
    flips.store(1, Ordering::Release);
    assert!(step.verify().unwrap().is_sound());
    assert_eq!(flips.load(Ordering::Acquire), 0);
    flips.store(usize::MAX, Ordering::Release);
    let error = step.read("weights").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error:#}");
    assert!(!step.verify().unwrap().is_intact());
}

#[test]
fn a_file_without_digests_of_its_parts_is_read_again_before_it_counts_as_damaged() {
    let flips = Arc::new(AtomicUsize::new(0));
    let left = flips.clone();
    let peer = Peer::start(move |asked: &Asked| {
        let index = asked.method == "GET" && asked.key.ends_with("/model.safetensors.index.json");
        let flip = index && left.fetch_update(Ordering::AcqRel, Ordering::Acquire, |n| n.checked_sub(1)).is_ok();
        if flip { Answer::Flip } else { Answer::Well }
    });
    let storage = Arc::new(ObjectStore::of(peer.client(PATIENCE)));
    let builder = CheckpointExecutor::builder("unused").storage(storage).arena(16 << 20).chunk(1 << 20);
    let executor = builder.files(2).build().unwrap();
    let mut state = StateDict::new();
    state.tensor("a", vec![1_u8; 100]).unwrap();
    state.tensor("b", vec![2_u8; 100]).unwrap();
    executor.save(1, state).unwrap().wait(Duration::from_secs(60)).unwrap();
    let step = || executor.latest().unwrap().unwrap().with_threads(1);
    flips.store(1, Ordering::Release);
    let report = step().verify().unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(flips.load(Ordering::Acquire), 0);
    flips.store(usize::MAX, Ordering::Release);
    assert!(!step().verify().unwrap().is_intact());
}

#[test]
fn a_step_of_many_tensors_is_opened_and_searched_by_few_requests() {
    const TENSORS: usize = 20_000;
    let peer = Peer::start(|_: &Asked| Answer::Well);
    let saving = Saving::on(&peer, Duration::from_secs(60));
    let (mut state, data) = (StateDict::new(), Arc::new(vec![7_u8; 16]));
    for number in 0..TENSORS {
        state.tensor(format!("layers.{number}.weight"), data.clone()).unwrap();
    }
    saving.executor.save(1, state).unwrap().wait(Duration::from_secs(60)).unwrap();
    let asked = || peer.asked().iter().filter(|asked| asked.starts_with("GET step-")).count();
    let before = asked();
    let step = saving.executor.latest().unwrap().unwrap();
    for number in (0..TENSORS).step_by(500) {
        step.tensor(&format!("layers.{number}.weight")).unwrap();
    }
    let looked = asked() - before;
    assert_eq!(step.tensors().unwrap().count(), TENSORS);
    let all = asked() - before;
    assert!(looked <= 10 && all <= 20, "{looked} {all} {:?}", peer.asked());
    assert_eq!(step.read("layers.19999.weight").unwrap(), *data);
}

#[test]
fn a_probe_outlasts_a_store_that_is_away_for_a_moment() {
    for status in [503, 429] {
        let (tries, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let peer = Peer::start(move |asked: &Asked| {
            let probes = asked.method == "PUT" && asked.key.starts_with(".probe-");
            // Fails twice before each of the four puts is done, because the crate itself sends a request
            // again once.
            let fails = probes && tries.fetch_add(1, Ordering::AcqRel) % 3 < 2;
            if fails && refused.fetch_add(1, Ordering::AcqRel) < 8 { Answer::Status(status) } else { Answer::Well }
        });
        super::probe::conditions(&peer.client(PATIENCE)).unwrap();
    }
}

#[test]
fn a_completion_that_landed_is_known_although_the_store_was_away_when_it_was_asked() {
    let (posts, heads) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let peer = Peer::start(move |asked: &Asked| {
        let completes = asked.method == "POST" && asked.query.contains("uploadId");
        match asked.method.as_str() {
            // Fails once, and once for the repeat by the crate. After that the upload is gone.
            _ if completes && posts.fetch_add(1, Ordering::AcqRel) < 2 => Answer::Lost,
            "HEAD" if heads.fetch_add(1, Ordering::AcqRel) < 4 => Answer::Status(503),
            _ => Answer::Well,
        }
    });
    let (slabs, done, ..) = upload(&peer, PATIENCE, None);
    done.unwrap();
    slabs.return_all(Duration::from_secs(3));
}

#[test]
fn more_objects_than_one_request_takes_are_listed_and_deleted() {
    let (_, client) = in_memory();
    for number in 0..2500 {
        client.put("put", &format!("a/{number}"), bytes::Bytes::new(), client.deadline()).unwrap();
    }
    let listed = client.list("list", "a", client.deadline()).unwrap();
    assert_eq!(listed.len(), 2500);
    client.delete("delete", listed.into_iter().map(|object| object.location).collect(), client.deadline()).unwrap();
    assert!(client.list("list", "a", client.deadline()).unwrap().is_empty());
}

#[test]
fn a_small_file_that_a_store_never_takes_fails_at_the_deadline_of_the_save() {
    let peer =
        Peer::start(|asked: &Asked| if asked.key.ends_with("/config.json") { Answer::Deaf } else { Answer::Well });
    let storage = ObjectStore::of(peer.client(PATIENCE));
    let writing = storage.begin("step-1", crate::id::Attempt::new(), false).unwrap();
    let began = Instant::now();
    writing.expires(began + Duration::from_secs(1));
    let error = writing.put("config.json", b"{}").unwrap_err();
    assert!(began.elapsed() < PATIENCE / 2, "{:?}", began.elapsed());
    assert_eq!(error.kind(), ErrorKind::Deadline, "{error:#}");
}
