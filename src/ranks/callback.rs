//! A coordinator over an all-gather of the program.

use super::envelope::{About, Greeting, MAX_ENVELOPE, Verdict, pack, unpack};
use super::refusal::{same_job, twice};
use super::{Coordinator, Hello, Member, Round, Session, checked_length, told};
use crate::error::{Error, ErrorKind, Result};
use crate::guard::guarded;
use crate::wire::WireError;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long an all-gather may take to return after its deadline, so that its own error is the one reported.
const GRACE: Duration = Duration::from_millis(100);

/// The coordinator over an all-gather of the program: torch's gloo or NCCL, or anything else.
///
/// The function gets the message of this rank and a deadline, and returns the messages of all ranks in the
/// order of ranks. Messages have different lengths, each below 4.2 KiB. A thread of the coordinator calls the
/// function, so that a function that exceeds its deadline does not delay a save beyond it.
///
/// Every message carries the key of its round. A collective that fails, or returns a message with another
/// key, breaks the group, because the ranks may be out of step from then on. Every later call fails with
/// `Unavailable` until the ranks meet again, which needs an all-gather that still works. Every rank receives
/// all messages, so a job of more than about 10,000 ranks needs another coordinator.
///
/// ```
/// use ashore::ranks::{Callback, Coordinator, Member};
/// // The all-gather of one rank; a program hands the message to its communication library.
/// let all_gather = |message: &[u8], _deadline| Ok(vec![message.to_vec()]);
/// let ranks = Callback::new(Member { rank: 0, world: 1, local_rank: 0 }, all_gather)?;
/// assert_eq!(ranks.member().world, 1);
/// # Ok::<(), ashore::Error>(())
/// ```
pub struct Callback {
    member: Member,
    calls: Sender<Call>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    session: Option<Uuid>,
    broken: bool,
    /// Receives the answer of a call that had not returned at its deadline.
    outstanding: Option<Receiver<Result<Vec<Vec<u8>>>>>,
    /// The ranks that the last failure named.
    missing: Option<(Round, Vec<u32>)>,
}

struct Call {
    message: Vec<u8>,
    deadline: Instant,
    answer: Sender<Result<Vec<Vec<u8>>>>,
}

impl fmt::Debug for Callback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Callback").field("member", &self.member).finish_non_exhaustive()
    }
}

impl Callback {
    /// Creates the coordinator of one rank, and the thread that calls `all_gather`.
    ///
    /// # Errors
    /// `Invalid` if the rank is not below the number of ranks; `Busy` when the system has no more threads.
    pub fn new(
        member: Member,
        all_gather: impl Fn(&[u8], Instant) -> Result<Vec<Vec<u8>>> + Send + 'static,
    ) -> Result<Self> {
        let member = member.checked()?;
        let (calls, received) = bounded::<Call>(1);
        crate::thread::spawn("ashore-ranks".into(), move || {
            for call in received {
                let run = || all_gather(&call.message, call.deadline);
                let _ = call.answer.send(guarded("the all-gather of the program panicked", run));
            }
        })?;
        Ok(Self { member, calls, state: Mutex::default() })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the program's function and waits for it until shortly after the deadline.
    fn all_gather(&self, message: Vec<u8>, deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let mut state = self.state();
        if let Some(outstanding) = &state.outstanding {
            if matches!(outstanding.try_recv(), Err(TryRecvError::Empty)) {
                return Err(Error::new(ErrorKind::Unavailable, "the all-gather of an earlier round has not returned"));
            }
            state.outstanding = None;
        }
        let (answer, answered) = bounded(1);
        let ended = || Error::internal("the thread that calls the all-gather has ended");
        self.calls.try_send(Call { message, deadline, answer }).map_err(|_| ended())?;
        drop(state);
        match answered.recv_deadline(deadline + GRACE) {
            Ok(gathered) => gathered,
            Err(RecvTimeoutError::Disconnected) => Err(ended()),
            Err(RecvTimeoutError::Timeout) => {
                self.state().outstanding = Some(answered);
                Err(Error::new(ErrorKind::Deadline, "the all-gather of the program did not return in time"))
            }
        }
    }

    fn counted(&self, gathered: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>> {
        let world = self.member.world;
        if gathered.len() == world as usize {
            return Ok(gathered);
        }
        let text = format!(
            "the all-gather returned messages of another number of ranks messages={} world={world}",
            gathered.len()
        );
        Err(Error::invalid(text))
    }

    /// Exchanges messages that must all be about `about`.
    fn exchange(&self, about: About, message: &[u8], longest: usize, deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let gathered = self.counted(self.all_gather(pack(about, self.member.rank, message), deadline)?)?;
        let of_round = |rank: u32, bytes: &[u8]| {
            bytes.len() <= longest && unpack(bytes).is_some_and(|(found, from, _)| (found, from) == (about, rank))
        };
        let others: Vec<u32> =
            (0..).zip(&gathered).filter(|(rank, bytes)| !of_round(*rank, bytes)).map(|(r, _)| r).collect();
        if others.is_empty() {
            return Ok(gathered);
        }
        let text = "the ranks are not in step: a message of another round was gathered";
        Err(Error::new(ErrorKind::Unavailable, text).with_ranks(others))
    }

    /// One collective of a round; its failure breaks the group.
    fn round(&self, round: Round, about: About, message: &[u8], deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let state = self.state();
        if state.session != Some(round.session) {
            return Err(Error::invalid(format!("a message of another session session={}", round.session)));
        }
        if state.broken {
            let text = "the group of ranks is broken since a collective failed: the ranks must meet again";
            return Err(Error::new(ErrorKind::Unavailable, text));
        }
        drop(state);
        self.exchange(about, message, MAX_ENVELOPE, deadline).inspect_err(|error| {
            let mut state = self.state();
            state.broken = true;
            state.missing = Some((round, error.ranks().to_vec()));
        })
    }

    fn greetings(&self, me: &Greeting, deadline: Instant) -> Result<Vec<Greeting>> {
        let mut there = BTreeMap::new();
        for (rank, bytes) in (0..).zip(self.all_gather(me.pack(About::Greeting(Uuid::nil()))?, deadline)?) {
            let greeting = match Greeting::unpack(&bytes) {
                Some((About::Greeting(_), greeting)) if bytes.len() <= MAX_ENVELOPE => greeting,
                _ => {
                    let text = "the ranks are not in step: this rank meets the others, and another does not";
                    return Err(Error::new(ErrorKind::Unavailable, text).with_rank(rank));
                }
            };
            same_job(&me.hello, &greeting.hello)?;
            if let Some(other) = there.insert(greeting.hello.member.rank, greeting) {
                let other: Greeting = other;
                return Err(twice(&other.hello, &there[&other.hello.member.rank].hello));
            }
        }
        if there.keys().copied().ne(0..self.member.world) {
            return Err(Error::invalid("the all-gather returned the messages of other ranks"));
        }
        Ok(there.into_values().collect())
    }
}

impl Coordinator for Callback {
    fn member(&self) -> Member {
        self.member
    }

    fn meet(
        &self,
        hello: &Hello,
        open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
        deadline: Instant,
    ) -> Result<Session> {
        if hello.member != self.member {
            return Err(Error::invalid("a hello of another rank than its coordinator's").with_rank(hello.member.rank));
        }
        self.leave();
        let me = Greeting::new(hello);
        let greetings = self.greetings(&me, deadline)?;
        let about = About::Verdict(greetings[0].meeting);
        let mut opened = None;
        let mut message = Vec::new();
        if self.member.rank == 0 {
            let hellos: Vec<Hello> = greetings.iter().map(|greeting| greeting.hello.clone()).collect();
            let opening = open(&hellos);
            let verdict = match &opening {
                Ok(session) => Verdict::Opened(*session, Vec::new()),
                Err(error) => Verdict::Refused(WireError::from(error)),
            };
            opened = Some(opening);
            message = verdict.json()?;
        }
        let told = self.exchange(about, &message, MAX_ENVELOPE, deadline);
        let session = match opened {
            Some(opened) => {
                let session = opened?;
                told?;
                session
            }
            None => match Verdict::unpack(&told?[0]) {
                Some((_, Verdict::Opened(session, _))) => session,
                Some((_, Verdict::Refused(error))) => return Err(error.into_error()),
                None => return Err(Error::invalid("rank 0 did not tell the session").with_rank(0)),
            },
        };
        let mut state = self.state();
        state.session = Some(session.id);
        state.broken = false;
        Ok(session)
    }

    fn gather(
        &self,
        round: Round,
        message: &[u8],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        deadline: Instant,
    ) -> Result<()> {
        checked_length(message)?;
        let gathered = self.round(round, About::Gather(round), message, deadline)?;
        if self.member.rank != 0 {
            return Ok(());
        }
        for bytes in gathered {
            if let Some((_, rank, message)) = unpack(&bytes)
                && each(rank, message).is_break()
            {
                break;
            }
        }
        Ok(())
    }

    fn tell(&self, round: Round, message: Option<&[u8]>, deadline: Instant) -> Result<Vec<u8>> {
        let message = told(self.member, message)?.unwrap_or_default();
        let gathered = self.round(round, About::Tell(round), message, deadline)?;
        let told = gathered.first().and_then(|bytes| unpack(bytes));
        Ok(told.map(|(_, _, message)| message.to_vec()).unwrap_or_default())
    }

    fn missing(&self, round: Round) -> Vec<u32> {
        let state = self.state();
        state.missing.as_ref().filter(|(of, _)| *of == round).map(|(_, ranks)| ranks.clone()).unwrap_or_default()
    }

    fn leave(&self) {
        let mut state = self.state();
        state.session = None;
        state.missing = None;
    }
}
