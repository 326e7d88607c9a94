//! Callers at their worst: endless timeouts, sources that panic when they are dropped, storage that panics.

use crate::fixtures::executor::{LONG, eventually, fixture, one, pattern};
use crate::fixtures::hooked::{Call, Hooked};
use ashore::id::parse_step_name;
use ashore::internal::device::{CopyQueue, Device};
use ashore::internal::digest::Digest;
use ashore::memory::{Pages, Register};
use ashore::storage::local::Local;
use ashore::storage::{Memory, State, Storage, Sweep};
use ashore::testing::LateDevice;
use ashore::{Attempt, CheckpointExecutor, ErrorKind, Fence, Overlap, Result, SaveOptions, Source, StateDict};
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

#[test]
fn an_endless_timeout_is_not_an_overflow() {
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
    fixture.slabs_returned();
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
    fixture.slabs_returned();
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

/// Makes a storage panic, and counts its calls.
#[derive(Default)]
struct Panicking {
    when_begun: AtomicBool,
    when_described: AtomicBool,
    /// Sweeps so far.
    sweeps: AtomicUsize,
    /// The step that was hinted at last.
    hinted: AtomicU64,
}

fn panicking(inner: impl Storage + 'static) -> (Arc<Panicking>, Arc<Hooked>) {
    let switches = Arc::<Panicking>::default();
    let told = switches.clone();
    let storage = Hooked::new(inner, move |call| {
        match call {
            Call::Begin => assert!(!told.when_begun.load(Ordering::Relaxed), "a storage that panics"),
            Call::Describe => assert!(!told.when_described.load(Ordering::Relaxed), "a storage that panics"),
            Call::Sweep => _ = told.sweeps.fetch_add(1, Ordering::Relaxed),
            Call::Hinted { step } => told.hinted.store(parse_step_name(step).unwrap(), Ordering::Relaxed),
            _ => {}
        }
        Ok(())
    });
    (switches, Arc::new(storage))
}

#[test]
fn a_storage_that_panics_fails_the_save_and_ends_no_thread() {
    let (switches, storage) = panicking(Memory::new());
    let builder = CheckpointExecutor::builder("in memory").storage(storage).arena(4 * 4096).chunk(4096);
    let executor = builder.build().unwrap();
    let save = |step| executor.save(step, one("t", Arc::new(pattern(step, 30_000)))).unwrap().wait(LONG);
    for (step, switch) in [(1, &switches.when_begun), (3, &switches.when_described)] {
        let swept = switches.sweeps.load(Ordering::Relaxed).max(1);
        switch.store(true, Ordering::Relaxed);
        assert_eq!(save(step).unwrap_err().kind(), ErrorKind::Internal);
        switch.store(false, Ordering::Relaxed);
        // At once, not in an hour: files may be left of the attempt.
        eventually("what is left is swept", || switches.sweeps.load(Ordering::Relaxed) > swept);
        save(step + 1).unwrap();
    }
    executor.shutdown(LONG).unwrap();
}

/// After one attempt that only a sweep could find, every later save swept the whole root for as long as any
/// other process was writing to it.
#[test]
fn a_live_attempt_of_another_owner_causes_no_sweep_after_every_save() {
    let directory = tempfile::tempdir().unwrap();
    let local = Local::open(directory.path()).unwrap();
    let other = local.begin("step-100", Attempt::new(), false).unwrap();
    assert_eq!(local.sweep(Sweep::default()).unwrap().left[0].state, State::Live);
    let (switches, storage) = panicking(local);
    let builder = CheckpointExecutor::builder(directory.path()).storage(storage).arena(4 * 4096).chunk(4096);
    let executor = builder.build().unwrap();
    let save = |step| executor.save(step, one("t", Arc::new(pattern(step, 900)))).unwrap().wait(LONG);
    switches.when_described.store(true, Ordering::Relaxed);
    save(1).unwrap_err();
    switches.when_described.store(false, Ordering::Relaxed);
    for step in 2..20 {
        save(step).unwrap();
        eventually("the save is being tidied up", || switches.hinted.load(Ordering::Relaxed) == step);
    }
    executor.shutdown(LONG).unwrap();
    other.abandon().unwrap();
    // The first, three tries, the last.
    let sweeps = switches.sweeps.load(Ordering::Relaxed);
    assert!((2..=5).contains(&sweeps), "sweeps={sweeps}");
}

/// The last thread of a save dropped the attempt and its files without a guard: a panicking destructor ended
/// the committer, a writer or the tidying thread, and two such panics in one save ended the process.
#[test]
fn attempts_and_files_that_panic_when_they_are_dropped_end_no_thread() {
    let storage = Hooked::new(Memory::new(), |call| match call {
        Call::DropAttempt | Call::DropFile => panic!("a destructor that fails"),
        _ => Ok(()),
    });
    let builder = CheckpointExecutor::builder("in memory").storage(Arc::new(storage));
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
