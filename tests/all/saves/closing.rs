//! Executors that end: on a thread of their own, twice, while a save hangs.

use crate::fixtures::executor::{Fixture, LONG, eventually, fixture, hidden, one, pattern};
use ashore::storage::local::{Linux, Local};
use ashore::testing::{Call, Faulty};
use ashore::{CheckpointExecutor, Detect, ErrorKind, Fence, Layout, MemoryLocation, Outcome, Overlap, Phase};
use ashore::{SaveOptions, Snapshot, Source};
use std::sync::{Arc, mpsc};
use std::time::Duration;

/// Longer than a call that returns at once, and short enough for a failing test.
const SHORT: Duration = Duration::from_millis(200);

/// The `on_done` function dropped the executor on the committer, which then waited for saves that only it
/// could commit: they failed at the shutdown deadline, with all their bytes written.
#[test]
fn a_function_may_drop_the_last_owner_of_an_executor() {
    let Fixture { executor, storage, device } = fixture(|b| b.overlap(Overlap::Queue(3)));
    let executor = Arc::new(executor);
    device.hold();
    let save = |step| executor.save(step, one("t", Arc::new(pattern(step, 9000)))).unwrap();
    let saves = [save(1), save(2), save(3)];
    let (dropped, last) = (mpsc::channel(), executor.clone());
    saves[0].on_done(move |_| {
        assert_eq!(Arc::strong_count(&last), 1);
        drop(last);
        dropped.0.send(()).unwrap();
    });
    drop(executor);
    device.release();
    dropped.1.recv_timeout(LONG).unwrap();
    for save in saves {
        assert!(matches!(save.wait(LONG), Ok(Outcome::Durable(_))), "{save:?}");
    }
    eventually("all threads have ended", || Arc::strong_count(&storage) == 1);
}

/// Each of these calls slept on the committer, until a deadline, for saves that the committer had to commit.
#[test]
fn a_function_that_would_wait_for_its_own_thread_is_refused_at_once() {
    // Of 9,000 bytes in chunks of 4 KiB.
    const COPIES: u64 = 3;
    let fixture = Arc::new(fixture(|b| b.overlap(Overlap::Queue(1)).fence_timeout(SHORT).save_timeout(LONG)));
    let state = |step| one("t", Arc::new(pattern(step, 9000)));
    fixture.device.hold();
    let first = fixture.executor.save(1, state(1)).unwrap();
    let second = fixture.executor.save(2, state(2)).unwrap();
    let ((send, told), weak) = (mpsc::channel(), Arc::downgrade(&fixture));
    first.on_done(move |_| {
        let fixture = weak.upgrade().unwrap();
        let executor = &fixture.executor;
        let at_save = SaveOptions::default().snapshot(Snapshot::AtSave);
        let at_save = executor.save_with(3, state(3), at_save).map(drop);
        let third = executor.save(3, state(3)).unwrap();
        let refused = [
            at_save,
            second.wait(SHORT).map(drop),
            third.staged().wait(SHORT),
            executor.fence(),
            executor.fence_on(&[]),
            executor.scope(Fence::host(), |_| panic!("no scope is entered")),
            executor.shutdown(SHORT),
            executor.save_with(4, state(4), SaveOptions::default().timeout(SHORT)).map(drop),
        ];
        fixture.device.release();
        send.send((refused.map(|refused| refused.err().map(|error| error.kind())), second, third)).unwrap();
    });
    // Only the copies of the first save may run: those of the others wait until the function has made every
    // forbidden call.
    fixture.device.allow(COPIES);
    let (mut kinds, second, third) = told.recv_timeout(LONG).map(|(kinds, a, b)| (kinds.to_vec(), a, b)).unwrap();
    assert_eq!(kinds.pop(), Some(Some(ErrorKind::Busy)));
    assert_eq!(kinds, [Some(ErrorKind::Invalid); 7]);
    for save in [second, third] {
        assert!(matches!(save.wait(LONG), Ok(Outcome::Durable(_))), "{save:?}");
    }
    fixture.executor.shutdown(LONG).unwrap();
}

/// `shutdown` skipped a failed save while a device still held its copies, and returned `Ok` although its
/// handle had been dropped.
#[test]
fn shutdown_returns_the_error_of_a_failed_save_whose_copies_hang() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let soon = SaveOptions::default().timeout(Duration::from_millis(20));
    let save = fixture.executor.save_with(1, one("t", Arc::new(pattern(1, 9000))), soon).unwrap();
    let staged = save.staged();
    eventually("it has failed", || save.progress().phase == Phase::Ended);
    drop(save);
    let error = fixture.executor.shutdown(Duration::ZERO).unwrap_err();
    assert_eq!((error.kind(), error.step()), (ErrorKind::Deadline, Some(1)));
    assert!(error.message().contains("the save deadline passed"), "{error}");
    fixture.device.release();
    // The error is returned once.
    fixture.executor.shutdown(LONG).unwrap();
    staged.wait(Duration::ZERO).unwrap_err();
}

/// Memory that `save` reads at once, and whose read waits until the channel is closed.
struct Hanging(Arc<Vec<u8>>, mpsc::Sender<()>, std::sync::Mutex<mpsc::Receiver<()>>);

#[expect(unsafe_code, reason = "hands on the promises of the source inside")]
// SAFETY: those of the source inside; no other writes it.
unsafe impl Source for Hanging {
    fn layout(&self) -> Layout {
        self.0.layout()
    }
    fn location(&self) -> MemoryLocation {
        MemoryLocation::Host { bytes: self.0.location().bytes(), writable: true }
    }
    fn read(&self, copy: &mut dyn FnMut(*const u8)) {
        self.1.send(()).unwrap();
        let _ = self.2.lock().unwrap().recv();
        self.0.read(copy);
    }
}

/// `save` held a lock while it read sources, and `shutdown` waited for that lock without a deadline.
#[test]
fn a_source_that_hangs_in_save_does_not_hang_a_shutdown() {
    let fixture = fixture(|b| b.detect(Detect::Never));
    let ((reads, reading), (hold, held)) = (mpsc::channel(), mpsc::channel());
    let source = Hanging(Arc::new(pattern(1, 100)), reads, held.into());
    std::thread::scope(|scope| {
        let saving = scope.spawn(|| fixture.executor.save(1, one("t", source)));
        reading.recv_timeout(LONG).unwrap();
        let (send, closed) = mpsc::channel();
        let executor = &fixture.executor;
        scope.spawn(move || send.send(executor.shutdown(Duration::ZERO)).unwrap());
        let ended = closed.recv_timeout(LONG / 6);
        drop(hold);
        ended.unwrap().unwrap();
        let error = saving.join().unwrap().unwrap_err();
        assert_eq!((error.kind(), error.message()), (ErrorKind::Invalid, "the executor is shut down"));
    });
    fixture.executor.fence().unwrap();
}

/// Only the first `shutdown` had the handles of threads to join: a second one returned at once, while the
/// tidying thread was deleting.
#[test]
fn a_shutdown_after_one_that_was_too_short_waits_for_what_is_left() {
    let directory = tempfile::tempdir().unwrap();
    let sys = Faulty::unsynced(Arc::new(Linux));
    let storage = Arc::new(Local::with_sys(sys.clone(), directory.path()).unwrap());
    let builder = CheckpointExecutor::builder("unused").storage(storage).arena(4 * 4096).chunk(4096);
    let executor = builder.overlap(Overlap::Queue(20)).build().unwrap();
    let held = sys.hold(Call::Unlink);
    let save = |step| executor.save(step, one("t", Arc::new(pattern(step, 900)))).unwrap();
    for save in (1..=16).map(save).collect::<Vec<_>>() {
        save.wait(LONG).unwrap();
    }
    executor.shutdown(Duration::ZERO).unwrap();
    assert_ne!(hidden(directory.path()), [""; 0], "nothing can be deleted yet");
    drop(held);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                executor.shutdown(LONG).unwrap();
                assert_eq!(hidden(directory.path()), [""; 0]);
            });
        }
    });
}
