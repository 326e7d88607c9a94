//! Shows other hosts that the attempts of this executor are alive.
//!
//! It has its own thread, so that no work of another thread, such as a sweep of many files, delays it.

use super::tidy::attempt;
use crate::storage::Storage;
use crossbeam_channel::{Receiver, RecvTimeoutError};
use std::time::Duration;

/// How often live attempts are touched.
pub(super) const TOUCH_INTERVAL: Duration = Duration::from_secs(5 * 60);

/// The body of the touch thread: touches once per `every`, until the sender of `ended` is dropped.
pub(super) fn run(ended: &Receiver<()>, storage: &dyn Storage, every: Duration) {
    while ended.recv_timeout(every) == Err(RecvTimeoutError::Timeout) {
        attempt("show that attempts are alive", || storage.touch());
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use crate::CheckpointExecutor;
    use crate::error::Result;
    use crate::id::Attempt;
    use crate::storage::{Memory, Reading, Storage, Sweep, Swept, Writing};
    use crossbeam_channel::{Receiver, Sender, unbounded};
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::time::Duration;

    const LONG: Duration = Duration::from_secs(60);

    /// Storage that blocks each sweep until the test allows it, and reports each touch.
    #[derive(Debug)]
    struct Slow {
        memory: Memory,
        sweeps: Sender<()>,
        allowed: Receiver<()>,
        touches: Sender<()>,
    }

    impl Storage for Slow {
        fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
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
            let _ = self.sweeps.send(());
            let _ = self.allowed.recv_timeout(LONG);
            self.memory.sweep(how)
        }
        fn touch(&self) -> Result<()> {
            let _ = self.touches.send(());
            Ok(())
        }
        fn hint(&self, name: &str) -> Result<()> {
            self.memory.hint(name)
        }
        fn describe(&self, name: &str) -> PathBuf {
            self.memory.describe(name)
        }
    }

    /// Regression: the tidying thread touched the records of live attempts between two rounds of its work. A
    /// first sweep that deleted terabytes took longer than the age at which another host considers an attempt
    /// abandoned.
    #[test]
    fn a_sweep_that_takes_long_does_not_keep_attempts_from_being_touched() {
        let (sweeps, swept) = unbounded();
        let (allow, allowed) = unbounded();
        let (touches, touched) = unbounded();
        let storage = Arc::new(Slow { memory: Memory::new(), sweeps, allowed, touches });
        let gone = Arc::downgrade(&storage);
        let mut builder = CheckpointExecutor::builder("in memory").storage(storage).arena(4 * 4096).chunk(4096);
        builder.touch = Duration::from_millis(1);
        let executor = builder.build().unwrap();
        swept.recv_timeout(LONG).unwrap();
        touched.try_iter().for_each(drop);
        let during = (0..3).filter(|_| touched.recv_timeout(Duration::from_secs(10)).is_ok()).count();
        drop(allow);
        executor.shutdown(LONG).unwrap();
        assert_eq!(during, 3);
        drop(executor);
        assert!(gone.upgrade().is_none(), "the thread ends with the executor");
    }
}
