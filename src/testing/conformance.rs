//! Tests of the behaviour that every storage back end must have, one named test per behaviour.
//!
//! ```
//! use std::sync::Arc;
//! let directory = tempfile::tempdir()?;
//! let mut roots = 0;
//! ashore::testing::conformance::run(|| {
//!     roots += 1;
//!     Arc::new(ashore::storage::local::Local::open(directory.path().join(roots.to_string())).unwrap())
//! });
//! # Ok::<(), std::io::Error>(())
//! ```

use crate::device::Host;
use crate::error::{ErrorKind, Result};
use crate::id::Attempt;
use crate::memory::{ALIGNMENT, AlignedBuffer, Arena, Slab};
use crate::storage::{Adopted, FileReading, Memory, Reading, Storage, Sweep, Writing};
use std::fmt::Debug;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

/// A behaviour: its name, and a function that panics if an empty storage lacks it.
pub type Behaviour = (&'static str, fn(&Arc<dyn Storage>));

/// Every behaviour.
pub const BEHAVIOURS: &[Behaviour] = &[
    ("what is published reads back byte for byte", published_bytes_read_back),
    ("nothing is visible before the publish", nothing_is_visible_before_the_publish),
    ("a step that exists is a conflict", a_step_that_exists_is_a_conflict),
    ("of attempts at one step exactly one wins", exactly_one_attempt_wins),
    ("an overwrite keeps the old step until the publish", an_overwrite_keeps_the_old_step),
    ("an overwrite of nothing is a publish", an_overwrite_of_nothing_is_a_publish),
    ("what is abandoned leaves nothing", what_is_abandoned_leaves_nothing),
    ("what is removed is gone", what_is_removed_is_gone),
    ("only the step that was opened is removed", only_the_step_that_was_opened_is_removed),
    ("a reader keeps its step", a_reader_keeps_its_step),
    ("a sweep removes the dead and leaves the living", a_sweep_removes_only_the_dead),
    ("an attempt that is not complete is not published", incomplete_attempts_are_not_published),
    ("an attempt is published once and never written again", an_attempt_is_published_once),
    ("a file exists once", a_file_exists_once),
    ("reads have any offset and length, and end with the file", reads_have_any_range),
    ("hostile names are refused", hostile_names_are_refused),
    ("what is not there is not found", what_is_not_there_is_not_found),
    ("a hint is no step", a_hint_is_no_step),
    ("an adopted file is a clone with a head of its own, or the source itself", an_adopted_file_is_whole),
    ("an adopted file outlives its source", an_adopted_file_outlives_its_source),
    ("a source that was removed is cloned or refused", a_source_that_was_removed_is_no_link),
    ("what cannot be adopted is refused or an error", what_cannot_be_adopted_is_refused),
];

/// Tests every behaviour, each on a new empty storage.
///
/// # Panics
/// When a behaviour is missing; its name is printed first.
pub fn run(mut storage: impl FnMut() -> Arc<dyn Storage>) {
    for (name, behaviour) in BEHAVIOURS {
        println!("behaviour: {name}");
        behaviour(&storage());
    }
}

const NAME: &str = "step-00000007";
const SHARD: &str = "model.safetensors";
const MANIFEST: &str = "manifest.json";

/// Returns bytes that differ between seeds and between offsets.
fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn write_shard(attempt: &dyn Writing, file: &str, bytes: &[u8], chunk: usize) {
    let shard = attempt.create(file, bytes.len() as u64).unwrap();
    let chunks: Vec<_> = bytes.chunks(chunk).enumerate().collect();
    let slabs = chunks.len().div_ceil(2);
    let arena = Arena::quietly((slabs.max(1) * chunk) as u64, chunk as u64, &Host, Arc::default()).unwrap();
    let full = arena.free();
    // Chunks finish in any order, and the last one is padded. The storage gets every second chunk with its
    // slab.
    for (index, piece) in chunks.into_iter().rev() {
        let (offset, padded) = ((index * chunk) as u64, piece.len().next_multiple_of(ALIGNMENT));
        if index % 2 == 0 {
            let mut lease = arena.try_lease().expect("a slab for every other chunk");
            lease.bytes_mut().fill(0xee);
            lease.bytes_mut()[..piece.len()].copy_from_slice(piece);
            shard.write_slab(offset, Slab::new(lease, padded).unwrap()).unwrap();
            continue;
        }
        let mut buffer = AlignedBuffer::new(padded);
        buffer.fill(0xee);
        buffer[..piece.len()].copy_from_slice(piece);
        shard.write_at(offset, &buffer).unwrap();
    }
    shard.seal().unwrap();
    let late = Instant::now() + Duration::from_secs(10);
    while arena.free() < full {
        assert!(Instant::now() < late, "a storage keeps slabs of a file that it has sealed: {arena:?}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn begin(storage: &Arc<dyn Storage>, overwrite: bool, seed: u64) -> Arc<dyn Writing> {
    let attempt = storage.begin(NAME, Attempt::new(), overwrite).unwrap();
    write_shard(&*attempt, SHARD, &pattern(seed, 10_000), 4096);
    attempt.put(MANIFEST, &pattern(seed, 100)).unwrap();
    attempt
}

fn publish(storage: &Arc<dyn Storage>, overwrite: bool, seed: u64) {
    let attempt = begin(storage, overwrite, seed);
    attempt.publish(overwrite).unwrap();
    attempt.settle().unwrap();
}

fn whole(file: &dyn FileReading) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(file.len()).unwrap()];
    file.read_at(0, &mut bytes).unwrap();
    bytes
}

fn assert_is(step: &dyn Reading, seed: u64) {
    assert!(whole(&*step.open(SHARD).unwrap()) == pattern(seed, 10_000), "the shard of {seed}");
    assert!(whole(&*step.open(MANIFEST).unwrap()) == pattern(seed, 100), "the manifest of {seed}");
}

fn assert_holds(storage: &Arc<dyn Storage>, seed: u64) {
    assert_eq!(storage.list().unwrap(), [NAME]);
    assert_is(&*storage.open(NAME).unwrap(), seed);
}

#[track_caller]
fn assert_kind<T: Debug>(result: Result<T>, kind: ErrorKind) {
    assert_eq!(result.expect_err("an error").kind(), kind);
}

fn published_bytes_read_back(storage: &Arc<dyn Storage>) {
    let sizes = [0, 1, 4095, 4096, 4097, 3 * 65_536, (1 << 20) + 13];
    let attempt = storage.begin(NAME, Attempt::new(), false).unwrap();
    for (seed, size) in sizes.into_iter().enumerate() {
        write_shard(&*attempt, &format!("shard-{size}"), &pattern(seed as u64, size), 65_536);
        attempt.put(&format!("small-{size}"), &pattern(seed as u64, size)).unwrap();
    }
    attempt.publish(false).unwrap();
    attempt.settle().unwrap();
    let step = storage.open(NAME).unwrap();
    for (seed, size) in sizes.into_iter().enumerate() {
        for file in [format!("shard-{size}"), format!("small-{size}")] {
            assert!(whole(&*step.open(&file).unwrap()) == pattern(seed as u64, size), "{file}");
        }
    }
    let mut listed = step.list().unwrap();
    listed.sort_unstable();
    let mut made: Vec<_> = sizes.iter().flat_map(|s| [format!("shard-{s}"), format!("small-{s}")]).collect();
    made.sort_unstable();
    assert_eq!(listed, made);
    storage.confirm(NAME).unwrap();
}

fn nothing_is_visible_before_the_publish(storage: &Arc<dyn Storage>) {
    let attempt = begin(storage, false, 1);
    assert_eq!(storage.list().unwrap(), [""; 0]);
    assert_kind(storage.open(NAME), ErrorKind::NotFound);
    attempt.publish(false).unwrap();
    assert_holds(storage, 1);
}

fn a_step_that_exists_is_a_conflict(storage: &Arc<dyn Storage>) {
    let late = begin(storage, false, 2);
    publish(storage, false, 1);
    assert_kind(storage.begin(NAME, Attempt::new(), false), ErrorKind::Conflict);
    assert_kind(late.publish(false), ErrorKind::Conflict);
    late.abandon().unwrap();
    assert_holds(storage, 1);
}

fn exactly_one_attempt_wins(storage: &Arc<dyn Storage>) {
    let start = Barrier::new(4);
    let attempts: Vec<_> = (0..4).map(|seed| begin(storage, false, seed)).collect();
    let won: Vec<_> = thread::scope(|scope| {
        let publish = |attempt: &Arc<dyn Writing>| {
            start.wait();
            attempt.publish(false)
        };
        let threads: Vec<_> = attempts.iter().map(|attempt| scope.spawn(move || publish(attempt))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let winner = won.iter().position(Result::is_ok).expect("a winner");
    for (index, result) in won.into_iter().enumerate().filter(|(index, _)| *index != winner) {
        assert_kind(result, ErrorKind::Conflict);
        attempts[index].abandon().unwrap();
    }
    attempts[winner].settle().unwrap();
    assert_holds(storage, winner as u64);
}

fn an_overwrite_keeps_the_old_step(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let attempt = begin(storage, true, 2);
    assert_holds(storage, 1);
    attempt.publish(true).unwrap();
    assert_holds(storage, 2);
    attempt.settle().unwrap();
    assert_holds(storage, 2);
    let abandoned = begin(storage, true, 3);
    abandoned.abandon().unwrap();
    assert_holds(storage, 2);
}

fn an_overwrite_of_nothing_is_a_publish(storage: &Arc<dyn Storage>) {
    publish(storage, true, 1);
    assert_holds(storage, 1);
}

fn what_is_abandoned_leaves_nothing(storage: &Arc<dyn Storage>) {
    begin(storage, false, 1).abandon().unwrap();
    assert_eq!(storage.list().unwrap(), [""; 0]);
    assert_eq!(storage.sweep(Sweep::default()).unwrap(), Default::default());
    publish(storage, false, 2);
    assert_holds(storage, 2);
}

fn what_is_removed_is_gone(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    storage.remove(NAME).unwrap();
    assert_eq!(storage.list().unwrap(), [""; 0]);
    assert_kind(storage.open(NAME), ErrorKind::NotFound);
    assert_kind(storage.remove(NAME), ErrorKind::NotFound);
    publish(storage, false, 2);
    assert_holds(storage, 2);
}

fn only_the_step_that_was_opened_is_removed(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let first = storage.open(NAME).unwrap();
    publish(storage, true, 2);
    assert_kind(storage.remove_opened(NAME, &*first), ErrorKind::Conflict);
    assert_holds(storage, 2);
    storage.remove_opened(NAME, &*storage.open(NAME).unwrap()).unwrap();
    assert_kind(storage.remove_opened(NAME, &*first), ErrorKind::NotFound);
}

fn a_reader_keeps_its_step(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let opened = || {
        let step = storage.open(NAME).unwrap();
        (step.open(SHARD).unwrap(), step.open(MANIFEST).unwrap())
    };
    let of_first = opened();
    publish(storage, true, 2);
    let of_second = opened();
    storage.remove(NAME).unwrap();
    for (seed, (shard, manifest)) in [(1, of_first), (2, of_second)] {
        assert!(whole(&*shard) == pattern(seed, 10_000), "{seed}");
        assert!(whole(&*manifest) == pattern(seed, 100), "{seed}");
    }
}

fn a_sweep_removes_only_the_dead(storage: &Arc<dyn Storage>) {
    let live = begin(storage, false, 1);
    drop(storage.begin("step-8", Attempt::new(), false).unwrap());
    let would = storage.sweep(Sweep::default().dry_run()).unwrap();
    let swept = storage.sweep(Sweep::default()).unwrap();
    assert_eq!((swept.removed.len(), swept.left.len()), (1, 1), "{swept:?}");
    assert_eq!(would, swept, "a dry run says what a sweep does, and does not do it");
    live.publish(false).unwrap();
    live.settle().unwrap();
    assert_holds(storage, 1);
    assert_eq!(storage.sweep(Sweep::default()).unwrap(), Default::default());
    assert_holds(storage, 1);
}

fn incomplete_attempts_are_not_published(storage: &Arc<dyn Storage>) {
    let empty = storage.begin(NAME, Attempt::new(), false).unwrap();
    assert_kind(empty.publish(false), ErrorKind::Invalid);
    let unsealed = begin(storage, false, 1);
    let _shard = unsealed.create("another", 4096).unwrap();
    assert_kind(unsealed.publish(false), ErrorKind::Invalid);
    assert_eq!(storage.list().unwrap(), [""; 0]);
}

fn an_attempt_is_published_once(storage: &Arc<dyn Storage>) {
    let attempt = begin(storage, false, 1);
    assert_kind(attempt.settle(), ErrorKind::Invalid);
    attempt.publish(false).unwrap();
    assert_kind(attempt.publish(true), ErrorKind::Invalid);
    assert_kind(attempt.put("late", b""), ErrorKind::Invalid);
    assert_kind(attempt.create("late", 1), ErrorKind::Invalid);
    assert_kind(attempt.abandon(), ErrorKind::Invalid);
    assert_holds(storage, 1);
}

fn a_file_exists_once(storage: &Arc<dyn Storage>) {
    let attempt = begin(storage, false, 1);
    assert_kind(attempt.put(MANIFEST, b"again"), ErrorKind::Conflict);
    let attempt = begin(storage, false, 1);
    assert_kind(attempt.create(SHARD, 1), ErrorKind::Conflict);
}

fn reads_have_any_range(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let bytes = pattern(1, 10_000);
    let file = storage.open(NAME).unwrap().open(SHARD).unwrap();
    let mut memory = AlignedBuffer::new(10_000 + 1);
    for offset in [0, 1, 511, 4095, 4096, 4097, 8192, 9999, 10_000] {
        for len in [0, 1, 511, 4096, 4097, 5000, 10_000] {
            for shift in [0, 1] {
                let buffer = &mut memory[shift..][..len];
                let read = file.read_at(offset as u64, buffer);
                match bytes.get(offset..offset + len) {
                    Some(expected) => assert!(read.is_ok() && buffer == expected, "{offset} {len} {shift} {read:?}"),
                    None => assert_kind(read, ErrorKind::Corrupt),
                }
            }
        }
    }
    assert_kind(file.read_at(u64::MAX, &mut [0]), ErrorKind::Corrupt);
}

fn hostile_names_are_refused(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let attempt = storage.begin("step-8", Attempt::new(), false).unwrap();
    let step = storage.open(NAME).unwrap();
    for name in ["", ".", "..", "../other", "/etc/passwd", "a/b", "a\\b", "nul\0"] {
        assert_kind(storage.begin(name, Attempt::new(), false), ErrorKind::Invalid);
        assert_kind(storage.open(name), ErrorKind::Invalid);
        assert_kind(storage.remove(name), ErrorKind::Invalid);
        assert_kind(storage.confirm(name), ErrorKind::Invalid);
        assert_kind(storage.hint(name), ErrorKind::Invalid);
        assert_kind(attempt.put(name, b""), ErrorKind::Invalid);
        assert_kind(attempt.create(name, 1), ErrorKind::Invalid);
        assert_kind(step.open(name), ErrorKind::Corrupt);
    }
    for hidden in [".step-1", ".trash-1"] {
        assert_kind(storage.begin(hidden, Attempt::new(), false), ErrorKind::Invalid);
        assert_kind(storage.remove(hidden), ErrorKind::Invalid);
    }
    assert_holds(storage, 1);
}

fn what_is_not_there_is_not_found(storage: &Arc<dyn Storage>) {
    assert_kind(storage.open(NAME), ErrorKind::NotFound);
    assert_kind(storage.confirm(NAME), ErrorKind::NotFound);
    assert_kind(storage.remove(NAME), ErrorKind::NotFound);
    publish(storage, false, 1);
    assert_kind(storage.open(NAME).unwrap().open("missing"), ErrorKind::NotFound);
}

fn a_hint_is_no_step(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    storage.hint(NAME).unwrap();
    storage.hint(NAME).unwrap();
    assert_holds(storage, 1);
    assert_eq!(storage.sweep(Sweep::default()).unwrap(), Default::default());
}

const OTHER: &str = "step-00000008";

/// Adopts `source` as the shard of an attempt, or writes the bytes that a clone would have. Returns these
/// bytes.
fn adopt(attempt: &dyn Writing, source: &dyn FileReading, adopts: bool) -> (Adopted, Vec<u8>) {
    let (linked, head) = (whole(source), pattern(9, ALIGNMENT));
    let cloned = [&head, &linked[ALIGNMENT..]].concat();
    let adopted = attempt.adopt(SHARD, source, &head).unwrap();
    assert!(adopts || matches!(adopted, Adopted::Refused(_)), "a storage that adopts says so: {adopted:?}");
    let bytes = match &adopted {
        Adopted::Linked => linked,
        Adopted::Cloned => cloned,
        Adopted::Refused(why) => {
            assert!(!why.is_empty());
            write_shard(attempt, SHARD, &cloned, 4096);
            cloned
        }
    };
    attempt.put(MANIFEST, &pattern(9, 100)).unwrap();
    (adopted, bytes)
}

fn an_adopted_file_is_whole(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let source = storage.open(NAME).unwrap();
    let attempt = storage.begin(OTHER, Attempt::new(), false).unwrap();
    let (adopted, bytes) = adopt(&*attempt, &*source.open(SHARD).unwrap(), storage.adopts());
    attempt.publish(false).unwrap();
    attempt.settle().unwrap();
    let step = storage.open(OTHER).unwrap();
    assert!(whole(&*step.open(SHARD).unwrap()) == bytes, "{adopted:?}");
    if let (Some(from), Some(to)) = (source.inode(SHARD).unwrap(), step.inode(SHARD).unwrap()) {
        assert_eq!((from.len, to.len), (10_000, 10_000));
        let names = if adopted == Adopted::Linked { 2 } else { 1 };
        assert_eq!((from.names, to.names, from.identity == to.identity), (names, names, names == 2));
    }
    storage.confirm(OTHER).unwrap();
    assert_is(&*storage.open(NAME).unwrap(), 1);
}

fn an_adopted_file_outlives_its_source(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let source = storage.open(NAME).unwrap().open(SHARD).unwrap();
    let attempt = storage.begin(OTHER, Attempt::new(), false).unwrap();
    let (_, bytes) = adopt(&*attempt, &*source, storage.adopts());
    storage.remove(NAME).unwrap();
    attempt.publish(false).unwrap();
    assert!(whole(&*storage.open(OTHER).unwrap().open(SHARD).unwrap()) == bytes);
    // Deleting an attempt must not change its source either.
    let source = storage.open(OTHER).unwrap().open(SHARD).unwrap();
    let abandoned = storage.begin("step-00000009", Attempt::new(), false).unwrap();
    adopt(&*abandoned, &*source, storage.adopts());
    abandoned.abandon().unwrap();
    assert!(whole(&*storage.open(OTHER).unwrap().open(SHARD).unwrap()) == bytes);
}

fn a_source_that_was_removed_is_no_link(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let Some(source) = storage.adopts().then(|| storage.open(NAME).unwrap().open(SHARD).unwrap()) else { return };
    storage.remove(NAME).unwrap();
    let attempt = storage.begin(OTHER, Attempt::new(), false).unwrap();
    let (adopted, bytes) = adopt(&*attempt, &*source, true);
    assert_ne!(adopted, Adopted::Linked);
    attempt.publish(false).unwrap();
    assert!(whole(&*storage.open(OTHER).unwrap().open(SHARD).unwrap()) == bytes);
}

fn what_cannot_be_adopted_is_refused(storage: &Arc<dyn Storage>) {
    publish(storage, false, 1);
    let source = storage.open(NAME).unwrap().open(SHARD).unwrap();
    let attempt = begin_other(storage);
    let foreign: Arc<dyn Storage> = Arc::new(Memory::new());
    publish(&foreign, false, 1);
    let other = foreign.open(NAME).unwrap().open(SHARD).unwrap();
    let head = pattern(9, ALIGNMENT);
    assert!(matches!(attempt.adopt("another", &*other, &head), Ok(Adopted::Refused(_))));
    if storage.adopts() {
        for name in ["", "..", "a/b"] {
            assert_kind(attempt.adopt(name, &*source, &head), ErrorKind::Invalid);
        }
        assert_kind(attempt.adopt("another", &*source, &pattern(9, 100)), ErrorKind::Invalid);
        assert_kind(attempt.adopt("another", &*source, &pattern(9, 3 * ALIGNMENT)), ErrorKind::Invalid);
        let second = begin_other(storage);
        assert_kind(second.adopt(MANIFEST, &*source, &head), ErrorKind::Conflict);
    }
    let attempt = begin_other(storage);
    attempt.publish(false).unwrap();
    if storage.adopts() {
        assert_kind(attempt.adopt("late", &*source, &head), ErrorKind::Invalid);
    }
    assert_is(&*storage.open(OTHER).unwrap(), 2);
}

fn begin_other(storage: &Arc<dyn Storage>) -> Arc<dyn Writing> {
    let attempt = storage.begin(OTHER, Attempt::new(), false).unwrap();
    write_shard(&*attempt, SHARD, &pattern(2, 10_000), 4096);
    attempt.put(MANIFEST, &pattern(2, 100)).unwrap();
    attempt
}
