//! The feature `tokio` runs blocking calls on the blocking pool, and the runtime's thread continues.

use crate::fixtures::executor::{LONG, fixture, one, pattern};
use ashore::{Catalog, Checkpoint, CheckpointExecutor, ErrorKind};
use std::future::Future;
use std::sync::Arc;

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

#[test]
fn every_form_gives_what_the_call_of_its_name_gives() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = pattern(1, 9000);
    run(async {
        let executor =
            CheckpointExecutor::builder(dir.path()).arena(4 << 20).chunk(1 << 20).build_async().await.unwrap();
        assert!(executor.latest_async().await.unwrap().is_none());
        executor.save(7, one("t", Arc::new(bytes.clone()))).unwrap().await.unwrap();
        let newest = executor.latest_async().await.unwrap().unwrap();
        assert_eq!(newest.step(), 7);
        let found = executor.latest_valid_async().await.unwrap().unwrap();
        assert_eq!((found.checkpoint.step(), found.skipped.len()), (7, 0));

        let opened = Checkpoint::open_async(newest.path()).await.unwrap();
        assert!(opened.verify_async().await.unwrap().is_sound());
        assert_eq!(opened.read_as_async::<u8>("t").await.unwrap(), bytes);
        let target: &'static mut [u8] = vec![0; 1].leak();
        let short = opened.read_into_async(ashore::Targets::new().bytes("t", target)).await;
        assert_eq!(short.unwrap_err().kind(), ErrorKind::Invalid);

        let missing = Checkpoint::open_async(dir.path().join("step-00000008")).await;
        assert_eq!(missing.unwrap_err().kind(), ErrorKind::NotFound);
        let absent = opened.read_as_async::<u8>("u").await;
        assert_eq!(absent.unwrap_err().kind(), ErrorKind::NotFound);
        executor.shutdown_async(LONG).await.unwrap();
        let refused = executor.save(8, one("t", Arc::new(bytes))).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Invalid);
    });
    assert_eq!(Catalog::open(dir.path()).unwrap().latest().unwrap().unwrap().step(), 7);
}

/// If the shutdown blocked the runtime's one thread, the task that releases the device would never run.
#[test]
fn a_shutdown_that_waits_lets_the_other_tasks_of_its_thread_run() {
    let fixture = fixture(|b| b);
    fixture.device.hold();
    let save = fixture.executor.save(1, one("t", Arc::new(pattern(1, 9000)))).unwrap();
    run(async {
        let (ended, ()) = tokio::join!(fixture.executor.shutdown_async(LONG), async {
            tokio::task::yield_now().await;
            fixture.device.release();
        });
        ended.unwrap();
        assert!(save.await.unwrap().committed().is_some());
    });
}
