//! Executors show other hosts that their attempts are alive.

use crate::fixtures::executor::LONG;
use crate::fixtures::hooked::{Call, Hooked};
use ashore::CheckpointExecutor;
use ashore::storage::Memory;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Regression: the tidying thread touched the records of live attempts between two rounds of its work. A
/// first sweep that deleted terabytes took longer than the age at which another host considers an attempt
/// abandoned.
#[test]
fn a_sweep_that_takes_long_does_not_keep_attempts_from_being_touched() {
    let ((begun, swept), (allow, allowed), (touches, touched)) = (channel(), channel::<()>(), channel());
    let allowed = Mutex::new(allowed);
    let storage = Arc::new(Hooked::new(Memory::new(), move |call| {
        match call {
            Call::Sweep => {
                let _ = begun.send(());
                let _ = allowed.lock().unwrap().recv_timeout(LONG);
            }
            Call::Touch => drop(touches.send(())),
            _ => {}
        }
        Ok(())
    }));
    let gone = Arc::downgrade(&storage);
    let builder = CheckpointExecutor::builder("in memory").storage(storage).arena(4 * 4096).chunk(4096);
    let executor = builder.touch_every(Duration::from_millis(1)).build().unwrap();
    swept.recv_timeout(LONG).unwrap();
    touched.try_iter().for_each(drop);
    let during = (0..3).filter(|_| touched.recv_timeout(Duration::from_secs(10)).is_ok()).count();
    drop(allow);
    executor.shutdown(LONG).unwrap();
    assert_eq!(during, 3);
    drop(executor);
    assert!(gone.upgrade().is_none(), "the thread ends with the executor");
}
