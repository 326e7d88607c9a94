//! A save is a future for any runtime, and something to wait for without one.

use crate::rig::{LONG, eventually, one, pattern, rig};
use ashore::{Outcome, Overlap, Save};
use std::sync::Arc;

fn saves(rig: &crate::rig::Rig, count: u64) -> Vec<Save> {
    (0..count).map(|step| rig.executor.save(step, one("t", Arc::new(pattern(step, 9000)))).unwrap()).collect()
}

fn is_durable(outcome: ashore::Result<Outcome>) -> bool {
    matches!(outcome, Ok(Outcome::Durable(_)))
}

#[test]
fn under_tokio_in_tasks_of_their_own() {
    let rig = rig(|b| b.overlap(Overlap::Queue(100)));
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        rig.device.hold();
        let tasks: Vec<_> = saves(&rig, 20)
            .into_iter()
            .map(|save| {
                tokio::spawn(async move {
                    save.staged().await.unwrap();
                    is_durable(save.await)
                })
            })
            .collect();
        tokio::task::yield_now().await;
        rig.device.release();
        for task in tasks {
            assert!(task.await.unwrap());
        }
    });
}

#[test]
fn under_another_executor_on_another_thread_and_on_none() {
    let rig = rig(|b| b.overlap(Overlap::Queue(100)));
    rig.device.hold();
    let mut saves = saves(&rig, 3).into_iter();
    let (a, b, c) = (saves.next().unwrap(), saves.next().unwrap(), saves.next().unwrap());
    let other = std::thread::spawn(move || futures_executor::block_on(a));
    let bare = std::thread::spawn(move || b.wait(LONG));
    eventually("a copy is queued", || rig.device.queued() > 0);
    rig.device.release();
    assert!(is_durable(ashore::testing::block_on(c)));
    assert!(is_durable(other.join().unwrap()) && is_durable(bare.join().unwrap()));
}

#[test]
fn a_future_that_is_dropped_half_way_detaches_and_another_waiter_sees_the_end() {
    let rig = rig(|b| b);
    rig.device.hold();
    let mut save = rig.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(std::pin::Pin::new(&mut save).poll(&mut cx).is_pending());
    let staged = save.staged();
    drop(save);
    rig.device.release();
    ashore::testing::block_on(staged).unwrap();
    rig.executor.shutdown(LONG).unwrap();
}

#[test]
fn progress_counts_up_to_everything() {
    let rig = rig(|b| b);
    rig.device.hold();
    let save = rig.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    eventually("staging", || save.progress().phase == ashore::Phase::Staging);
    // The header needs no device: it may be down already.
    let begun = save.progress();
    assert!(begun.bytes == 9000 && begun.written < 9000, "{begun:?}");
    rig.device.release();
    save.wait(LONG).unwrap();
    let end = save.progress();
    assert_eq!((end.phase, end.staged), (ashore::Phase::Ended, end.written));
    assert!(end.written >= 9000);
}
