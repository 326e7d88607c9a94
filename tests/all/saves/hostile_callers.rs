//! Callers at their worst: endless timeouts, sources that panic when they are dropped, storage that panics.

use crate::fixtures::executor::{LONG, eventually, fixture, one, pattern};
use ashore::id::parse_step_name;
use ashore::internal::device::{CopyQueue, Device};
use ashore::internal::digest::Digest;
use ashore::memory::{Pages, Register};
use ashore::storage::local::Local;
use ashore::storage::{FileWriting, Memory, Reading, State, Storage, Sweep, Swept, Writing};
use ashore::testing::LateDevice;
use ashore::{Attempt, CheckpointExecutor, ErrorKind, Fence, IoMode, Overlap, Result, SaveOptions, Source, StateDict};
use std::any::Any;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

#[test]
fn patience_without_end_is_not_an_overflow() {
    let fixture = fixture(|b| b.fence_timeout(Duration::MAX).save_timeout(Duration::MAX));
    let tensor = pattern(1, 20_000);
    let save = fixture.executor.scope(Fence::host(), |scope| {
        let mut state = StateDict::new();
        state.tensor("t", &tensor[..]).unwrap();
        scope.save(1, state).unwrap()
    });
    let save = save.unwrap();
    assert_eq!(fixture.device.copied(), fixture.device.queued());
    save.staged().wait(Duration::MAX).unwrap();
    save.wait(Duration::MAX).unwrap();
    let next = fixture.executor.save(2, one("t", Arc::new(tensor))).unwrap();
    fixture.executor.fence().unwrap();
    fixture.executor.shutdown(Duration::MAX).unwrap();
    assert!(next.wait(Duration::ZERO).is_ok());
}

/// A source that panics when it is dropped, as a destructor that calls into another language may.
struct Bomb(Arc<Vec<u8>>);

#[expect(unsafe_code, reason = "hands on the promises of the source inside")]
// SAFETY: those of the source inside, which is dropped after it.
unsafe impl Source for Bomb {
    fn layout(&self) -> ashore::Layout {
        self.0.layout()
    }
    fn location(&self) -> ashore::MemoryLocation {
        self.0.location()
    }
    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        self.0.read(copy);
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("a destructor that fails");
        }
    }
}

#[test]
fn a_source_that_panics_when_it_is_dropped_ends_no_thread() {
    let fixture = fixture(|b| b);
    for step in 1..5 {
        let save = fixture.executor.save(step, one("t", Bomb(Arc::new(pattern(step, 9000))))).unwrap();
        fixture.executor.fence().unwrap();
        save.wait(LONG).unwrap();
    }
    fixture.slabs_home();
}

/// Writable memory that panics when it is read, in `save` itself, and again when it is dropped.
struct Mine(Bomb);

#[expect(unsafe_code, reason = "a source that breaks its contract in a harmless way")]
// SAFETY: it never hands out a pointer.
unsafe impl Source for Mine {
    fn layout(&self) -> ashore::Layout {
        self.0.layout()
    }
    fn location(&self) -> ashore::MemoryLocation {
        ashore::MemoryLocation::Host { bytes: self.0.location().bytes(), writable: true }
    }
    fn read(&self, _: &mut dyn FnMut(*const u8)) {
        panic!("a source that fails");
    }
}

/// A panic in a source that `save` captures, or in the destructor of a refused one, unwound through `save`
/// with its locks held, because `save` captures in the caller's thread.
#[test]
fn a_source_that_panics_in_the_call_of_save_is_an_error_of_that_call() {
    let fixture = fixture(|b| b);
    let mine = |len| Mine(Bomb(Arc::new(pattern(1, len))));
    // Small: captured. Large: digested, so that a forgotten fence is found out.
    for len in [100, 9000] {
        let error = fixture.executor.save(1, one("t", mine(len))).unwrap_err();
        assert_eq!((error.kind(), error.step()), (ErrorKind::Internal, Some(1)), "{error}");
        assert!(error.message().contains("a source panicked"), "{error}");
    }
    let refused =
        fixture.executor.save_with(1, one("t", Bomb(Arc::new(pattern(1, 9)))), SaveOptions::default().name("step-2"));
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Invalid);
    fixture.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap().wait(LONG).unwrap();
    fixture.slabs_home();
}

#[test]
fn a_waiting_save_that_was_cancelled_was_not_superseded() {
    let fixture = fixture(|b| b.overlap(Overlap::Latest));
    fixture.device.hold();
    let save = |step| fixture.executor.save(step, one("t", Arc::new(pattern(step, 9000)))).unwrap();
    let first = save(1);
    eventually("the first is staged", || first.progress().phase == ashore::Phase::Staging);
    let second = save(2);
    assert!(second.cancel());
    assert_eq!(second.wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    let third = save(3);
    assert_eq!(second.staged().wait(LONG).unwrap_err().kind(), ErrorKind::Cancelled);
    fixture.device.release();
    first.wait(LONG).unwrap();
    third.wait(LONG).unwrap();
}

#[test]
fn an_error_that_a_fence_returned_is_not_returned_again() {
    let fixture = fixture(|b| b.fence_timeout(Duration::from_millis(10)));
    fixture.device.hold();
    let tensor = Arc::new(pattern(1, 30_000));
    drop(fixture.executor.save(1, one("t", tensor.clone())).unwrap());
    fixture.executor.fence().unwrap_err();
    fixture.device.release();
    fixture.executor.save(2, one("t", tensor)).unwrap().wait(LONG).unwrap();
    fixture.executor.shutdown(LONG).unwrap();
}

/// A device whose first queue panics in every call.
#[derive(Debug, Default)]
struct Breaking(AtomicBool);

impl Register for Breaking {
    fn register(&self, _: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl Device for Breaking {
    fn name(&self) -> String {
        "breaking".into()
    }
    fn queue(&self) -> Result<Box<dyn CopyQueue>> {
        if self.0.swap(true, Ordering::Relaxed) { LateDevice::default().queue() } else { Ok(Box::new(Broken)) }
    }
}

struct Broken;

#[expect(unsafe_code, reason = "a queue that copies nothing")]
impl CopyQueue for Broken {
    unsafe fn copy(&mut self, _: *const u8, _: *mut u8, _: usize) -> Result<Option<Digest>> {
        panic!("a device that panics");
    }
    fn event(&mut self) -> Result<u64> {
        panic!("a device that panics");
    }
    fn reached(&mut self) -> Result<u64> {
        Ok(0)
    }
    fn quiesce(&mut self, _: Instant) -> bool {
        panic!("a device that panics");
    }
}

/// The stager asked a queue outside of any guard whether the copies of a failed save had ended. A queue that
/// panicked there ended the thread, and no later save was ever staged.
#[test]
fn a_queue_that_panics_whenever_it_is_asked_fails_its_save_and_no_other() {
    let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(Memory::new()));
    let builder = builder.made_device(Arc::new(Breaking::default())).arena(4 * 4096).chunk(4096);
    let executor = builder.shutdown_timeout(Duration::from_secs(5)).build().unwrap();
    let save = |step| executor.save(step, one("t", Arc::new(pattern(step, 30_000)))).unwrap();
    assert_eq!(save(1).wait(LONG).unwrap_err().kind(), ErrorKind::Internal);
    save(2).wait(LONG).unwrap();
    executor.shutdown(LONG).unwrap();
}

/// Storage that panics where it is told to.
#[derive(Debug, Default)]
struct Panicking {
    memory: Memory,
    when_begun: AtomicBool,
    when_described: AtomicBool,
    /// Sweeps so far.
    sweeps: AtomicUsize,
    /// Swept instead, where it is set.
    beside: OnceLock<Local>,
    /// The step that was hinted at last.
    hinted: AtomicUsize,
}

impl Storage for Panicking {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        assert!(!self.when_begun.load(Ordering::Relaxed), "a storage that panics");
        self.memory.begin(name, attempt, overwrite)
    }
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.memory.open(name)
    }
    fn list(&self) -> Result<Vec<String>> {
        self.memory.list()
    }
    fn confirm(&self, name: &str) -> Result<()> {
        self.memory.confirm(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.memory.remove(name)
    }
    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.sweeps.fetch_add(1, Ordering::Relaxed);
        self.beside.get().map_or_else(|| self.memory.sweep(how), |beside| beside.sweep(how))
    }
    fn hint(&self, name: &str) -> Result<()> {
        self.memory.hint(name)?;
        self.hinted.store(parse_step_name(name).unwrap() as usize, Ordering::Relaxed);
        Ok(())
    }
    fn describe(&self, name: &str) -> PathBuf {
        assert!(!self.when_described.load(Ordering::Relaxed), "a storage that panics");
        self.memory.describe(name)
    }
}

#[test]
fn a_storage_that_panics_fails_the_save_and_ends_no_thread() {
    let storage = Arc::new(Panicking::default());
    let builder = CheckpointExecutor::builder("in memory").storage(storage.clone()).arena(4 * 4096).chunk(4096);
    let executor = builder.build().unwrap();
    let save = |step| executor.save(step, one("t", Arc::new(pattern(step, 30_000)))).unwrap().wait(LONG);
    for (step, switch) in [(1, &storage.when_begun), (3, &storage.when_described)] {
        let swept = storage.sweeps.load(Ordering::Relaxed).max(1);
        switch.store(true, Ordering::Relaxed);
        assert_eq!(save(step).unwrap_err().kind(), ErrorKind::Internal);
        switch.store(false, Ordering::Relaxed);
        // At once, not in an hour: files may be left of the attempt.
        eventually("what is left is swept", || storage.sweeps.load(Ordering::Relaxed) > swept);
        save(step + 1).unwrap();
    }
    executor.shutdown(LONG).unwrap();
}

/// After one attempt that only a sweep could find, every later save swept the whole root for as long as any
/// other process was writing to it.
#[test]
fn what_another_process_is_writing_is_not_swept_after_every_save() {
    let directory = tempfile::tempdir().unwrap();
    let local = Local::open(directory.path()).unwrap();
    let other = local.begin("step-100", Attempt::new(), false).unwrap();
    assert_eq!(local.sweep(Sweep::default()).unwrap().left[0].state, State::Live);
    let storage = Arc::new(Panicking { beside: local.into(), ..Panicking::default() });
    let builder = CheckpointExecutor::builder("in memory").storage(storage.clone()).arena(4 * 4096).chunk(4096);
    let executor = builder.build().unwrap();
    let save = |step| executor.save(step, one("t", Arc::new(pattern(step, 900)))).unwrap().wait(LONG);
    storage.when_described.store(true, Ordering::Relaxed);
    save(1).unwrap_err();
    storage.when_described.store(false, Ordering::Relaxed);
    for step in 2..20 {
        save(step).unwrap();
        eventually("the save is being tidied up", || storage.hinted.load(Ordering::Relaxed) == step as usize);
    }
    executor.shutdown(LONG).unwrap();
    other.abandon().unwrap();
    // The first, three tries, the last.
    let sweeps = storage.sweeps.load(Ordering::Relaxed);
    assert!((2..=5).contains(&sweeps), "sweeps={sweeps}");
}

/// Storage whose attempts and files panic when they are dropped.
#[derive(Debug, Default)]
struct Dropping(Memory);

#[derive(Debug)]
struct BombAttempt(Arc<dyn Writing>);

#[derive(Debug)]
struct BombFile(Arc<dyn FileWriting>);

impl Drop for BombAttempt {
    fn drop(&mut self) {
        panic!("an attempt that panics");
    }
}

impl Drop for BombFile {
    fn drop(&mut self) {
        panic!("a file that panics");
    }
}

impl Writing for BombAttempt {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        Ok(Arc::new(BombFile(self.0.create(file, len)?)))
    }
    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.0.put(file, bytes)
    }
    fn publish(&self, overwrite: bool) -> Result<()> {
        self.0.publish(overwrite)
    }
    fn settle(&self) -> Result<()> {
        self.0.settle()
    }
    fn abandon(&self) -> Result<()> {
        self.0.abandon()
    }
}

impl FileWriting for BombFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.0.write_at(offset, bytes)
    }
    fn seal(&self) -> Result<()> {
        self.0.seal()
    }
    fn mode(&self) -> IoMode {
        self.0.mode()
    }
}

impl Storage for Dropping {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        Ok(Arc::new(BombAttempt(self.0.begin(name, attempt, overwrite)?)))
    }
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.0.open(name)
    }
    fn list(&self) -> Result<Vec<String>> {
        self.0.list()
    }
    fn confirm(&self, name: &str) -> Result<()> {
        self.0.confirm(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.0.remove(name)
    }
    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.0.sweep(how)
    }
    fn hint(&self, name: &str) -> Result<()> {
        self.0.hint(name)
    }
    fn describe(&self, name: &str) -> PathBuf {
        self.0.describe(name)
    }
}

/// The last thread of a save dropped the attempt and its files without a guard: a panicking destructor ended
/// the committer, a writer or the tidying thread, and two such panics in one save ended the process.
#[test]
fn attempts_and_files_that_panic_when_they_are_dropped_end_no_thread() {
    let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(Dropping::default()));
    let builder = builder.arena(4 * 4096).chunk(4096).files(2).writers(2).keep_last(2);
    let executor = builder.shutdown_timeout(Duration::from_secs(5)).build().unwrap();
    let state = |step| {
        let mut state = one("t", Arc::new(pattern(step, 9000)));
        state.tensor("u", Arc::new(pattern(step, 9000))).unwrap();
        state
    };
    // More saves than may wait to be tidied up.
    for step in 1..60 {
        executor.save(step, state(step)).unwrap().wait(LONG).unwrap();
    }
    executor.shutdown(LONG).unwrap();
    assert_eq!(executor.catalog().list().unwrap().len(), 2, "the last saves were tidied up after");
}
