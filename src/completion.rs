//! A value that is set once. Any async runtime can await it; a thread can wait for it until a deadline.
//!
//! A future costs no thread and no polling: the cell keeps the wakers of tasks and the calls to make, and
//! `event-listener` keeps the sleeping threads. The first value wins. A later waiter finds this value.
//! **Locks.** Wakers and calls are code of the program. They are cloned, run and dropped while no lock of the
//! cell is held, so they may read the cell at once. Their panics end no thread.

use crate::error::Result;
use crate::guard::logged;
use crate::sync::{Arc, Mutex, lock};
use event_listener::{Event, EventListener, Listener};
use std::fmt;
use std::future::Future;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

/// A result that is set once and may have many waiters.
pub(crate) type Cell<T> = Arc<Completion<Result<T>>>;

/// Returns the instant `timeout` from now, or a hundred years from now if that overflows.
pub(crate) fn deadline_after(timeout: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(timeout).unwrap_or_else(|| now + Duration::from_secs(100 * 365 * 24 * 3600))
}

/// A call to make with the value when it is set.
type Call<T> = Box<dyn FnOnce(T) + Send>;

/// The cell that the setter and the waiters share.
pub(crate) struct Completion<T> {
    state: Mutex<State<T>>,
    event: Event,
}

struct State<T> {
    value: Option<T>,
    /// Wakers of tasks, each under the number of its waiter.
    wakers: Vec<(u64, Waker)>,
    numbers: u64,
    calls: Vec<Call<T>>,
}

impl<T: fmt::Debug> fmt::Debug for Completion<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Completion({:?})", lock(&self.state).value)
    }
}

impl<T: Clone> Completion<T> {
    pub fn new() -> Self {
        let state = State { value: None, wakers: Vec::new(), numbers: 0, calls: Vec::new() };
        Self { state: Mutex::new(state), event: Event::new() }
    }

    /// Sets `value`, and wakes and calls all waiters. Returns false, without effect, if a value is set
    /// already.
    pub fn complete(&self, value: T) -> bool {
        self.put(value).map(Calls::here).is_some()
    }

    /// Sets `value`, wakes sleeping threads, and returns the tasks to wake and the calls to make. None,
    /// without effect, if a value is set already.
    pub fn put(&self, value: T) -> Option<Calls<T>> {
        let mut state = lock(&self.state);
        if state.value.is_some() {
            return None;
        }
        state.value = Some(value.clone());
        let (wakers, calls) = (std::mem::take(&mut state.wakers), std::mem::take(&mut state.calls));
        drop(state);
        self.event.notify(usize::MAX);
        Some(Calls { wakers, calls, value })
    }

    /// Runs `call` with the value when the value is set, or at once if it is set already.
    pub fn on_value(&self, call: Box<dyn FnOnce(T) + Send>) {
        let mut state = lock(&self.state);
        match state.value.clone() {
            None => state.calls.push(call),
            Some(value) => {
                drop(state);
                Calls { wakers: Vec::new(), calls: vec![call], value }.here();
            }
        }
    }

    pub fn get(&self) -> Option<T> {
        lock(&self.state).value.clone()
    }

    pub fn is_complete(&self) -> bool {
        lock(&self.state).value.is_some()
    }

    /// Blocks the thread until the value is set or `deadline` has passed.
    pub fn wait(&self, deadline: Instant) -> Option<T> {
        self.wait_while(|listener| park(listener, deadline))
    }

    /// Blocks the thread until the value is set. Only for waits that would be unsound to cut short.
    pub fn wait_forever(&self) -> Option<T> {
        self.wait_while(|listener| {
            listener.wait();
            true
        })
    }

    fn wait_while(&self, park: impl Fn(EventListener) -> bool) -> Option<T> {
        loop {
            if let Some(value) = self.get() {
                return Some(value);
            }
            let listener = self.event.listen();
            if let Some(value) = self.get() {
                return Some(value);
            }
            if !park(listener) {
                return self.get();
            }
        }
    }
}

/// Sleeps until notified; false at the deadline.
fn park(listener: EventListener, deadline: Instant) -> bool {
    if cfg!(loom) {
        // Loom has no time: a sleeper must be woken.
        listener.wait();
        return true;
    }
    listener.wait_deadline(deadline).is_some()
}

/// The tasks to wake and the calls to make after a value has been set. Sleeping threads are woken already.
#[must_use = "tasks that wait for the value are woken by `here`, or by the call thread that this is handed to"]
pub(crate) struct Calls<T> {
    wakers: Vec<(u64, Waker)>,
    calls: Vec<Call<T>>,
    value: T,
}

impl<T> fmt::Debug for Calls<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Calls({})", self.calls.len())
    }
}

impl<T: Clone> Calls<T> {
    /// Wakes the tasks and makes the calls in this thread, which holds no lock.
    pub fn here(mut self) {
        self.wake();
        let Self { calls, value, .. } = self;
        calls.into_iter().for_each(|call| tell(|| call(value.clone())));
    }

    /// Wakes the tasks in this thread, which holds no lock. The calls stay.
    pub fn wake(&mut self) {
        std::mem::take(&mut self.wakers).into_iter().for_each(|(_, waker)| tell(|| waker.wake()));
    }

    /// Whether there are no calls to make.
    pub fn are_none(&self) -> bool {
        self.calls.is_empty()
    }
}

/// Runs code of the program; logs a panic.
fn tell(code: impl FnOnce()) {
    logged("code that was to be told of the end of a save panicked", code);
}

/// The future of a [`Completion`]. A completion may have any number of them.
#[derive(Debug)]
pub(crate) struct Waiter<T: Clone> {
    cell: Arc<Completion<T>>,
    /// The number under which the cell keeps, or has kept, the waker of this waiter.
    number: Option<u64>,
}

impl<T: Clone> Waiter<T> {
    pub fn new(cell: Arc<Completion<T>>) -> Self {
        Self { cell, number: None }
    }

    pub fn cell(&self) -> &Completion<T> {
        &self.cell
    }
}

/// Waits for the same value.
impl<T: Clone> Clone for Waiter<T> {
    fn clone(&self) -> Self {
        Self::new(self.cell.clone())
    }
}

impl<T: Clone> Future for Waiter<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let waker = cx.waker().clone();
        let mut state = lock(&self.cell.state);
        if let Some(value) = state.value.clone() {
            return Poll::Ready(value);
        }
        let number = self.number.unwrap_or_else(|| {
            state.numbers += 1;
            state.numbers
        });
        let kept = state.wakers.iter_mut().find(|(kept, _)| *kept == number);
        let replaced = match kept {
            Some((_, kept)) => Some(std::mem::replace(kept, waker)),
            None => {
                state.wakers.push((number, waker));
                None
            }
        };
        drop(state);
        drop(replaced);
        self.number = Some(number);
        Poll::Pending
    }
}

impl<T: Clone> Drop for Waiter<T> {
    fn drop(&mut self) {
        let Some(number) = self.number else { return };
        let mut state = lock(&self.cell.state);
        let at = state.wakers.iter().position(|(kept, _)| *kept == number);
        let waker = at.map(|at| state.wakers.swap_remove(at));
        drop(state);
        drop(waker);
    }
}

/// Wakes threads that wait for one of several conditions. A notification between the check and the sleep is
/// not lost: a waiter listens first, then checks.
#[derive(Debug, Default)]
pub(crate) struct Signal(Event);

impl std::task::Wake for Signal {
    fn wake(self: std::sync::Arc<Self>) {
        self.notify();
    }
}

impl Signal {
    pub fn notify(&self) {
        self.0.notify(usize::MAX);
    }

    /// Calls `look` after each notification and returns its first `Some`; None at the deadline.
    pub fn wait_until<T>(&self, deadline: Instant, mut look: impl FnMut() -> Option<T>) -> Option<T> {
        loop {
            let listener = self.0.listen();
            if let Some(found) = look() {
                return Some(found);
            }
            if !park(listener, deadline) {
                return look();
            }
        }
    }
}

/// Drives `future` on this thread; None at the deadline.
pub(crate) fn block_on<F: Future>(future: F, deadline: Instant) -> Option<F::Output> {
    let signal = std::sync::Arc::new(Signal::default());
    let waker = Waker::from(signal.clone());
    let (mut future, mut context) = (pin!(future), Context::from_waker(&waker));
    signal.wait_until(deadline, || match future.as_mut().poll(&mut context) {
        Poll::Ready(output) => Some(output),
        Poll::Pending => None,
    })
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn the_first_value_wins_and_late_waiters_find_it() {
        let cell = Completion::new();
        assert_eq!(cell.wait(Instant::now()), None);
        assert!(cell.complete(1) && !cell.complete(2));
        assert_eq!((cell.get(), cell.wait(Instant::now()), cell.wait_forever()), (Some(1), Some(1), Some(1)));
    }

    #[test]
    fn threads_and_tasks_are_woken_together() {
        let cell = Arc::new(Completion::new());
        let long = Instant::now() + Duration::from_secs(60);
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| cell.wait(long))).collect();
            let task = scope.spawn(|| crate::testing::block_on(Waiter::new(cell.clone())));
            cell.complete(7);
            assert!(threads.into_iter().all(|t| t.join().unwrap() == Some(7)));
            assert_eq!(task.join().unwrap(), 7);
        });
    }

    #[test]
    fn a_waiter_that_is_dropped_leaves_nothing_behind() {
        let cell = Arc::new(Completion::new());
        let mut waiter = Box::pin(Waiter::new(cell.clone()));
        let mut cx = Context::from_waker(std::task::Waker::noop());
        assert!(waiter.as_mut().poll(&mut cx).is_pending());
        drop(waiter);
        assert_eq!(Arc::strong_count(&cell), 1);
        assert!(lock(&cell.state).wakers.is_empty());
        cell.complete(1);
    }

    /// Polls the future in `wake` itself, as bridges to other languages do. Also reads the cell when it is
    /// dropped.
    struct Inline(Mutex<Option<Waiter<i32>>>, Arc<Completion<i32>>, std::sync::atomic::AtomicUsize);

    impl std::task::Wake for Inline {
        fn wake(self: std::sync::Arc<Self>) {
            let mut waiter = lock(&self.0).take().expect("woken once");
            let mut cx = Context::from_waker(Waker::noop());
            assert_eq!(Pin::new(&mut waiter).poll(&mut cx), Poll::Ready(5));
            self.2.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }

    impl Drop for Inline {
        fn drop(&mut self) {
            self.1.get();
        }
    }

    /// Regression: the list of waiters was locked during wakes, so a waker that polled inline hung the thread
    /// that ended the save.
    #[test]
    fn a_waker_that_polls_while_it_wakes_finds_the_value() {
        let cell = Arc::new(Completion::new());
        let inline = std::sync::Arc::new(Inline(Mutex::new(None), cell.clone(), 0.into()));
        let (waker, mut waiter) = (Waker::from(inline.clone()), Waiter::new(cell.clone()));
        assert!(Pin::new(&mut waiter).poll(&mut Context::from_waker(&waker)).is_pending());
        *lock(&inline.0) = Some(waiter);
        drop(waker);
        let (done, ended) = std::sync::mpsc::channel();
        let completer = cell.clone();
        std::thread::spawn(move || done.send(completer.complete(5)));
        assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok(true));
        assert_eq!(inline.2.load(std::sync::atomic::Ordering::Relaxed), 1);
    }

    #[test]
    fn what_is_to_be_called_is_called_once_and_a_panic_keeps_no_other() {
        let (cell, (send, called)) = (Completion::new(), std::sync::mpsc::channel());
        for number in 1..=4 {
            let send = send.clone();
            cell.on_value(Box::new(move |value: i32| {
                assert_ne!(number, 2, "a call that fails");
                send.send((number, value)).unwrap();
            }));
            if number == 3 {
                assert!(cell.complete(7) && !cell.complete(8));
            }
        }
        drop(send);
        assert_eq!(called.iter().collect::<Vec<_>>(), [(1, 7), (3, 7), (4, 7)]);
    }
}

#[cfg(all(test, loom))]
mod models {
    use super::*;
    use loom::thread;

    #[test]
    fn a_thread_that_waits_is_always_woken_and_one_of_two_values_wins() {
        loom::model(|| {
            let cell = Arc::new(Completion::new());
            let (first, second) = (cell.clone(), cell.clone());
            let first = thread::spawn(move || first.complete(1));
            let second = thread::spawn(move || second.complete(2));
            let value = cell.wait_forever();
            let won = (first.join().unwrap(), second.join().unwrap());
            assert!(matches!((won, value), ((true, false), Some(1)) | ((false, true), Some(2))));
        });
    }

    #[test]
    fn a_task_that_waits_is_always_woken() {
        loom::model(|| {
            let cell = Arc::new(Completion::new());
            let completer = cell.clone();
            let completer = thread::spawn(move || completer.complete(1));
            assert_eq!(loom::future::block_on(Waiter::new(cell)), 1);
            assert!(completer.join().unwrap());
        });
    }

    #[test]
    fn what_is_to_be_called_is_called_once_before_or_after_the_value() {
        loom::model(|| {
            let (cell, sum) = (Arc::new(Completion::new()), Arc::new(Mutex::new(0)));
            let (completer, called) = (cell.clone(), sum.clone());
            let completer = thread::spawn(move || completer.complete(3));
            cell.on_value(Box::new(move |value| *lock(&called) += value));
            assert!(completer.join().unwrap());
            assert_eq!(*lock(&sum), 3);
        });
    }

    #[test]
    fn a_signal_between_look_and_sleep_is_not_lost() {
        loom::model(|| {
            let (signal, flag) = (Arc::new(Signal::default()), Arc::new(Mutex::new(false)));
            let (notifier, raised) = (signal.clone(), flag.clone());
            let notifier = thread::spawn(move || {
                *lock(&raised) = true;
                notifier.notify();
            });
            assert_eq!(signal.wait_until(Instant::now(), || lock(&flag).then_some(1)), Some(1));
            notifier.join().unwrap();
        });
    }
}
