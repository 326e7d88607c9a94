//! A save is a future for any runtime, and something to wait for without one.

use crate::fixtures::executor::{LONG, eventually, fixture, one, pattern};
use ashore::{ErrorKind, Outcome, Overlap, Save, SaveOptions};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::thread;
use std::time::Duration;

fn saves(fixture: &crate::fixtures::executor::Fixture, count: u64) -> Vec<Save> {
    (0..count).map(|step| fixture.executor.save(step, one("t", Arc::new(pattern(step, 9000)))).unwrap()).collect()
}

fn is_durable(outcome: ashore::Result<Outcome>) -> bool {
    matches!(outcome, Ok(Outcome::Durable(_)))
}

#[test]
fn saves_are_awaited_by_tasks_of_tokio() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(100)));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        fixture.device.hold();
        let tasks: Vec<_> = saves(&fixture, 20)
            .into_iter()
            .map(|save| {
                tokio::spawn(async move {
                    save.staged().await.unwrap();
                    is_durable(save.await)
                })
            })
            .collect();
        tokio::task::yield_now().await;
        fixture.device.release();
        for task in tasks {
            assert!(task.await.unwrap());
        }
    });
}

#[test]
fn a_save_is_awaited_by_another_runtime_on_another_thread_and_by_none() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(100)));
    fixture.device.hold();
    let mut saves = saves(&fixture, 3).into_iter();
    let (a, b, c) = (saves.next().unwrap(), saves.next().unwrap(), saves.next().unwrap());
    let other = std::thread::spawn(move || futures_executor::block_on(a));
    let bare = std::thread::spawn(move || b.wait(LONG));
    eventually("a copy is queued", || fixture.device.queued() > 0);
    fixture.device.release();
    assert!(is_durable(ashore::testing::block_on(c)));
    assert!(is_durable(other.join().unwrap()) && is_durable(bare.join().unwrap()));
}

#[test]
fn a_future_that_is_dropped_half_way_detaches_and_another_waiter_sees_the_end() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let mut save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(std::pin::Pin::new(&mut save).poll(&mut cx).is_pending());
    let staged = save.staged();
    drop(save);
    fixture.device.release();
    ashore::testing::block_on(staged).unwrap();
    fixture.executor.shutdown(LONG).unwrap();
}

#[test]
fn progress_counts_up_to_everything() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    eventually("staging", || save.progress().phase == ashore::Phase::Staging);
    // The header needs no device: it may be down already.
    let begun = save.progress();
    assert!(begun.bytes == 9000 && begun.written < 9000, "{begun:?}");
    fixture.device.release();
    save.wait(LONG).unwrap();
    let end = save.progress();
    assert_eq!((end.phase, end.staged), (ashore::Phase::Ended, end.written));
    assert!(end.written >= 9000);
}

/// A waker that polls its save in `wake` itself, as a bridge to another language may.
#[derive(Default)]
struct Inline(Mutex<Option<Save>>, Mutex<Option<ashore::Result<Outcome>>>);

impl Wake for Inline {
    fn wake(self: Arc<Self>) {
        let mut save = self.0.lock().unwrap().take().expect("woken once");
        if let Poll::Ready(ended) = Pin::new(&mut save).poll(&mut Context::from_waker(Waker::noop())) {
            *self.1.lock().unwrap() = Some(ended);
        }
    }
}

/// The committer woke tasks under the lock of the list of waiters, which a poll takes: it hung for ever.
#[test]
fn a_waker_that_polls_the_save_while_it_wakes_hangs_no_thread() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let mut save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    let inline = Arc::new(Inline::default());
    let waker = Waker::from(inline.clone());
    assert!(Pin::new(&mut save).poll(&mut Context::from_waker(&waker)).is_pending());
    *inline.0.lock().unwrap() = Some(save);
    fixture.device.release();
    eventually("the waker has polled", || inline.1.lock().unwrap().is_some());
    assert!(is_durable(inline.1.lock().unwrap().take().unwrap()));
    fixture.executor.save(2, one("t", Arc::new(pattern(2, 9000)))).unwrap().wait(LONG).unwrap();
}

/// The thread that a function was called in, and how the save had ended.
type Told = (String, ashore::Result<Outcome>);

fn told(save: &Save) -> mpsc::Receiver<Told> {
    let (send, told) = mpsc::channel();
    save.on_done(move |ended| send.send((thread::current().name().unwrap_or("").to_owned(), ended)).unwrap());
    told
}

#[test]
fn a_function_is_called_by_the_thread_that_commits_and_may_use_the_executor() {
    let fixture = Arc::new(fixture(|b| b.overlap(Overlap::Block)));
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    let (send, next) = mpsc::channel();
    let weak = Arc::downgrade(&fixture);
    save.on_done(move |ended| {
        let fixture = weak.upgrade().unwrap();
        assert!(is_durable(ended) && fixture.executor.latest().unwrap().unwrap().step() == 1);
        // The queue has space again: an ended save does not count any more.
        send.send(fixture.executor.save(2, one("t", Arc::new(pattern(2, 9000)))).unwrap()).unwrap();
    });
    save.on_done(|_| panic!("a function that fails"));
    let last = told(&save);
    fixture.device.release();
    let (thread, ended) = last.recv_timeout(LONG).unwrap();
    assert!(thread == "ashore-commit" && is_durable(ended), "{thread}");
    assert!(is_durable(next.recv_timeout(LONG).unwrap().wait(LONG)));
    let (thread, ended) = told(&save).try_recv().unwrap();
    assert!(Some(thread.as_str()) == thread::current().name() && is_durable(ended));
}

#[test]
fn a_function_is_told_of_saves_that_were_given_up_and_their_errors_are_seen() {
    let fixture = fixture(|b| b.overlap(Overlap::Latest));
    fixture.device.hold();
    let state = |step| one("t", Arc::new(pattern(step, 9000)));
    let first = fixture.executor.save(1, state(1)).unwrap();
    eventually("the first is being staged", || first.progress().phase == ashore::Phase::Staging);
    let soon = SaveOptions::default().timeout(Duration::from_millis(30));
    let late = told(&fixture.executor.save_with(2, state(2), soon).unwrap());
    let ended = |told: &mpsc::Receiver<Told>| {
        let (thread, ended) = told.recv_timeout(LONG).unwrap();
        assert_eq!(thread, "ashore-call");
        ended
    };
    assert_eq!(ended(&late).unwrap_err().kind(), ErrorKind::Deadline);
    let waiting = fixture.executor.save(3, state(3)).unwrap();
    let (send, superseded) = mpsc::channel();
    waiting.on_done(move |ended| send.send(ended).unwrap());
    let newest = fixture.executor.save(4, state(4)).unwrap();
    assert!(matches!(superseded.recv_timeout(LONG).unwrap(), Ok(Outcome::Superseded { by: 4 })));
    let cancelled = told(&newest);
    assert!(newest.cancel());
    // The stager may see that the save has failed, and pass it to the committer, before `cancel` gives it up.
    let (thread, ended) = cancelled.recv_timeout(LONG).unwrap();
    assert!(["ashore-call", "ashore-commit"].contains(&thread.as_str()), "{thread}");
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::Cancelled);
    let left = told(&first);
    // None of these errors is returned here: each was seen.
    let result = fixture.executor.shutdown(Duration::from_millis(30));
    assert_eq!(result.unwrap_err().step(), Some(1));
    let (thread, ended) = left.try_recv().unwrap();
    assert_eq!((Some(thread.as_str()), ended.unwrap_err().kind()), (thread::current().name(), ErrorKind::Cancelled));
    fixture.device.release();
}

/// Each of these calls ran in a thread of its own, and `shutdown` returned while they did.
#[test]
fn a_shutdown_returns_after_the_calls_of_saves_that_were_given_up() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(100)));
    fixture.device.hold();
    let threads = Arc::new(Mutex::new(Vec::new()));
    for save in saves(&fixture, 20) {
        let threads = threads.clone();
        save.on_done(|_| panic!("a function that fails"));
        save.on_done(move |ended| {
            thread::sleep(Duration::from_millis(5));
            assert_eq!(ended.unwrap_err().kind(), ErrorKind::Cancelled);
            threads.lock().unwrap().push((thread::current().id(), thread::current().name() == Some("ashore-call")));
        });
        assert!(save.cancel());
    }
    fixture.device.release();
    fixture.executor.shutdown(LONG).unwrap();
    let mut threads = threads.lock().unwrap().clone();
    assert_eq!(threads.len(), 20, "all calls have run");
    threads.dedup();
    assert!(matches!(threads[..], [(_, true)]), "in one thread: {threads:?}");
}

/// Only `fence` existed, which blocks its thread, and an asynchronous program cannot block.
#[test]
fn a_task_can_await_the_fence() {
    let fixture = fixture(|b| b.overlap(Overlap::Queue(100)));
    fixture.device.hold();
    let tensor = Arc::new(pattern(1, 9000));
    let save = fixture.executor.save(1, one("t", tensor.clone())).unwrap();
    eventually("a copy is queued", || fixture.device.queued() > 0);
    let mut fenced = fixture.executor.fenced();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        assert!(std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut fenced).poll(cx))).await.is_pending());
        fixture.device.release();
        fenced.await.unwrap();
        assert_eq!(Arc::strong_count(&tensor), 1, "nothing reads it any more");
        fixture.executor.fenced().await.unwrap();
        assert!(is_durable(save.await));
        // A save that failed reads nothing either; its error is not the fence's.
        fixture.device.fail_when_queued(1);
        let failed = fixture.executor.save(2, one("t", tensor.clone())).unwrap();
        fixture.executor.fenced().await.unwrap();
        assert_eq!(Arc::strong_count(&tensor), 1);
        failed.await.unwrap_err();
    });
}
