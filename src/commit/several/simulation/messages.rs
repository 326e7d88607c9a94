//! A coordinator that loses, delays or repeats messages, as the seed decides.

use super::scheduler::Scheduler;
use crate::error::{Error, ErrorKind, Result};
use crate::ranks::{Coordinator, Hello, Member, Round, Session};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// How badly messages travel.
#[derive(Clone, Copy, Debug)]
pub(super) struct Travel {
    /// One in this many messages is lost; 0: none.
    pub lost: u64,
    /// The maximum delay of a message in microseconds.
    pub late: u64,
}

#[derive(Default)]
struct Board {
    hellos: BTreeMap<u32, Hello>,
    opened: Option<Result<Session>>,
    /// Messages with the time at which they arrive.
    gathered: HashMap<Round, Vec<(u64, u32, Vec<u8>)>>,
    /// The message of rank 0, with the time at which it reaches each rank. A rank that is missing never gets
    /// it.
    told: HashMap<Round, (Vec<u8>, HashMap<u32, u64>)>,
}

/// The messages of one job.
pub(super) struct Wire {
    pub scheduler: Arc<Scheduler>,
    board: Mutex<Board>,
    travel: Travel,
    /// The thread of rank 0.
    first: usize,
}

/// The endpoint of one rank at a wire.
pub(super) struct At {
    pub wire: Arc<Wire>,
    pub member: Member,
}

impl fmt::Debug for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "At({})", self.member.rank)
    }
}

impl Wire {
    pub fn new(scheduler: Arc<Scheduler>, first: usize, travel: Travel) -> Self {
        Self { scheduler, board: Mutex::default(), travel, first }
    }

    fn board(&self) -> MutexGuard<'_, Board> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The time at which a message that is sent now arrives; None: never.
    fn arrival(&self) -> Option<u64> {
        let now = self.scheduler.now();
        let Travel { lost, late } = self.travel;
        self.scheduler.with_rng(|rng| (!rng.one_in(lost)).then(|| now + rng.below(late + 1)))
    }
}

impl At {
    fn thread(&self) -> usize {
        self.wire.first + self.member.rank as usize
    }

    /// Waits until `look`, which gets the time, returns a value. `look` may say when to look again.
    fn wait<T>(&self, deadline: Instant, mut look: impl FnMut(&mut Board, u64) -> Result<T, Option<u64>>) -> Option<T> {
        let scheduler = &self.wire.scheduler;
        let deadline = scheduler.time(self.thread(), deadline);
        loop {
            let now = scheduler.now();
            let again = match look(&mut self.wire.board(), now) {
                Ok(found) => return Some(found),
                Err(again) => again.unwrap_or(u64::MAX),
            };
            if now >= deadline {
                return None;
            }
            scheduler.sleep(self.thread(), again.clamp(now + 1, deadline.max(now + 1)));
        }
    }

    fn wake(&self, ranks: impl IntoIterator<Item = u32>) {
        ranks.into_iter().for_each(|rank| self.wire.scheduler.wake(self.wire.first + rank as usize));
    }
}

fn late(ranks: impl IntoIterator<Item = u32>) -> Error {
    Error::new(ErrorKind::Deadline, "ranks are missing").with_ranks(ranks)
}

impl Coordinator for At {
    fn member(&self) -> Member {
        self.member
    }

    fn meet(
        &self,
        hello: &Hello,
        open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
        deadline: Instant,
    ) -> Result<Session> {
        self.wire.scheduler.step(self.thread());
        let world = self.member.world;
        self.wire.board().hellos.insert(self.member.rank, hello.clone());
        self.wake([0]);
        if self.member.rank == 0 {
            let all = |board: &mut Board, _| {
                let hellos: Vec<_> = board.hellos.values().cloned().collect();
                if hellos.len() == world as usize { Ok(hellos) } else { Err(None) }
            };
            let hellos = self.wait(deadline, all).ok_or_else(|| late(1..world))?;
            let opened = open(&hellos);
            self.wire.board().opened = Some(opened.clone());
            self.wake(1..world);
            return opened;
        }
        self.wait(deadline, |board, _| board.opened.clone().ok_or(None)).unwrap_or_else(|| Err(late([0])))
    }

    fn gather(
        &self,
        round: Round,
        message: &[u8],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        deadline: Instant,
    ) -> Result<()> {
        self.wire.scheduler.step(self.thread());
        let rank = self.member.rank;
        // Rank 0 does not lose its own message.
        let arrival = if rank == 0 { Some(self.wire.scheduler.now()) } else { self.wire.arrival() };
        if let Some(at) = arrival {
            let mut board = self.wire.board();
            let messages = board.gathered.entry(round).or_default();
            messages.push((at, rank, message.to_vec()));
            // A message can arrive twice.
            if at % 7 == 0 {
                messages.push((at + 1, rank, message.to_vec()));
            }
            drop(board);
            self.wake([0]);
        }
        if rank > 0 {
            return Ok(());
        }
        let (mut seen, mut read) = (HashSet::new(), Vec::new());
        let done = self.wait(deadline, |board, now| {
            let messages = board.gathered.entry(round).or_default();
            let mut next = None::<u64>;
            messages.retain(|(at, rank, bytes)| {
                let there = *at <= now;
                if there {
                    read.push((*rank, bytes.clone()));
                } else {
                    next = Some(next.map_or(*at, |next| next.min(*at)));
                }
                !there
            });
            for (rank, bytes) in read.drain(..) {
                if seen.insert(rank) && each(rank, &bytes).is_break() {
                    return Ok(());
                }
            }
            if seen.len() == self.member.world as usize { Ok(()) } else { Err(next) }
        });
        done.ok_or_else(|| late((0..self.member.world).filter(|rank| !seen.contains(rank))))
    }

    fn tell(&self, round: Round, message: Option<&[u8]>, deadline: Instant) -> Result<Vec<u8>> {
        self.wire.scheduler.step(self.thread());
        let rank = self.member.rank;
        if let Some(message) = message {
            let ranks = 1..self.member.world;
            let arrivals = ranks.clone().filter_map(|rank| Some((rank, self.wire.arrival()?))).collect();
            self.wire.board().told.entry(round).or_insert_with(|| (message.to_vec(), arrivals));
            self.wake(ranks);
            return Ok(message.to_vec());
        }
        let heard = self.wait(deadline, |board, now| {
            let (message, arrivals) = board.told.get(&round).ok_or(None)?;
            match arrivals.get(&rank) {
                Some(at) if *at <= now => Ok(message.clone()),
                at => Err(at.copied()),
            }
        });
        heard.ok_or_else(|| late([0]))
    }

    fn missing(&self, _: Round) -> Vec<u32> {
        Vec::new()
    }

    fn leave(&self) {}
}
