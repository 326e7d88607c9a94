//! A coordinator in one process, for ranks that are threads. It can lose messages.

use ashore::ranks::{Coordinator, Hello, Member, Phase, Round, Session};
use ashore::{Error, ErrorKind, Result};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// The messages of one job.
#[derive(Debug, Default)]
pub struct Board {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    hellos: BTreeMap<u32, Hello>,
    opened: Option<Result<Session>>,
    gathered: HashMap<Round, BTreeMap<u32, Vec<u8>>>,
    told: HashMap<Round, Vec<u8>>,
    /// Messages of this rank in this phase do not arrive.
    lost: HashSet<(u32, Phase)>,
}

/// A rank at a board.
#[derive(Debug)]
pub struct At {
    board: Arc<Board>,
    member: Member,
}

impl Board {
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    pub fn rank(self: &Arc<Self>, rank: u32, world: u32) -> Arc<At> {
        Arc::new(At { board: self.clone(), member: Member { rank, world, local_rank: rank } })
    }

    /// Loses every message that `rank` sends in `phase` from now on.
    pub fn lose(&self, rank: u32, phase: Phase) {
        self.state.lock().unwrap().lost.insert((rank, phase));
    }

    pub fn heal(&self) {
        self.state.lock().unwrap().lost.clear();
    }

    fn wait<T>(
        &self,
        mut state: MutexGuard<'_, State>,
        deadline: Instant,
        mut look: impl FnMut(&mut State) -> Option<T>,
    ) -> Option<T> {
        loop {
            if let Some(found) = look(&mut state) {
                return Some(found);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            state = self.changed.wait_timeout(state, left).unwrap().0;
        }
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
        let world = self.member.world;
        let mut state = self.board.state.lock().unwrap();
        state.hellos.insert(self.member.rank, hello.clone());
        self.board.changed.notify_all();
        if self.member.rank == 0 {
            let hellos = self.board.wait(state, deadline, |state| {
                (state.hellos.len() == world as usize).then(|| state.hellos.values().cloned().collect::<Vec<_>>())
            });
            let opened = open(&hellos.ok_or_else(|| late(1..world))?);
            self.board.state.lock().unwrap().opened = Some(opened.clone());
            self.board.changed.notify_all();
            return opened;
        }
        self.board.wait(state, deadline, |state| state.opened.clone()).unwrap_or_else(|| Err(late([0])))
    }

    fn gather(
        &self,
        round: Round,
        message: &[u8],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        deadline: Instant,
    ) -> Result<()> {
        let member = self.member;
        let mut state = self.board.state.lock().unwrap();
        if !state.lost.contains(&(member.rank, round.phase)) {
            state.gathered.entry(round).or_default().insert(member.rank, message.to_vec());
            self.board.changed.notify_all();
        }
        if member.rank > 0 {
            return Ok(());
        }
        let mut seen = HashSet::new();
        let done = self.board.wait(state, deadline, |state| {
            for (rank, message) in state.gathered.get(&round)? {
                if seen.insert(*rank) && each(*rank, message).is_break() {
                    return Some(());
                }
            }
            (seen.len() == member.world as usize).then_some(())
        });
        done.ok_or_else(|| late((0..member.world).filter(|rank| !seen.contains(rank))))
    }

    fn tell(&self, round: Round, message: Option<&[u8]>, deadline: Instant) -> Result<Vec<u8>> {
        let mut state = self.board.state.lock().unwrap();
        if let Some(message) = message {
            if !state.lost.contains(&(0, round.phase)) {
                state.told.entry(round).or_insert_with(|| message.to_vec());
                self.board.changed.notify_all();
            }
            return Ok(message.to_vec());
        }
        self.board.wait(state, deadline, |state| state.told.get(&round).cloned()).ok_or_else(|| late([0]))
    }

    fn missing(&self, round: Round) -> Vec<u32> {
        let state = self.board.state.lock().unwrap();
        let heard = state.gathered.get(&round);
        (0..self.member.world).filter(|rank| heard.is_none_or(|heard| !heard.contains_key(rank))).collect()
    }

    fn leave(&self) {}
}
