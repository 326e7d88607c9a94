//! The meeting of ranks over a board.
//!
//! Rank 0 puts a *call* with an identity of its own. Every rank answers with a *greeting* that names that
//! call, so that messages of an earlier job with the same token are not taken for answers. When all ranks
//! have answered, rank 0 opens the session and puts the *verdict*, with the greetings that are in the
//! session. A rank is in a session only if the verdict lists the greeting that the rank made for this
//! meeting.
//!
//! ```text
//! meeting-<token>/call                    rank 0: "answer this"
//! meeting-<token>/hello-<rank>-<meeting>  held while its process lives
//! meeting-<token>/verdict-<call>          the session, or why there is none
//! ```

use super::{Board, Life, Met, OnBoard, PATIENCE, folder};
use crate::error::{Error, Result};
use crate::ranks::envelope::{About, Greeting, MAX_ENVELOPE, Verdict};
use crate::ranks::refusal::{place, same_job, same_process, twice};
use crate::ranks::{Hello, Session};
use crate::wire::WireError;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// Number of turns after which a waiting rank puts its own message again, because the clean-up of another job
/// may have removed it.
const TURNS_BETWEEN_REPEATS: u32 = 64;

/// Longer than a wait of any board.
const LONGEST_WAIT: Duration = Duration::from_secs(3);

pub(super) fn meet<B: Board>(
    on: &OnBoard<B>,
    hello: &Hello,
    open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
    deadline: Instant,
) -> Result<Session> {
    on.board.check_token(&hello.token)?;
    if hello.member != on.member {
        let text = format!("a hello of another rank than its coordinator's ours={}", on.member.rank);
        return Err(Error::invalid(text).with_rank(hello.member.rank));
    }
    // The old session has ended for this rank, so its locks are released first.
    on.keep(None);
    let table = Table {
        on,
        folder: format!("meeting-{}", Uuid::new_v5(&Uuid::NAMESPACE_OID, hello.token.as_bytes())),
        me: Greeting::new(hello),
        deadline,
    };
    let (session, met) = if hello.member.rank == 0 { table.host(open)? } else { table.join()? };
    on.keep(Some(met));
    Ok(session)
}

struct Table<'a, B: Board> {
    on: &'a OnBoard<B>,
    folder: String,
    me: Greeting,
    deadline: Instant,
}

type Greetings = BTreeMap<u32, Greeting>;

impl<B: Board> Table<'_, B> {
    fn key(&self, name: &str) -> String {
        format!("{}/{name}", self.folder)
    }

    fn hello_key(&self, rank: u32, meeting: Uuid) -> String {
        self.key(&format!("hello-{rank}-{meeting}"))
    }

    fn key_of(&self, greeting: &Greeting) -> String {
        self.hello_key(greeting.hello.member.rank, greeting.meeting)
    }

    fn life(&self, greeting: &Greeting) -> Life {
        self.on.board.life(&self.key_of(greeting), self.me.of_this_boot(greeting), self.deadline)
    }

    fn announce(&self, call: Uuid) -> Result<B::Held> {
        let bytes = self.me.pack(About::Greeting(call))?;
        self.on.board.announce(&self.key_of(&self.me), &bytes, self.deadline)
    }

    fn met(&self, session: Session, others: Greetings, held: B::Held) -> (Session, Met<B::Held>) {
        let others = others.into_iter().map(|(rank, greeting)| (rank, (self.key_of(&greeting), greeting))).collect();
        let key = self.key_of(&self.me);
        (session, Met { session: session.id, key, others, me: self.me.clone(), _held: held })
    }

    /// On rank 0: calls, waits for all ranks, opens the session, and puts the verdict.
    fn host(&self, open: &mut dyn FnMut(&[Hello]) -> Result<Session>) -> Result<(Session, Met<B::Held>)> {
        let board = &self.on.board;
        // A rank that answered the last call may not have read the verdict of that call yet.
        let last = self.called()?.map(|(call, _)| verdict_name(call));
        for name in board.list(&self.folder, self.deadline)? {
            if last.as_ref() != Some(&name) && board.now() < self.deadline {
                board.remove(&self.key(&name), self.deadline);
            }
        }
        let call = Uuid::new_v4();
        let held = self.announce(call)?;
        let opened = self.all(call).and_then(|greetings| {
            let hellos: Vec<Hello> = greetings.values().map(|greeting| greeting.hello.clone()).collect();
            Ok((open(&hellos)?, greetings))
        });
        let verdict = match &opened {
            Ok((session, greetings)) => Verdict::Opened(*session, greetings.values().map(|g| g.meeting).collect()),
            Err(error) => Verdict::Refused(WireError::from(error)),
        };
        // The other ranks learn a refusal even if it comes at the deadline.
        let until = self.deadline.max(board.now() + PATIENCE);
        let bytes = verdict.pack(About::Verdict(call))?;
        let put = board.put(&self.key(&verdict_name(call)), &bytes, until);
        let (session, mut greetings) = opened?;
        put?;
        board.remove_others(&folder(session.id), until);
        greetings.remove(&0);
        Ok(self.met(session, greetings, held))
    }

    /// Waits for a greeting of every rank that answers `call`.
    fn all(&self, call: Uuid) -> Result<Greetings> {
        let board = &self.on.board;
        let world = self.me.hello.member.world;
        let mut there = Greetings::from([(0, self.me.clone())]);
        for turn in 0.. {
            self.keep_calling(call)?;
            let before = there.len();
            for name in board.list(&self.folder, self.deadline)? {
                if let Some((rank, meeting)) = parse_hello(&name)
                    && board.now() < self.deadline + PATIENCE
                    && there.get(&rank).is_none_or(|known| known.meeting != meeting)
                    && let Some((About::Greeting(answered), other)) = self.greeting(rank, meeting)?
                    && answered == call
                {
                    self.seat(&mut there, other)?;
                }
            }
            // A process that has ended since then is started again, or is missing.
            if there.len() == world as usize {
                let late = || board.now() >= self.deadline;
                there.retain(|rank, greeting| *rank == 0 || late() || self.life(greeting) != Life::Dead);
            }
            if there.len() == world as usize {
                return Ok(there);
            }
            if board.now() >= self.deadline {
                let missing = (0..world).filter(|rank| !there.contains_key(rank)).collect();
                return Err(self.on.late("not all ranks have come", missing));
            }
            board.wait(&self.key(""), if there.len() > before { 0 } else { turn }, self.deadline);
        }
        Err(Error::internal("a wait without an end"))
    }

    /// Puts the call, unless it exists. Rank 0 removed earlier messages before it called, so another call is
    /// from a second rank 0.
    fn keep_calling(&self, call: Uuid) -> Result<()> {
        let key = self.key("call");
        match self.called()? {
            Some((found, _)) if found == call => Ok(()),
            Some((found, other)) if self.life(&other) != Life::Dead => {
                // An answer to its call tells the second rank 0 about this one.
                let answer = self.me.pack(About::Greeting(found))?;
                self.on.board.put(&self.key_of(&self.me), &answer, self.deadline)?;
                Err(self.twice(&other))
            }
            _ => self.on.board.put(&key, &self.me.pack(About::Call(call))?, self.deadline),
        }
    }

    fn called(&self) -> Result<Option<(Uuid, Greeting)>> {
        let bytes = self.on.board.read(&self.key("call"), MAX_ENVELOPE, self.deadline)?;
        let parsed = bytes.as_deref().and_then(Greeting::unpack);
        Ok(parsed.and_then(|(about, caller)| match about {
            About::Call(call) if caller.hello.member.rank == 0 => Some((call, caller)),
            _ => None,
        }))
    }

    fn greeting(&self, rank: u32, meeting: Uuid) -> Result<Option<(About, Greeting)>> {
        let bytes = self.on.board.read(&self.hello_key(rank, meeting), MAX_ENVELOPE, self.deadline)?;
        let parsed = bytes.as_deref().and_then(Greeting::unpack);
        Ok(parsed.filter(|(_, found)| (found.hello.member.rank, found.meeting) == (rank, meeting)))
    }

    /// Gives a rank its seat, or refuses if two processes claim the same rank.
    fn seat(&self, there: &mut Greetings, other: Greeting) -> Result<()> {
        let (ours, theirs) = (&self.me.hello, &other.hello);
        same_job(ours, theirs)?;
        match there.get(&theirs.member.rank) {
            Some(known) if theirs.member.rank == 0 => return Err(twice(&known.hello, theirs)),
            Some(known) if self.life(known) == Life::Dead => {}
            Some(_) if self.life(&other) == Life::Dead => return Ok(()),
            Some(known) => return Err(twice(&known.hello, theirs)),
            None => {}
        }
        there.insert(theirs.member.rank, other);
        Ok(())
    }

    fn twice(&self, other: &Greeting) -> Error {
        twice(&self.me.hello, &other.hello)
    }

    /// On the other ranks: answers the call, and waits for the verdict.
    fn join(&self) -> Result<(Session, Met<B::Held>)> {
        let board = &self.on.board;
        let rank = self.me.hello.member.rank;
        let mut answered: Option<(Uuid, B::Held)> = None;
        // A call that had ended before this rank arrived, and the reason.
        let mut over = None;
        let mut reason = None;
        // The ranks that were present shortly before the deadline, when others give up and leave.
        let mut there = None;
        for turn in 0.. {
            if let Some((call, caller)) = self.called()?
                && over != Some(call)
            {
                if let Some((before, _)) = answered.as_ref().filter(|(answered, _)| *answered != call)
                    && let Some(Verdict::Refused(error)) = self.verdict(*before)?
                {
                    return Err(error.into_error());
                }
                let ours = answered.as_ref().is_some_and(|(answered, _)| *answered == call);
                match (self.verdict(call)?, ours) {
                    (Some(Verdict::Refused(error)), true) => return Err(error.into_error()),
                    (Some(Verdict::Opened(session, meetings)), true)
                        if meetings.get(rank as usize) == Some(&self.me.meeting) =>
                    {
                        let held = answered.take().map(|(_, held)| held);
                        let held = held.ok_or_else(|| Error::internal("a session without an answer"))?;
                        return Ok(self.met(session, Greetings::from([(0, caller)]), held));
                    }
                    (Some(verdict), _) => {
                        self.refuse_if_taken(&verdict, &caller)?;
                        over = Some(call);
                        if let Verdict::Refused(error) = verdict {
                            reason = Some(error.into_error());
                        }
                    }
                    (None, true) if turn % TURNS_BETWEEN_REPEATS != TURNS_BETWEEN_REPEATS - 1 => {}
                    (None, _) => answered = Some((call, self.announce(call)?)),
                }
            }
            // Rank 0 removed the messages of earlier meetings before the call that this rank has answered.
            // Only the ranks named in an error message depend on that.
            if there.is_none() && answered.is_some() && board.now() + LONGEST_WAIT >= self.deadline {
                there = Some(self.there(self.deadline).unwrap_or_default());
            }
            if board.now() >= self.deadline {
                return Err(self.nothing_came(answered.is_some(), reason, there.unwrap_or_default()));
            }
            // A server reports the verdict at once, and another call only when the wait ends.
            let awaited = answered.as_ref().map_or_else(|| "call".to_owned(), |(call, _)| verdict_name(*call));
            board.wait(&self.key(&awaited), turn, self.deadline);
        }
        Err(Error::internal("a wait without an end"))
    }

    fn verdict(&self, call: Uuid) -> Result<Option<Verdict>> {
        let longest = Verdict::longest(self.me.hello.member.world);
        let bytes = self.on.board.read(&self.key(&verdict_name(call)), longest, self.deadline)?;
        let parsed = bytes.as_deref().and_then(Verdict::unpack);
        Ok(parsed.and_then(|(about, verdict)| (about == About::Verdict(call)).then_some(verdict)))
    }

    /// Refuses if a session without this rank has a living process in this rank's seat, or a living rank 0
    /// with another number of ranks. Messages of an earlier job are no reason to refuse. An earlier session
    /// of this process is no reason either, because rank 0 may be about to call again.
    fn refuse_if_taken(&self, verdict: &Verdict, caller: &Greeting) -> Result<()> {
        let Verdict::Opened(_, meetings) = verdict else { return Ok(()) };
        let ours = &self.me.hello;
        if !same_process(&caller.hello, ours) && self.life(caller) == Life::Alive {
            same_job(&caller.hello, ours)?;
        }
        let rank = ours.member.rank;
        let Some(meeting) = meetings.get(rank as usize) else { return Ok(()) };
        match self.greeting(rank, *meeting)? {
            Some((_, other)) if !same_process(&other.hello, ours) && self.life(&other) == Life::Alive => {
                Err(self.twice(&other))
            }
            _ => Ok(()),
        }
    }

    /// The ranks that have put a greeting.
    fn there(&self, until: Instant) -> Result<Vec<u32>> {
        let names = self.on.board.list(&self.folder, until)?;
        Ok(names.iter().filter_map(|name| Some(parse_hello(name)?.0)).collect())
    }

    fn nothing_came(&self, answered: bool, reason: Option<Error>, mut there: Vec<u32>) -> Error {
        match (answered, reason) {
            (false, None) => return self.on.late("rank 0 has not come", vec![0]),
            (false, Some(reason)) => {
                let text = format!("rank 0 met the others before this rank came, and did not meet again: {reason}");
                return self.on.late(&text, vec![0]);
            }
            (true, _) => {}
        }
        if let Ok(Some((_, caller))) = self.called()
            && self.life(&caller) == Life::Dead
        {
            let text = format!("rank 0 has ended before it opened a session: {}", place(&caller.hello));
            return self.on.late(&text, vec![0]);
        }
        let text = "rank 0 has come, and has not opened a session in time";
        if !B::SHOWS_ALL {
            return self.on.late(text, Vec::new());
        }
        there.extend(self.there(self.on.board.now() + PATIENCE).unwrap_or_default());
        let missing: Vec<u32> = (1..self.me.hello.member.world).filter(|rank| !there.contains(rank)).collect();
        // If all ranks are present, the others wait for rank 0.
        self.on.late(text, if missing.is_empty() { vec![0] } else { missing })
    }
}

fn verdict_name(call: Uuid) -> String {
    format!("verdict-{call}")
}

fn parse_hello(name: &str) -> Option<(u32, Uuid)> {
    let (rank, meeting) = name.strip_prefix("hello-")?.split_once('-')?;
    Some((rank.parse().ok()?, Uuid::try_parse(meeting).ok()?))
}
