//! The ranks of a session.

use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::ranks::{Coordinator, Hello, Member, Phase, Round, Session};
use crate::storage::shared::{SessionRecord, Shared, SharedAttempt, SharedWriting};
use std::sync::Arc;
use std::time::{Duration, Instant};
use uuid::Uuid;

/// How long after its deadline a rank still listens to rank 0. The deadline of rank 0 passes at about the
/// same time, and rank 0 then tells which ranks are missing.
pub(super) const HEAR_GRACE: Duration = Duration::from_secs(1);

/// Copies the notes of older sessions for the session of this generation.
pub(crate) type Carry<'a> = &'a dyn Fn(u64);

/// The ranks of a session, from the point of view of one of these ranks.
#[derive(Debug)]
pub(crate) struct Group {
    pub(super) coordinator: Arc<dyn Coordinator>,
    pub(super) shared: Arc<dyn Shared>,
    pub member: Member,
    pub session: Session,
}

impl Group {
    /// Waits for all ranks, and takes the root over from older sessions. Rank 0 lists steps only after that.
    /// `carry` is called on rank 0 with the generation, before the notes of older sessions are deleted.
    ///
    /// # Errors
    /// The errors of [`Coordinator::meet`]. `Invalid` if the ranks are not of one run, or if this rank sees
    /// another root than rank 0; `Conflict` if a newer session has taken the root.
    pub fn meet(
        coordinator: Arc<dyn Coordinator>,
        shared: Arc<dyn Shared>,
        token: &str,
        carry: Carry<'_>,
        deadline: Instant,
    ) -> Result<Self> {
        let hello = Hello {
            member: coordinator.member(),
            nonce: Uuid::new_v4(),
            token: token.to_owned(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid: std::process::id(),
        };
        Self::meet_as(&hello, coordinator, shared, carry, deadline)
    }

    /// As `meet`, for a process that passes its own hello.
    pub(super) fn meet_as(
        hello: &Hello,
        coordinator: Arc<dyn Coordinator>,
        shared: Arc<dyn Shared>,
        carry: Carry<'_>,
        deadline: Instant,
    ) -> Result<Self> {
        let member = hello.member;
        let mut open = |hellos: &[Hello]| open(shared.as_ref(), hellos, carry);
        let session = coordinator.meet(hello, &mut open, deadline)?;
        let group = Self { coordinator, shared, member, session };
        group.check_root(hello).map_err(|error| error.with_ranks([member.rank]))?;
        Ok(group)
    }

    /// Checks that this rank sees the root in which rank 0 has recorded the session.
    fn check_root(&self, hello: &Hello) -> Result<()> {
        let Session { id, generation } = self.session;
        match self.shared.newest()? {
            Some((newest, record)) if newest > generation => Err(taken_over(newest, record.as_ref())),
            Some((newest, Some(record)))
                if newest == generation && record.session == id && record.nonces.contains(&hello.nonce) =>
            {
                Ok(())
            }
            _ => {
                let why = "this rank does not see the root of rank 0: give all ranks the same shared directory";
                Err(Error::invalid(format!("{why} host={} pid={}", hello.host, hello.pid)))
            }
        }
    }

    /// Checks that this session still owns the root.
    ///
    /// # Errors
    /// `Conflict` if a newer session has taken it over.
    pub(super) fn check_newest(&self) -> Result<()> {
        match self.shared.newest()? {
            Some((newest, record)) if newest > self.session.generation => Err(taken_over(newest, record.as_ref())),
            _ => Ok(()),
        }
    }

    /// Begins the attempt of a save, on rank 0.
    pub fn begin(&self, save: u64, name: &str, overwrite: bool) -> Result<Arc<dyn SharedWriting>> {
        self.shared.begin(self.shared_attempt(save, name), overwrite)
    }

    /// Opens the attempt that rank 0 has begun.
    pub fn join(&self, save: u64, name: &str) -> Result<Arc<dyn SharedWriting>> {
        self.shared.join(self.shared_attempt(save, name))
    }

    fn shared_attempt<'a>(&self, save: u64, name: &'a str) -> SharedAttempt<'a> {
        SharedAttempt { name, attempt: self.attempt(save), generation: self.session.generation }
    }

    /// The attempt of a save of this session. Every rank computes it without a message.
    pub fn attempt(&self, save: u64) -> Attempt {
        let id = self.session.id.as_u128().wrapping_add(u128::from(save));
        Attempt::from_uuid(uuid::Builder::from_custom_bytes(id.to_be_bytes()).into_uuid())
    }

    pub(super) fn round(&self, save: u64, phase: Phase) -> Round {
        Round { session: self.session.id, save, phase }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        self.coordinator.leave();
    }
}

fn taken_over(generation: u64, record: Option<&SessionRecord>) -> Error {
    let who = record.map_or_else(String::new, |r| format!(" run={:?} host={} pid={}", r.token, r.host, r.pid));
    let why = "another session has taken this root over: is the job running twice?";
    Error::new(ErrorKind::Conflict, format!("{why} generation={generation}{who}"))
}

/// Opens a session on rank 0.
fn open(shared: &dyn Shared, hellos: &[Hello], carry: Carry<'_>) -> Result<Session> {
    let first = hellos.first().ok_or_else(|| Error::internal("a session without ranks"))?;
    for hello in hellos {
        let differ = |what: &str, theirs: &str, ours: &str| {
            let why = format!("ranks differ in the {what} rank_0={ours:?} rank_{}={theirs:?}", hello.member.rank);
            Err(Error::invalid(why).with_ranks([hello.member.rank]))
        };
        let (ours, theirs) = (first.member.world, hello.member.world);
        if ours != theirs {
            return differ("number of ranks", &theirs.to_string(), &ours.to_string());
        }
        if first.token != hello.token {
            return differ("run", &hello.token, &first.token);
        }
    }
    let record = SessionRecord {
        session: Uuid::new_v4(),
        token: first.token.clone(),
        host: first.host.clone(),
        pid: first.pid,
        nonces: hellos.iter().map(|hello| hello.nonce).collect(),
    };
    let generation = shared.open_session(&record)?;
    carry(generation);
    shared.take_over(generation)?;
    Ok(Session { id: record.session, generation })
}
