//! Tells Python's notifier thread which saves have ended, are staged or are durable in a tier.
//!
//! Threads of the engine push numbers to a queue and never take the GIL. One Python thread waits for the
//! numbers here without the GIL, and completes the futures.

use ashore::Save;
use pyo3::prelude::*;
use std::any::Any;
use std::collections::HashMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Wake, Waker};

/// The queues. A forked child uses another queue, because the parent's may have been locked at the fork.
/// Forks within forks reuse the first queue in the end.
static QUEUES: [Queue; 16] = [const { Queue { state: Mutex::new(None), more: Condvar::new() } }; 16];
static CURRENT: AtomicUsize = AtomicUsize::new(0);

fn queue() -> &'static Queue {
    &QUEUES[CURRENT.load(Ordering::Relaxed) % QUEUES.len()]
}

struct Queue {
    state: Mutex<Option<State>>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    ready: Vec<u64>,
    /// Futures whose wakers push to the queue.
    futures: HashMap<u64, Box<dyn Any + Send>>,
    stopped: bool,
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, token: u64) {
        self.lock().get_or_insert_default().ready.push(token);
        self.more.notify_one();
    }
}

/// The waker of one future: it pushes the future's token to the queue.
struct Token(u64);

impl Wake for Token {
    fn wake(self: Arc<Self>) {
        queue().push(self.0);
    }
}

/// Pushes `token` when `save` has ended.
pub fn when_done(save: &Save, token: u64) {
    save.on_done(move |_| queue().push(token));
}

/// Pushes `token` when `future` is ready.
pub fn when_ready(mut future: impl Future + Unpin + Send + 'static, token: u64) {
    let waker = Waker::from(Arc::new(Token(token)));
    let queue = queue();
    // The waker pushes under this lock. So the token is not taken before its future is in the map.
    let mut state = queue.lock();
    let now = state.get_or_insert_default();
    match Pin::new(&mut future).poll(&mut Context::from_waker(&waker)) {
        Poll::Ready(_) => now.ready.push(token),
        Poll::Pending => drop(now.futures.insert(token, Box::new(future))),
    }
    queue.more.notify_one();
}

/// Waits for the next tokens. Returns an empty list once, when none are left after `notify_stop`.
#[pyfunction]
pub fn notify_next(py: Python<'_>) -> Vec<u64> {
    py.detach(|| {
        let queue = queue();
        let mut state = queue.lock();
        loop {
            let now = state.get_or_insert_default();
            if !now.ready.is_empty() {
                let ready = std::mem::take(&mut now.ready);
                let done: Vec<_> = ready.iter().filter_map(|token| now.futures.remove(token)).collect();
                drop(state);
                // The lock is not held here, because the drop of a future may drop a waker.
                drop(done);
                return ready;
            }
            if std::mem::take(&mut now.stopped) {
                return Vec::new();
            }
            state = queue.more.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    })
}

/// Ends the wait of the notifier thread.
#[pyfunction]
pub fn notify_stop() {
    queue().lock().get_or_insert_default().stopped = true;
    queue().more.notify_all();
}

/// Forgets the tokens that the parent of a forked child waits for.
#[pyfunction]
pub fn notify_forget() {
    CURRENT.fetch_add(1, Ordering::Relaxed);
}
