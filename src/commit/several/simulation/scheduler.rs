//! One rank runs at a time, time is virtual, and the seed decides what happens next.
//!
//! Each rank is a coroutine with a stack of its own. So blocking production code runs unchanged, and 20,000
//! ranks need no threads.

use super::memory::outside;
use generator::{Generator, Gn};
use std::any::Any;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The payload of the panic by which a rank dies.
pub(super) struct Killed;

/// The function that a rank runs.
pub(super) type Body = Box<dyn FnOnce() + Send>;

/// How a rank ended: the payload of its panic, if it panicked.
pub(super) type Ended = Result<(), Box<dyn Any + Send>>;

/// The stack of a rank, in words of 8 bytes. Only the pages that are used take memory.
const STACK: usize = 32 << 10;

/// A seed that still runs after this many turns of each rank counts as endless.
const MOST_TURNS: u64 = 1 << 20;

/// A small generator: splitmix64.
pub(super) struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed ^ 0x9e37_79b9_7f4a_7c15)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mixed(self.0)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    /// True once in `n` times; never for 0.
    pub fn one_in(&mut self, n: u64) -> bool {
        n > 0 && self.below(n) == 0
    }
}

/// Every bit of the result depends on every bit of `z`.
pub(super) fn mixed(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The clock of a rank, relative to the time of the simulation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    /// Microseconds that it is ahead at the beginning.
    pub ahead: u64,
    /// Microseconds that it gains in a second; negative: loses.
    pub gain: i64,
}

#[derive(Clone, Copy, PartialEq)]
enum Status {
    Ready,
    /// The rank waits until this time, or until it is woken.
    Waiting(u64),
    Ended,
}

struct State {
    rng: Rng,
    now: u64,
    /// Turns so far.
    turns: u64,
    status: Vec<Status>,
    /// Ranks that have been killed. Operations of their destructors have no effect.
    dead: Vec<bool>,
    /// Ranks that may run, in no order.
    ready: Vec<usize>,
    /// When waiting ranks give up, earliest first; entries may be stale.
    alarms: BinaryHeap<Reverse<(u64, usize)>>,
    /// A rank dies at one in this many steps; 0: never.
    deadly: u64,
    /// The number of steps that the first rank has left before it dies; 0: no limit.
    left: u64,
    /// A hash of the order in which ranks ran, equal for two runs of a seed.
    trace: u64,
}

/// The scheduler of a simulation; see the module. Time is in microseconds.
pub(super) struct Scheduler {
    base: Instant,
    clocks: Vec<Clock>,
    state: Mutex<State>,
}

impl Scheduler {
    /// A scheduler with one rank for each clock. All ranks are ready.
    pub fn new(seed: u64, clocks: Vec<Clock>, deadly: u64, first_dies: u64) -> Self {
        let ranks = clocks.len();
        let state = State {
            rng: Rng::new(seed),
            now: 0,
            turns: 0,
            status: vec![Status::Ready; ranks],
            dead: vec![false; ranks],
            // The list is never longer than this.
            ready: (0..ranks).collect(),
            alarms: BinaryHeap::new(),
            deadly,
            left: first_dies,
            trace: 0,
        };
        Self { base: Instant::now(), clocks, state: Mutex::new(state) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs all ranks until each has ended. `turn` is called before and after each turn of a rank.
    pub fn run(&self, bodies: Vec<Body>, turn: &mut dyn FnMut(usize, bool)) -> Vec<Ended> {
        let most = MOST_TURNS * bodies.len() as u64;
        let mut ranks: Vec<Option<Generator<'static, (), Ended>>> = bodies.into_iter().map(coroutine).collect();
        let mut ended: Vec<Ended> = ranks.iter().map(|_| Ok(())).collect();
        while let Some(next) = self.choose() {
            turn(next, true);
            let rank = ranks[next].as_mut().expect("a rank that has not ended");
            let yielded = rank.resume();
            if rank.is_done() {
                ended[next] = yielded.unwrap_or(Ok(()));
                ranks[next] = None;
                self.state().status[next] = Status::Ended;
            }
            turn(next, false);
            assert!(self.state().turns < most, "the seed does not end");
        }
        assert!(ranks.iter().all(Option::is_none), "a rank waits for nothing");
        ended
    }

    /// Chooses the rank that runs next; advances the time when all ranks wait.
    fn choose(&self) -> Option<usize> {
        let mut state = self.state();
        if state.ready.is_empty() {
            while let Some(Reverse((time, who))) = state.alarms.pop() {
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
            return None;
        }
        let at = state.rng.below(many) as usize;
        let next = state.ready.swap_remove(at);
        state.turns += 1;
        state.trace = mixed(state.trace ^ state.now ^ ((next as u64) << 40));
        Some(next)
    }

    pub fn with_rng<T>(&self, draw: impl FnOnce(&mut Rng) -> T) -> T {
        draw(&mut self.state().rng)
    }

    pub fn now(&self) -> u64 {
        self.state().now
    }

    /// The order in which ranks ran, as one number.
    pub fn trace(&self) -> u64 {
        self.state().trace
    }

    /// The reading of a rank's clock at a time.
    pub fn instant(&self, me: usize, time: u64) -> Instant {
        let Clock { ahead, gain } = self.clocks[me];
        let gained = i128::from(time) * i128::from(gain) / 1_000_000;
        self.base + Duration::from_micros((i128::from(ahead) + i128::from(time) + gained) as u64)
    }

    /// The first time at which the clock of a rank shows this instant or a later one.
    pub fn time(&self, me: usize, instant: Instant) -> u64 {
        let Clock { ahead, gain } = self.clocks[me];
        let shown = instant.saturating_duration_since(self.base).as_micros() as i128 - i128::from(ahead);
        let time = (shown.max(0) * 1_000_000 / (1_000_000 + i128::from(gain))) as u64;
        (time..time + 3).find(|time| self.instant(me, *time) >= instant).unwrap_or(time + 3)
    }

    /// True if the rank was killed and its destructors run.
    pub fn is_dead(&self, me: usize) -> bool {
        self.state().dead[me]
    }

    /// Lets other ranks run before the next step of this one, which may die here.
    pub fn step(&self, me: usize) {
        let mut state = self.state();
        if state.dead[me] {
            return;
        }
        let deadly = state.deadly;
        let last = me == 0 && state.left == 1;
        state.left = state.left.saturating_sub(u64::from(me == 0));
        if state.rng.one_in(deadly) || last {
            state.dead[me] = true;
            drop(state);
            resume_unwind(Box::new(Killed));
        }
        // A step takes a microsecond, in which every rank may take a step.
        let all = state.status.len() as u64;
        state.now += u64::from(state.rng.one_in(all));
        state.ready.push(me);
        drop(state);
        pause();
    }

    /// Sleeps until `time`, or until another rank wakes this one.
    pub fn sleep(&self, me: usize, time: u64) {
        let mut state = self.state();
        if state.dead[me] {
            return;
        }
        state.status[me] = Status::Waiting(time);
        outside(|| state.alarms.push(Reverse((time, me))));
        drop(state);
        pause();
    }

    /// Wakes a sleeping rank.
    pub fn wake(&self, who: usize) {
        let mut state = self.state();
        if matches!(state.status[who], Status::Waiting(_)) {
            state.status[who] = Status::Ready;
            state.ready.push(who);
        }
    }
}

#[expect(deprecated, reason = "the scope that replaces it cannot be passed through production code")]
fn pause() {
    generator::yield_with::<Ended>(Ok(()));
}

fn coroutine(body: Body) -> Option<Generator<'static, (), Ended>> {
    Some(Gn::new_opt(STACK, move || catch_unwind(AssertUnwindSafe(body))))
}
