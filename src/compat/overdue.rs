//! Futures of the faces that no engine expires: one thread ends those whose deadline has passed.

use crate::completion::{Completion, Signal};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc as CellArc, Mutex, lock};
use crate::writer::spawn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// A result that comes once, and that many may wait for.
pub(crate) type Cell<T> = CellArc<Completion<Result<T>>>;

type Expire = Box<dyn Fn() -> bool + Send>;

#[derive(Default)]
struct Watched {
    /// Deadline, whether it has come, and how it is ended.
    cells: Mutex<Vec<(Instant, Expire, Expire)>>,
    signal: Signal,
    stopped: AtomicBool,
}

/// The thread, which ends with this.
pub(crate) struct Overdue(Arc<Watched>);

impl Overdue {
    /// Starts the thread.
    ///
    /// # Errors
    /// `Busy` when there is none to be had.
    pub fn start() -> Result<Self> {
        let watched = Arc::new(Watched::default());
        let watching = watched.clone();
        spawn("ashore-overdue".into(), move || watch(&watching))?;
        Ok(Self(watched))
    }

    /// Fails `cell` at `deadline`, unless it has come by then.
    pub fn watch<T: Clone + Send + 'static>(&self, cell: &Cell<T>, deadline: Instant, what: &'static str) {
        let (done, late) = (cell.clone(), cell.clone());
        let expire = move || late.complete(Err(Error::new(ErrorKind::Deadline, what)));
        lock(&self.0.cells).push((deadline, Box::new(move || done.is_complete()), Box::new(expire)));
        self.0.signal.notify();
    }
}

impl Drop for Overdue {
    fn drop(&mut self) {
        self.0.stopped.store(true, Ordering::Release);
        self.0.signal.notify();
    }
}

impl std::fmt::Debug for Overdue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Overdue({})", lock(&self.0.cells).len())
    }
}

fn watch(watched: &Watched) {
    while !watched.stopped.load(Ordering::Acquire) {
        let now = Instant::now();
        let (due, known, until) = {
            let mut cells = lock(&watched.cells);
            let unended = std::mem::take(&mut *cells).into_iter().filter(|(_, done, _)| !done());
            let (due, later): (Vec<_>, Vec<_>) = unended.partition(|(deadline, ..)| *deadline <= now);
            *cells = later;
            let next = cells.iter().map(|(deadline, ..)| *deadline).min();
            (due, cells.len(), next.unwrap_or(now + Duration::from_secs(3600)))
        };
        // With no lock held: what a future wakes may come back here.
        due.into_iter().for_each(|(_, _, expire)| _ = expire());
        watched.signal.wait_until(until, || {
            (watched.stopped.load(Ordering::Acquire) || lock(&watched.cells).len() != known).then_some(())
        });
    }
}
