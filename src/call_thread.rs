//! The call thread of an executor. It calls the functions given to `Save::on_done` of saves that are given up
//! or superseded, because no other thread may call them.
//!
//! Each executor has one call thread, with a queue of at most one entry per save that is under way.
//! [`CallThread::close`] comes after the other threads of the executor have ended. The call thread then runs
//! the queued calls, and ends. A thread may end a save before the close and hand over its calls after it; it
//! then starts a thread for these calls alone.
//! **Locks.** No lock is held while a call runs.

use crate::completion::{Calls, Signal};
use crate::error::Result;
use crate::outcome::Outcome;
use crate::own_threads;
use crate::sync::{Mutex, lock};
use crossbeam_channel::{Receiver, Sender, unbounded};
use std::sync::Arc;

/// The name of the thread.
pub(crate) const NAME: &str = "ashore-call";

/// The tasks to wake and functions to call at the end of one save.
type Told = Calls<Result<Outcome>>;

/// The queue of the call thread. The thread ends when the queue is closed or dropped.
#[derive(Debug)]
pub(crate) struct CallThread {
    handed: Mutex<Option<Sender<Told>>>,
    queue: Receiver<Told>,
    signal: Arc<Signal>,
}

impl CallThread {
    /// Makes the queue. `signal` is the signal of the executor.
    pub fn new(signal: Arc<Signal>) -> Self {
        let (handed, queue) = unbounded();
        Self { handed: Mutex::new(Some(handed)), queue, signal }
    }

    /// The body of the thread. It holds no sender, so it does not keep the queue open.
    pub fn body(&self) -> impl FnOnce() + Send + use<> {
        let (queue, signal) = (self.queue.clone(), self.signal.clone());
        move || {
            own_threads::mark(&signal);
            queue.into_iter().for_each(Calls::here);
        }
    }

    /// Wakes tasks in the calling thread, which holds no lock, and makes the call thread call the functions.
    pub fn hand(&self, mut calls: Told) {
        calls.wake();
        if calls.are_none() {
            return;
        }
        let refused = match &*lock(&self.handed) {
            Some(queue) => queue.send(calls).err().map(|refused| refused.0),
            None => Some(calls),
        };
        refused.into_iter().for_each(|calls| self.alone(calls));
    }

    /// Closes the queue: the thread ends after the queued calls.
    pub fn close(&self) {
        drop(lock(&self.handed).take());
    }

    /// Runs `calls` in a thread of their own, because other threads may wait for the calling thread. If the
    /// system has no more threads, the calls run in the calling thread.
    fn alone(&self, calls: Told) {
        let of_one = Self::new(self.signal.clone());
        of_one.hand(calls);
        of_one.close();
        if std::thread::Builder::new().name(NAME.into()).spawn(of_one.body()).is_err() {
            of_one.queue.into_iter().for_each(Calls::here);
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::completion::Completion;
    use crate::error::Error;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Hands over a call that reports its thread.
    fn hand(calls: &CallThread) -> mpsc::Receiver<(std::thread::ThreadId, bool)> {
        let (cell, (send, told)) = (Completion::new(), mpsc::channel());
        let signal = calls.signal.clone();
        cell.on_value(Box::new(|_| panic!("a function that fails")));
        cell.on_value(Box::new(move |_| {
            send.send((std::thread::current().id(), own_threads::is_one_of(&signal))).unwrap();
        }));
        cell.put(Err(Error::invalid("given up"))).into_iter().for_each(|told| calls.hand(told));
        told
    }

    #[test]
    fn calls_of_given_up_saves_run_in_one_thread_until_it_is_closed_and_alone_after_that() {
        let calls = CallThread::new(Arc::default());
        let thread = std::thread::spawn(calls.body());
        let own = (thread.thread().id(), true);
        let before: Vec<_> = (0..3).map(|_| hand(&calls)).collect();
        calls.close();
        thread.join().unwrap();
        assert!(before.iter().all(|told| told.try_recv() == Ok(own)), "all of them ran before it ended");
        let (later, marked) = hand(&calls).recv_timeout(Duration::from_secs(60)).unwrap();
        assert!(marked && later != own.0 && later != std::thread::current().id());
    }

    #[test]
    fn the_thread_ends_with_the_last_owner_of_its_queue() {
        let calls = CallThread::new(Arc::default());
        let thread = std::thread::spawn(calls.body());
        drop(calls);
        thread.join().unwrap();
    }
}
