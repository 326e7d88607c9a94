//! A simulated file system in memory, below the system calls. It shows what a machine may find after a crash.
//!
//! A [`SimFs`] behaves like a file system to the code that runs on it, and logs every change. From the log,
//! [`History::crashes`] makes the disks that a crash after any operation can leave. The calls and a seed
//! determine all results.
//!
//! The model covers:
//! - **Data.** Any subset of the writes since the last fsync of the file may have reached the disk, each torn
//!   at any sector of 512 bytes. Writes have no order among each other.
//! - **Length.** Growth, allocation and truncation are changes separate from data. The lengths of one file
//!   keep their order. Bytes within the length that no write reached read as zeros.
//! - **Names.** An fsync of a file makes its data and length durable, never its name. An fsync of a directory
//!   makes that directory's entries durable, and nothing below or above. Creations, removals and renames
//!   since the directory's last fsync may each be lost, in any combination that keeps the order of operations
//!   on the same name.
//! - **Rename** (plain, no-replace, exchange) is atomic, and may be lost until the directory is fsynced.
//! - **Links** of a file are names of the same bytes. An fsync of its own directory makes each durable. So a
//!   name may be durable while no byte of the file is durable: the file then has its durable length, which is
//!   0 before its first fsync. The file is freed with its last name and its last descriptor.
//! - **Clones** are new files, where the file system supports clones. Until a clone has its own fsync, it may
//!   be empty, have a part of the source's content, or lack data that was written into it later.
//! - **Permissions**: a protected file cannot be opened for writing until a crash.
//! - **Unlink**: if it is lost, the name is back, and the file has its durable content.
//! - **A failed fsync** of a file drops the pending data: the running system still reads the data, but the
//!   disk never gets it. The failure is reported once per descriptor, and the next fsync succeeds. A failed
//!   fsync of a directory leaves its entries pending (file systems stop altogether when they cannot write
//!   names).
//! - **Locks** belong to descriptors and end with them; a crash ends all locks.
//!
//! The model leaves out: time (every age is zero), symbolic links, sparse files larger than memory, the order
//! that a journal would add (this leaves fewer images, all of them among the ones here), and bytes damaged
//! after they were durable.

mod admits;
mod calls;
mod crash;
mod disk;
mod fault;
mod image;
mod replay;
mod state;
#[cfg(test)]
mod tests;

pub use admits::Tree;
pub use crash::{Crash, Crashes, History, Rng};
pub use fault::{Call, Fault};
pub use image::Image;
pub use replay::Replay;

use state::State;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A simulated file system, used through [`Sys`](crate::storage::local::sys::Sys). Clones are the same file
/// system.
#[derive(Clone)]
pub struct SimFs(Arc<Mutex<State>>);

impl SimFs {
    /// Makes an empty file system.
    pub fn new() -> Self {
        Self::boot(&Image::empty())
    }

    /// Boots from `image` after a crash. Everything is durable, and there are no descriptors and no locks.
    pub fn boot(image: &Image) -> Self {
        Self(Arc::new(Mutex::new(State::new(image))))
    }

    /// Sets whether files can be cloned, as on xfs and btrfs. It is false at first, as on ext4.
    pub fn clones(self, clones: bool) -> Self {
        self.lock().clones = clones;
        self
    }

    /// Returns how many operations have changed the file system or made it durable. Data that is acknowledged
    /// now must survive every crash from this position on.
    pub fn position(&self) -> usize {
        self.lock().log.len()
    }

    /// Adds a future fault.
    pub fn fail(&self, fault: Fault) {
        self.lock().faults.push(fault);
    }

    /// Kills the processes after this many more calls: later calls fail and do nothing, until
    /// [`SimFs::restart`].
    pub fn kill_after(&self, calls: u64) {
        self.lock().calls_left = Some(calls);
    }

    /// True when the processes are dead. Calls of dead processes do nothing.
    pub fn killed(&self) -> bool {
        self.lock().calls_left == Some(0)
    }

    /// Starts new processes after the old ones died. They have no descriptors, locks or future faults.
    /// Written data is visible, durable or not.
    pub fn restart(&self) {
        self.lock().restart();
    }

    /// The number of calls of any kind.
    pub fn calls(&self) -> u64 {
        self.lock().calls
    }

    /// The number of open descriptors.
    pub fn open_descriptors(&self) -> usize {
        self.lock().descriptors.len()
    }

    /// Returns what has happened so far.
    pub fn history(&self) -> History {
        let state = self.lock();
        History { base: state.base.clone(), log: Arc::new(state.log.clone()) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for SimFs {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for SimFs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SimFs").field("position", &self.position()).finish_non_exhaustive()
    }
}
