//! Tests of the behaviour that every coordinator must have, one named test per behaviour.
//!
//! Every behaviour is a function that all ranks run at once. [`run`] runs the ranks in threads of one
//! process, [`run_rank`] in separate processes.
//!
//! ```
//! use ashore::testing::ranks::{Kind, run};
//! use std::sync::Arc;
//! run(Kind::Alone, &[1], || Arc::new(|_, _| Ok(Arc::new(ashore::ranks::Alone))));
//! ```

use crate::error::{Error, ErrorKind, Result};
use crate::ranks::{Coordinator, Hello, MAX_MESSAGE, Member, Phase, Round, Session};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// The mechanism of a coordinator. It decides which behaviours the tests can demand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A job with one rank.
    Alone,
    /// Messages stay on a board until they are read. A process can join as any rank.
    Board,
    /// Messages go from process to process. Each process has a fixed rank.
    Wired,
    /// Every round is a collective. A round that fails breaks the group.
    Collective,
}

impl Kind {
    /// A message can be repeated or missed without harm to other messages.
    fn is_mail(self) -> bool {
        matches!(self, Self::Board | Self::Wired)
    }

    /// A process can claim any rank, and can join again.
    fn has_free_seats(self) -> bool {
        matches!(self, Self::Board | Self::Collective)
    }
}

/// Creates the coordinator of a process, which claims the given position. The number identifies the process,
/// counted from 0.
pub type Join = Arc<dyn Fn(u32, Member) -> Result<Arc<dyn Coordinator>> + Send + Sync>;

/// One rank of a job that runs a behaviour.
#[derive(Clone)]
#[expect(missing_debug_implementations, reason = "it holds a function")]
pub struct Rank {
    kind: Kind,
    member: Member,
    token: String,
    join: Join,
}

/// A behaviour: its name, and a function that panics on a rank whose coordinator lacks it.
pub type Behaviour = (&'static str, fn(&Rank));

/// Every behaviour.
pub const BEHAVIOURS: &[Behaviour] = &[
    ("all ranks come", all_ranks_come),
    ("a late rank is waited for", a_late_rank_is_waited_for),
    ("a rank that sends nothing is named at the deadline", a_rank_that_sends_nothing_is_named),
    ("a rank that never comes is named at the deadline", a_rank_that_never_comes_is_named),
    ("a rank that left ends a wait", a_rank_that_left_ends_a_wait),
    ("a message that is sent twice arrives once", a_message_sent_twice_arrives_once),
    ("rank 0 can end its wait", rank_0_can_end_its_wait),
    ("two sessions are two", two_sessions_are_two),
    ("the same phase of another save is another round", another_save_is_another_round),
    ("a rank that comes again is in a new session, and its old self in none", a_rank_comes_again),
    ("a message of a foreign session is refused", a_foreign_session_is_refused),
    ("a rank too many is refused, with both processes named", a_rank_too_many_is_refused),
    ("two processes of one rank are refused, with both named", one_rank_twice_is_refused),
    ("a refusal to open reaches all ranks", a_refusal_reaches_all),
    ("a message that is too long is refused", a_long_message_is_refused),
];

/// Tests every behaviour with each number of ranks, in threads. `group` makes a new group of processes.
///
/// # Panics
/// When a behaviour is missing; its name is printed first.
pub fn run(kind: Kind, worlds: &[u32], mut group: impl FnMut() -> Join) {
    for (name, behaviour) in BEHAVIOURS {
        for &world in worlds {
            println!("behaviour: {name} world={world}");
            let (join, token) = (group(), Uuid::new_v4());
            thread::scope(|scope| {
                for rank in 0..world {
                    let member = Member { rank, world, local_rank: rank };
                    let rank = Rank { kind, member, token: format!("test-{token}"), join: Arc::clone(&join) };
                    scope.spawn(move || behaviour(&rank));
                }
            });
        }
    }
}

/// Tests every behaviour as one process of a job. All other processes of the job must call this function too.
/// `token` is the same in all of them, and new.
///
/// # Panics
/// As [`run`].
pub fn run_rank(kind: Kind, member: Member, token: &str, join: &Join) {
    for (index, (name, behaviour)) in BEHAVIOURS.iter().enumerate() {
        println!("behaviour: {name} rank={}", member.rank);
        behaviour(&Rank { kind, member, token: format!("{token}-{index}"), join: Arc::clone(join) });
    }
}

/// A deadline that is long enough for a busy machine.
fn patience() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn round(session: Session, save: u64, phase: Phase) -> Round {
    Round { session: session.id, save, phase }
}

fn text(rank: u32, round: Round) -> Vec<u8> {
    format!("{rank} {} {:?} {}", round.save, round.phase, round.session).into_bytes()
}

impl Rank {
    fn is_last(&self) -> bool {
        self.member.rank + 1 == self.member.world
    }

    fn last(&self) -> u32 {
        self.member.world - 1
    }

    fn join(&self) -> Arc<dyn Coordinator> {
        self.join_as(self.member)
    }

    fn join_as(&self, member: Member) -> Arc<dyn Coordinator> {
        (self.join)(self.member.rank, member).unwrap()
    }

    fn hello(&self, member: Member) -> Hello {
        let seat = self.member.rank;
        let (nonce, token) = (Uuid::new_v4(), self.token.clone());
        Hello { member, nonce, token, host: format!("host-{seat}"), pid: 1000 + seat }
    }

    fn try_meet(&self, ranks: &dyn Coordinator, deadline: Instant) -> Result<Session> {
        let hello = self.hello(ranks.member());
        let mut opened = 0;
        let result = ranks.meet(
            &hello,
            &mut |hellos| {
                opened += 1;
                assert!(hellos.iter().map(|h| h.member.rank).eq(0..self.member.world), "in the order of ranks");
                assert!(hellos.iter().all(|h| h.token == self.token));
                assert_eq!(hellos[0], hello);
                Ok(Session { id: Uuid::new_v4(), generation: 7 })
            },
            deadline,
        );
        assert!(opened <= u32::from(ranks.member().rank == 0), "rank 0 opens, once");
        result
    }

    fn meet(&self, ranks: &dyn Coordinator) -> Session {
        let session = self.try_meet(ranks, patience()).unwrap();
        assert_eq!(session.generation, 7);
        session
    }

    /// A round in which every rank sends its text, and every rank receives the text of rank 0.
    fn round(&self, ranks: &dyn Coordinator, round: Round) {
        self.gather(ranks, round);
        self.tell(ranks, round);
    }

    fn gather(&self, ranks: &dyn Coordinator, round: Round) {
        let mut seen = vec![0; self.member.world as usize];
        let each = &mut |rank: u32, message: &[u8]| {
            seen[rank as usize] += 1;
            assert_eq!(message, text(rank, round));
            ControlFlow::Continue(())
        };
        ranks.gather(round, &text(self.member.rank, round), each, patience()).unwrap();
        let times = u32::from(self.member.rank == 0);
        assert!(seen.iter().all(|seen| *seen == times), "once each {seen:?}");
    }

    fn tell(&self, ranks: &dyn Coordinator, round: Round) {
        let told = text(0, round);
        let message = (self.member.rank == 0).then_some(&told[..]);
        assert_eq!(ranks.tell(round, message, patience()).unwrap(), told);
    }

    /// A barrier. After it all ranks have done the earlier work.
    fn all_here(&self, ranks: &dyn Coordinator, session: Session) {
        self.round(ranks, round(session, 1 << 40, Phase::Plan));
    }

    /// Checks an error that reports missing ranks.
    fn assert_missing(&self, error: &Error, missing: u32) {
        assert!(matches!(error.kind(), ErrorKind::Deadline | ErrorKind::Unavailable), "{error:?}");
        // A busy machine delays other ranks too.
        let unknown = self.kind == Kind::Collective || self.kind == Kind::Wired && self.member.rank > 0;
        assert!(error.ranks().contains(&missing) || unknown && error.ranks().is_empty(), "{error:?}");
    }
}

fn all_ranks_come(rank: &Rank) {
    let ranks = rank.join();
    let session = rank.meet(&*ranks);
    for save in 0..4 {
        for phase in [Phase::Agree, Phase::Plan, Phase::Receipt, Phase::Outcome] {
            rank.round(&*ranks, round(session, save, phase));
        }
    }
    ranks.leave();
}

fn a_late_rank_is_waited_for(rank: &Rank) {
    let ranks = rank.join();
    let late = || rank.is_last().then(|| thread::sleep(Duration::from_millis(150)));
    late();
    let session = rank.meet(&*ranks);
    late();
    rank.round(&*ranks, round(session, 0, Phase::Agree));
}

fn a_rank_that_sends_nothing_is_named(rank: &Rank) {
    if rank.kind == Kind::Alone {
        return;
    }
    let ranks = rank.join();
    let session = rank.meet(&*ranks);
    rank.all_here(&*ranks, session);
    let at = round(session, (1 << 40) + 1, Phase::Receipt);
    if rank.is_last() {
        thread::sleep(Duration::from_millis(1500));
        return;
    }
    let start = Instant::now();
    let deadline = start + Duration::from_millis(400);
    let ok = &mut |_: u32, _: &[u8]| ControlFlow::Continue(());
    let sent = ranks.gather(at, b"", ok, deadline);
    let result = if rank.member.rank == 0 || sent.is_err() { sent } else { ranks.tell(at, None, deadline).map(drop) };
    let error = result.unwrap_err();
    rank.assert_missing(&error, if rank.member.rank == 0 { rank.last() } else { 0 });
    if rank.kind.is_mail() && rank.member.rank == 0 {
        assert!(ranks.missing(at).contains(&rank.last()));
    }
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    if rank.kind == Kind::Collective {
        let broken = ranks.gather(at, b"", &mut |_, _| ControlFlow::Continue(()), patience()).unwrap_err();
        assert_eq!(broken.kind(), ErrorKind::Unavailable, "broken until the ranks meet again");
    }
}

fn a_rank_that_never_comes_is_named(rank: &Rank) {
    if rank.kind == Kind::Alone {
        return;
    }
    let ranks = rank.join();
    let start = Instant::now();
    if rank.is_last() {
        thread::sleep(Duration::from_millis(1500));
        return;
    }
    let error = rank.try_meet(&*ranks, start + Duration::from_millis(700)).unwrap_err();
    // Rank 0 may have begun earlier, and may have given up and left by now.
    let of_rank_0 = rank.member.rank != 0 && error.ranks() == [0];
    rank.assert_missing(&error, if of_rank_0 { 0 } else { rank.last() });
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
}

fn a_rank_that_left_ends_a_wait(rank: &Rank) {
    if !rank.kind.is_mail() {
        return;
    }
    let ranks = rank.join();
    let session = rank.meet(&*ranks);
    rank.all_here(&*ranks, session);
    let at = round(session, (1 << 40) + 1, Phase::Receipt);
    if rank.is_last() {
        ranks.leave();
    } else if rank.member.rank == 0 {
        let ok = &mut |_: u32, _: &[u8]| ControlFlow::Continue(());
        let error = ranks.gather(at, b"", ok, Instant::now() + Duration::from_secs(2)).unwrap_err();
        assert!(error.ranks().contains(&rank.last()), "{error:?}");
    } else {
        // The error would also name a rank whose message rank 0 misses.
        ranks.gather(at, b"", &mut |_, _| ControlFlow::Continue(()), patience()).unwrap();
        thread::sleep(Duration::from_millis(2500));
    }
}

fn a_message_sent_twice_arrives_once(rank: &Rank) {
    if !rank.kind.is_mail() {
        return;
    }
    let ranks = rank.join();
    let session = rank.meet(&*ranks);
    for save in 0..2 {
        let at = round(session, save, Phase::Receipt);
        if rank.member.rank > 0 {
            rank.gather(&*ranks, at);
        }
        rank.round(&*ranks, at);
    }
}

fn rank_0_can_end_its_wait(rank: &Rank) {
    let ranks = rank.join();
    let session = rank.meet(&*ranks);
    let at = round(session, 0, Phase::Agree);
    let mut seen = 0;
    let each = &mut |_: u32, _: &[u8]| {
        seen += 1;
        ControlFlow::Break(())
    };
    ranks.gather(at, &text(rank.member.rank, at), each, patience()).unwrap();
    assert_eq!(seen, u32::from(rank.member.rank == 0));
    rank.tell(&*ranks, at);
    rank.round(&*ranks, round(session, 1, Phase::Agree));
}

fn two_sessions_are_two(rank: &Rank) {
    let ranks = rank.join();
    let first = rank.meet(&*ranks);
    rank.round(&*ranks, round(first, 0, Phase::Agree));
    let second = rank.meet(&*ranks);
    assert_ne!(first.id, second.id);
    rank.round(&*ranks, round(second, 0, Phase::Agree));
}

fn another_save_is_another_round(rank: &Rank) {
    let ranks = rank.join();
    let session = rank.meet(&*ranks);
    // The text of a rank contains the number of the save, so the test would notice the text of another save.
    for save in 0..20 {
        rank.round(&*ranks, round(session, save, Phase::Outcome));
    }
}

fn a_rank_comes_again(rank: &Rank) {
    if !rank.kind.has_free_seats() {
        return;
    }
    let old = rank.join();
    let first = rank.meet(&*old);
    rank.round(&*old, round(first, 0, Phase::Agree));
    let again = if rank.is_last() { rank.join() } else { Arc::clone(&old) };
    let second = rank.meet(&*again);
    assert_ne!(first.id, second.id);
    if rank.is_last() && rank.member.rank > 0 && rank.kind.is_mail() {
        let stale = round(first, 0, Phase::Receipt);
        let _ = old.gather(stale, b"stale", &mut |_, _| ControlFlow::Continue(()), patience());
        thread::sleep(Duration::from_millis(100));
    }
    rank.round(&*again, round(second, 0, Phase::Receipt));
}

fn a_foreign_session_is_refused(rank: &Rank) {
    if rank.kind == Kind::Alone {
        return;
    }
    let ranks = rank.join();
    let foreign = Session { id: Uuid::new_v4(), generation: 7 };
    let refused = |session| {
        let at = round(session, 0, Phase::Agree);
        let error = ranks.gather(at, b"", &mut |_, _| ControlFlow::Continue(()), patience()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
        let message = (rank.member.rank == 0).then_some(&b""[..]);
        assert_eq!(ranks.tell(at, message, patience()).unwrap_err().kind(), ErrorKind::Invalid);
        assert!(ranks.missing(at).is_empty());
    };
    refused(foreign);
    let session = rank.meet(&*ranks);
    refused(foreign);
    rank.round(&*ranks, round(session, 0, Phase::Agree));
    ranks.leave();
    refused(session);
}

/// The last process and another one ask for a job that is impossible.
fn refused_with_both(rank: &Rank, ranks: &dyn Coordinator, other: u32) {
    // A rank that is not involved may join when the test is over.
    let concerned = [0, other, rank.last()].contains(&rank.member.rank);
    let deadline = if concerned { patience() } else { Instant::now() + Duration::from_secs(2) };
    let error = rank.try_meet(ranks, deadline).unwrap_err();
    if !concerned && error.kind() == ErrorKind::Deadline {
        return;
    }
    assert_eq!(error.kind(), ErrorKind::Invalid, "{error:?}");
    let text = error.to_string();
    for seat in [other, rank.last()] {
        let place = format!("host=host-{seat} pid={}", 1000 + seat);
        assert!(text.contains(&place), "{text} without {place}");
    }
}

fn a_rank_too_many_is_refused(rank: &Rank) {
    if !rank.kind.has_free_seats() || rank.member.world < 2 {
        return;
    }
    let Member { world, .. } = rank.member;
    let wrong = Member { rank: world, world: world + 1, local_rank: 0 };
    let ranks = rank.join_as(if rank.is_last() { wrong } else { rank.member });
    // Every rank of a collective decides by itself.
    let one = if rank.kind == Kind::Collective && !rank.is_last() { rank.member.rank } else { 0 };
    refused_with_both(rank, &*ranks, one);
}

fn one_rank_twice_is_refused(rank: &Rank) {
    if !rank.kind.has_free_seats() || rank.member.world < 2 {
        return;
    }
    let twice = rank.last() - 1;
    let member = if rank.is_last() { Member { rank: twice, ..rank.member } } else { rank.member };
    refused_with_both(rank, &*rank.join_as(member), twice);
}

fn a_refusal_reaches_all(rank: &Rank) {
    let ranks = rank.join();
    let refuse =
        &mut |_: &[Hello]| Err(Error::new(ErrorKind::Conflict, "another job owns the root").with_ranks([3, 4]));
    let error = ranks.meet(&rank.hello(rank.member), refuse, patience()).unwrap_err();
    assert_eq!((error.kind(), error.to_string()), (ErrorKind::Conflict, "another job owns the root ranks=3..4".into()));
    // The ranks can try again.
    let session = rank.meet(&*ranks);
    rank.round(&*ranks, round(session, 0, Phase::Agree));
}

fn a_long_message_is_refused(rank: &Rank) {
    let ranks = rank.join();
    let session = rank.meet(&*ranks);
    let at = round(session, 0, Phase::Plan);
    let long = [7; MAX_MESSAGE + 1];
    let gather = |message: &[u8]| {
        let mut bytes = 0;
        let each = &mut |_: u32, message: &[u8]| {
            bytes += message.len();
            ControlFlow::Continue(())
        };
        ranks.gather(at, message, each, patience()).map(|()| bytes)
    };
    assert_eq!(gather(&long).unwrap_err().kind(), ErrorKind::Invalid);
    let all = if rank.member.rank == 0 { rank.member.world as usize * MAX_MESSAGE } else { 0 };
    assert_eq!(gather(&long[1..]).unwrap(), all);
    if rank.member.rank == 0 {
        assert_eq!(ranks.tell(at, Some(&long), patience()).unwrap_err().kind(), ErrorKind::Invalid);
    }
    let message = (rank.member.rank == 0).then_some(&long[1..]);
    assert_eq!(ranks.tell(at, message, patience()).unwrap(), long[1..]);
}
