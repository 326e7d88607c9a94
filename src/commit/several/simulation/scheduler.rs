//! One thread runs at a time, time is virtual, and the seed decides what happens next.

use std::collections::BinaryHeap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// The payload of the panic by which a thread dies.
pub(super) struct Killed;

/// A small generator: splitmix64.
pub(super) struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// True once in `n` times; never for 0.
    pub fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Status {
    Ready,
    /// Until this time, or until woken.
    Waiting(u64),
    Ended,
}

struct State {
    rng: Rng,
    now: u64,
    running: usize,
    status: Vec<Status>,
    threads: Vec<Option<Thread>>,
    /// Threads that may run, in no order.
    ready: Vec<usize>,
    /// When waiting threads give up, earliest first; entries may be stale.
    alarms: BinaryHeap<std::cmp::Reverse<(u64, usize)>>,
    /// A thread dies at one in so many steps; 0: never.
    deadly: u64,
}

/// See the module. Time is in microseconds.
pub(super) struct Scheduler {
    base: Instant,
    state: Mutex<State>,
}

impl Scheduler {
    /// A scheduler of `threads` threads, all of which are ready.
    pub fn new(seed: u64, threads: usize, deadly: u64) -> Self {
        let state = State {
            rng: Rng::new(seed),
            now: 0,
            running: usize::MAX,
            status: vec![Status::Ready; threads],
            threads: vec![None; threads],
            ready: (0..threads).collect(),
            alarms: BinaryHeap::new(),
            deadly,
        };
        Self { base: Instant::now(), state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn with_rng<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.state().rng)
    }

    pub fn now(&self) -> u64 {
        self.state().now
    }

    /// The instant of a virtual time.
    pub fn instant(&self, time: u64) -> Instant {
        self.base + Duration::from_micros(time)
    }

    /// The virtual time of an instant.
    pub fn time(&self, instant: Instant) -> u64 {
        instant.saturating_duration_since(self.base).as_micros() as u64
    }

    /// Called by a thread when it begins: waits for its turn.
    pub fn enter(&self, me: usize) {
        let mut state = self.state();
        state.threads[me] = Some(std::thread::current());
        let all = state.threads.iter().all(Option::is_some);
        if all {
            Self::choose(&mut state);
        }
        drop(state);
        self.wait(me);
    }

    /// Called by a thread when it ends.
    pub fn leave(&self, me: usize) {
        let mut state = self.state();
        state.status[me] = Status::Ended;
        Self::choose(&mut state);
    }

    /// Lets other threads run before the next step of this one. The thread may die here.
    pub fn step(&self, me: usize) {
        let mut state = self.state();
        let deadly = state.deadly;
        if state.rng.one_in(deadly) {
            drop(state);
            std::panic::resume_unwind(Box::new(Killed));
        }
        state.now += 1;
        state.ready.push(me);
        Self::choose(&mut state);
        drop(state);
        self.wait(me);
    }

    /// Sleeps until `time`, or until another thread wakes this one.
    pub fn sleep(&self, me: usize, time: u64) {
        let mut state = self.state();
        state.status[me] = Status::Waiting(time);
        state.alarms.push(std::cmp::Reverse((time, me)));
        Self::choose(&mut state);
        drop(state);
        self.wait(me);
    }

    /// Wakes a sleeping thread.
    pub fn wake(&self, who: usize) {
        let mut state = self.state();
        if matches!(state.status[who], Status::Waiting(_)) {
            state.status[who] = Status::Ready;
            state.ready.push(who);
        }
    }

    fn wait(&self, me: usize) {
        while self.state().running != me {
            std::thread::park();
        }
    }

    /// Chooses the thread that runs next; advances the time when all threads wait.
    fn choose(state: &mut State) {
        if state.ready.is_empty() {
            while let Some(std::cmp::Reverse((time, who))) = state.alarms.pop() {
                if state.status[who] == Status::Waiting(time) {
                    state.now = state.now.max(time);
                    state.status[who] = Status::Ready;
                    state.ready.push(who);
                    break;
                }
            }
        }
        let many = state.ready.len() as u64;
        if many == 0 {
            state.running = usize::MAX;
            return;
        }
        let at = state.rng.below(many) as usize;
        let next = state.ready.swap_remove(at);
        state.running = next;
        if let Some(Some(thread)) = state.threads.get(next) {
            thread.unpark();
        }
    }
}
