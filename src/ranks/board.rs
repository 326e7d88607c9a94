//! A coordinator over a board: a place where all ranks put small messages under names, and read the messages
//! of the other ranks. `board/meeting.rs` brings the ranks together.
//!
//! A message lies under `<session>/<save>-<phase>-<rank>`, and the message of rank 0 to all under
//! `<session>/<save>-<phase>-told`. Putting a message twice has the same effect as putting it once. A message
//! that contains another round is ignored. A rank removes its messages of a save two saves later, because
//! rank 0 begins a save only when every rank has ended the save before.

mod meeting;

use super::envelope::{About, Greeting, MAX_ENVELOPE, pack, unpack};
use super::refusal::place;
use super::{Coordinator, Hello, Member, Phase, Round, Session, checked_length, told};
use crate::error::{Error, ErrorKind, Result};
use std::collections::{BTreeMap, VecDeque};
use std::fmt::Debug;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// What a board knows about the process that made an announcement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Alive,
    Dead,
    Unknown,
}

/// A place for small messages, with a clock. Names are `<folder>/<name>` and consist of letters, digits and
/// dashes.
///
/// A simulation runs the same code over a simulated board and clock. No call exceeds its deadline by more
/// than one operation of the medium.
pub(crate) trait Board: Send + Sync + Debug {
    /// Keeps an announcement valid until it is dropped.
    type Held: Send + Sync + Debug;

    /// True if every rank sees the messages of all ranks; false if it sees only messages to itself.
    const SHOWS_ALL: bool = true;

    /// Refuses a run token that does not distinguish this run from others.
    fn check_token(&self, token: &str) -> Result<()>;

    /// Puts a message atomically. Replaces a message with the same name.
    fn put(&self, key: &str, bytes: &[u8], until: Instant) -> Result<()>;

    /// Puts a message, and holds it by a lock or a lease, so that others can ask for its `life`.
    fn announce(&self, key: &str, bytes: &[u8], until: Instant) -> Result<Self::Held>;

    /// Returns a message, or its first `longest + 1` bytes.
    fn read(&self, key: &str, longest: usize, until: Instant) -> Result<Option<Vec<u8>>>;

    /// Returns the names in a folder.
    fn list(&self, folder: &str, until: Instant) -> Result<Vec<String>>;

    /// Removes a message, if it exists.
    fn remove(&self, key: &str, until: Instant);

    /// Removes the messages of all sessions but this one.
    fn remove_others(&self, session: &str, until: Instant);

    /// Returns whether the process that announced `key` lives. `nearby`: that process runs on this boot of
    /// this host.
    fn life(&self, key: &str, nearby: bool, until: Instant) -> Life;

    /// Returns, for messages, what else can be the reason for a missing rank.
    fn hint(&self) -> &'static str;

    fn now(&self) -> Instant;

    /// Waits until a message whose name begins with `prefix` may have arrived or changed. `turn` counts the
    /// waits since the last such message. Returns at `until` at the latest.
    fn wait(&self, prefix: &str, turn: u32, until: Instant);
}

/// A rank that has met the others.
#[derive(Debug)]
struct Met<H> {
    pub session: Uuid,
    pub key: String,
    /// The name of the announcement and the greeting of each rank that this rank depends on. Rank 0 knows all
    /// ranks; the other ranks know rank 0.
    pub others: BTreeMap<u32, (String, Greeting)>,
    /// The greeting of this rank. It tells whether another greeting is of the same boot.
    pub me: Greeting,
    pub _held: H,
}

/// The coordinator over a board.
#[derive(Debug)]
pub(crate) struct OnBoard<B: Board> {
    pub board: B,
    pub member: Member,
    met: Mutex<Option<Arc<Met<B::Held>>>>,
    /// The messages of this rank that are not removed yet: save and name.
    sent: Mutex<VecDeque<(u64, String)>>,
}

/// Number of turns of a wait before it checks whether missing ranks live.
const TURNS_BEFORE_LOOKING: u32 = 3;
/// Number of ranks that are checked in one turn before the deadline. Each check is an operation of the board.
const LIVES_IN_A_TURN: usize = 64;
/// Time limit of clean-up, of calls without a deadline of their own, and of the last look at a deadline.
const PATIENCE: Duration = Duration::from_secs(1);

impl<B: Board> OnBoard<B> {
    pub fn new(board: B, member: Member) -> Result<Self> {
        let member = member.checked()?;
        Ok(Self { board, member, met: Mutex::default(), sent: Mutex::default() })
    }

    fn met(&self, round: Round) -> Result<Arc<Met<B::Held>>> {
        let met = lock(&self.met).clone();
        let met = met.ok_or_else(|| Error::invalid("the ranks have not met"))?;
        if met.session != round.session {
            let (ours, session) = (met.session, round.session);
            return Err(Error::invalid(format!("a message of another session session={session} ours={ours}")));
        }
        Ok(met)
    }

    fn send(&self, session: Uuid, about: About, key: String, message: &[u8], until: Instant) -> Result<()> {
        let (About::Gather(Round { save, .. }) | About::Tell(Round { save, .. })) = about else {
            return Err(Error::internal("a message of no round"));
        };
        for old in self.outdated(save) {
            self.board.remove(&format!("{}/{old}", folder(session)), until);
        }
        self.board.put(&format!("{}/{key}", folder(session)), &pack(about, self.member.rank, message), until)?;
        let mut sent = lock(&self.sent);
        if sent.back().is_none_or(|(_, last)| *last != key) {
            sent.push_back((save, key));
        }
        Ok(())
    }

    /// Takes the names of this rank's messages that no rank needs any more.
    fn outdated(&self, save: u64) -> Vec<String> {
        let mut sent = lock(&self.sent);
        let old = sent.iter().take_while(|(sent, _)| sent.saturating_add(1) < save).count();
        sent.drain(..old).map(|(_, key)| key).collect()
    }

    /// Calls `each` with every message of the round that has arrived and is not in `arrived`.
    fn collect(
        &self,
        round: Round,
        arrived: &mut [bool],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        until: Instant,
    ) -> Result<ControlFlow<()>> {
        let (folder, prefix) = (folder(round.session), round_prefix(round));
        for name in self.board.list(&folder, until)? {
            let Some(rank) = name.strip_prefix(&prefix).and_then(|rank| rank.parse::<u32>().ok()) else { continue };
            let Some(seen) = arrived.get_mut(rank as usize).filter(|seen| !**seen) else { continue };
            if self.board.now() >= until + PATIENCE {
                break;
            }
            let Some(bytes) = self.board.read(&format!("{folder}/{name}"), MAX_ENVELOPE, until)? else { continue };
            match unpack(&bytes) {
                Some((about, from, message)) if (about, from) == (About::Gather(round), rank) => {
                    checked_length(message)?;
                    *seen = true;
                    if each(rank, message).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                _ => tracing::debug!(key = name, "this is no message of its round"),
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Returns the ranks among `ranks` that are known to be dead.
    fn dead(&self, met: &Met<B::Held>, ranks: impl Iterator<Item = u32>, until: Instant) -> Vec<u32> {
        let is_dead = |rank: &u32| {
            let Some((key, other)) = met.others.get(rank) else { return false };
            self.board.life(key, met.me.of_this_boot(other), until) == Life::Dead
        };
        ranks.take_while(|_| self.board.now() < until + PATIENCE).filter(is_dead).collect()
    }

    fn ended(&self, met: &Met<B::Held>, dead: Vec<u32>) -> Error {
        let who = |rank: &u32| met.others.get(rank).map(|(_, greeting)| place(&greeting.hello)).unwrap_or_default();
        let who: Vec<_> = dead.iter().take(3).map(who).collect();
        let text = format!("a rank has ended, or left: {}", who.join(", "));
        Error::new(ErrorKind::Unavailable, text).with_ranks(dead)
    }

    fn keep(&self, met: Option<Met<B::Held>>) {
        let old = std::mem::replace(&mut *lock(&self.met), met.map(Arc::new));
        drop(old);
        lock(&self.sent).clear();
    }

    fn late(&self, what: &str, ranks: Vec<u32>) -> Error {
        Error::new(ErrorKind::Deadline, format!("{what}; {}", self.board.hint())).with_ranks(ranks)
    }
}

impl<B: Board> Coordinator for OnBoard<B> {
    fn member(&self) -> Member {
        self.member
    }

    fn meet(
        &self,
        hello: &Hello,
        open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
        deadline: Instant,
    ) -> Result<Session> {
        meeting::meet(self, hello, open, deadline)
    }

    fn gather(
        &self,
        round: Round,
        message: &[u8],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        deadline: Instant,
    ) -> Result<()> {
        checked_length(message)?;
        let met = self.met(round)?;
        if self.member.rank != 0 {
            let key = format!("{}{}", round_prefix(round), self.member.rank);
            return self.send(met.session, About::Gather(round), key, message, deadline);
        }
        if each(0, message).is_break() {
            return Ok(());
        }
        let mut arrived = vec![false; self.member.world as usize];
        arrived[0] = true;
        let mut looked = 0;
        for turn in 0.. {
            let before: usize = arrived.iter().filter(|a| **a).count();
            let is_last = turn > 0 && self.board.now() >= deadline;
            let collected = self.collect(round, &mut arrived, each, deadline);
            let missing: Vec<u32> = (0..).zip(&arrived).filter(|(_, a)| !**a).map(|(rank, _)| rank).collect();
            match collected {
                Ok(ControlFlow::Break(())) => return Ok(()),
                Ok(ControlFlow::Continue(())) => {}
                // The last look has little time. If the board does not answer, earlier looks have found which
                // ranks are missing.
                Err(error) if is_last && error.kind() == ErrorKind::Unavailable => {
                    return Err(self.late("not all ranks sent their message in time", missing).with_source(error));
                }
                Err(error) => return Err(error),
            }
            if missing.is_empty() {
                return Ok(());
            }
            let late = self.board.now() >= deadline;
            if turn >= TURNS_BEFORE_LOOKING || late {
                let some = if late { missing.len() } else { missing.len().min(LIVES_IN_A_TURN) };
                let these = missing.iter().cycle().skip(looked % missing.len()).take(some);
                looked += some;
                let mut dead = self.dead(&met, these.copied(), deadline);
                if !dead.is_empty() {
                    // A rank can send its message and end between the two looks.
                    if self.collect(round, &mut arrived, each, deadline)?.is_break() {
                        return Ok(());
                    }
                    dead.retain(|rank| !arrived[*rank as usize]);
                    if !dead.is_empty() {
                        return Err(self.ended(&met, dead));
                    }
                    continue;
                }
            }
            if late {
                return Err(self.late("not all ranks sent their message in time", missing));
            }
            let turn = if arrived.iter().filter(|a| **a).count() > before { 0 } else { turn };
            self.board.wait(&format!("{}/{}", folder(round.session), round_prefix(round)), turn, deadline);
        }
        Ok(())
    }

    fn tell(&self, round: Round, message: Option<&[u8]>, deadline: Instant) -> Result<Vec<u8>> {
        let message = told(self.member, message)?;
        let met = self.met(round)?;
        let key = format!("{}told", round_prefix(round));
        if let Some(message) = message {
            self.send(met.session, About::Tell(round), key, message, deadline)?;
            return Ok(message.to_vec());
        }
        let folder = folder(round.session);
        let look = || -> Result<Option<Vec<u8>>> {
            let bytes = self.board.read(&format!("{folder}/{key}"), MAX_ENVELOPE, deadline)?.unwrap_or_default();
            let Some((about, 0, message)) = unpack(&bytes) else { return Ok(None) };
            Ok((about == About::Tell(round) && message.len() <= super::MAX_MESSAGE).then(|| message.to_vec()))
        };
        for turn in 0.. {
            if let Some(message) = look()? {
                return Ok(message);
            }
            let late = self.board.now() >= deadline;
            if turn >= TURNS_BEFORE_LOOKING || late {
                let dead = self.dead(&met, std::iter::once(0), deadline);
                if !dead.is_empty() {
                    // Rank 0 can tell and end between the two looks.
                    return look()?.ok_or_else(|| self.ended(&met, dead));
                }
            }
            if late {
                return Err(self.late("rank 0 did not send its message in time", vec![0]));
            }
            self.board.wait(&format!("{folder}/{key}"), turn, deadline);
        }
        Err(Error::internal("a wait without an end"))
    }

    fn missing(&self, round: Round) -> Vec<u32> {
        if self.met(round).is_err() {
            return Vec::new();
        }
        let names = self.board.list(&folder(round.session), self.board.now() + PATIENCE).unwrap_or_default();
        let prefix = round_prefix(round);
        let there: Vec<_> = names.iter().filter_map(|name| name.strip_prefix(&prefix)).collect();
        if self.member.rank != 0 {
            return if there.contains(&"told") { Vec::new() } else { vec![0] };
        }
        let mut missing = vec![true; self.member.world as usize];
        missing[0] = false;
        for rank in there.into_iter().filter_map(|rank| rank.parse::<usize>().ok()) {
            if let Some(missing) = missing.get_mut(rank) {
                *missing = false;
            }
        }
        (0..).zip(missing).filter(|(_, missing)| *missing).map(|(rank, _)| rank).collect()
    }

    fn leave(&self) {
        let met = lock(&self.met).take();
        if let Some(met) = met {
            self.board.remove(&met.key, self.board.now() + PATIENCE);
        }
    }
}

/// The folder of a session's messages.
fn folder(session: Uuid) -> String {
    format!("messages-{session}")
}

fn round_prefix(round: Round) -> String {
    let phase = match round.phase {
        Phase::Agree => "agree",
        Phase::Plan => "plan",
        Phase::Receipt => "receipt",
        Phase::Outcome => "outcome",
    };
    format!("{}-{phase}-", round.save)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Implements [`Coordinator`] for a type whose only field is the coordinator over its board.
macro_rules! delegate {
    ($name:ident) => {
        impl Coordinator for $name {
            fn member(&self) -> Member {
                self.0.member()
            }

            fn meet(
                &self,
                hello: &Hello,
                open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
                deadline: Instant,
            ) -> Result<Session> {
                self.0.meet(hello, open, deadline)
            }

            fn gather(
                &self,
                round: Round,
                message: &[u8],
                each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
                deadline: Instant,
            ) -> Result<()> {
                self.0.gather(round, message, each, deadline)
            }

            fn tell(&self, round: Round, message: Option<&[u8]>, deadline: Instant) -> Result<Vec<u8>> {
                self.0.tell(round, message, deadline)
            }

            fn missing(&self, round: Round) -> Vec<u32> {
                self.0.missing(round)
            }

            fn leave(&self) {
                self.0.leave();
            }
        }
    };
}
pub(super) use delegate;
