//! A local storage that is slow to begin an attempt, does not answer, or is full.

use ashore::storage::local::Local;
use ashore::storage::{Reading, Storage, Sweep, Swept, Writing};
use ashore::{Attempt, Error, ErrorKind, Result};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

#[derive(Debug)]
pub struct Troubled {
    storage: Local,
    delay: Duration,
    /// Listings fail.
    pub away: AtomicBool,
    /// No attempt can be begun.
    pub full: AtomicBool,
    /// Calls that begin an attempt wait.
    pub held: AtomicBool,
}

impl Troubled {
    /// Begins an attempt after `delay`.
    pub fn slow(storage: Local, delay: Duration) -> Self {
        let [away, full, held] = [(); 3].map(|()| AtomicBool::new(false));
        Self { storage, delay, away, full, held }
    }
}

impl Storage for Troubled {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        while self.held.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(self.delay);
        if self.full.load(Ordering::Relaxed) {
            let full = std::io::Error::from_raw_os_error(28);
            return Err(Error::io("cannot allocate a file", full).with_path(self.describe(name)));
        }
        self.storage.begin(name, attempt, overwrite)
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.storage.open(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        if self.away.load(Ordering::Relaxed) {
            let error = Error::new(ErrorKind::Unavailable, "the root does not answer");
            return Err(error.with_path(self.describe("")));
        }
        self.storage.list()
    }

    fn confirm(&self, name: &str) -> Result<()> {
        self.storage.confirm(name)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.storage.remove(name)
    }

    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.storage.sweep(how)
    }

    fn hint(&self, name: &str) -> Result<()> {
        self.storage.hint(name)
    }

    fn describe(&self, name: &str) -> PathBuf {
        self.storage.describe(name)
    }
}
