//! Saves by several ranks: the calls are numbered in order, and the committer carries out their rounds.
//!
//! **Order.** Every call of `save` has a number, also a call that is refused, because the ranks count calls:
//! a rank that skipped a call by itself would from then on save other steps than the others. [`Turns`]
//! assigns the numbers. The committer carries out the rounds of one save after another.
//! **Overlap.** Rank 0 applies the overlap policy, and the others follow it.
//! **Completion.** A writer that needs the attempt waits in its [`Gate`] until the ranks have agreed. A call
//! with a new structure waits until it has its share of the plan.

use crate::commit::several::{Agreed, Assigned, Attempted, Describe, Group, Structure, Structures, Vote};
use crate::completion::{Calls, Completion};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{dropped, guarded};
use crate::id::Attempt;
use crate::outcome::Outcome;
use crate::plan::{Description, Merge, Request};
use crate::ranks::Member;
use crate::settings::Overlap;
use crate::storage::Writing;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::ticket::Ticket;
use crate::writer::{Begin, Task};
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// The description of this rank's tensors, and its share of the plan that the ranks made.
#[derive(Clone, Debug)]
pub(super) struct Described {
    /// The description, encoded.
    pub bytes: Arc<[u8]>,
    pub digest: Digest,
    /// The order of its boxes.
    pub order: Arc<[usize]>,
    /// The share, encoded. Empty while there is none.
    pub share: Arc<[u8]>,
}

/// The newest share of this rank, with the digest of the description that it belongs to.
type Newest = Arc<Mutex<Option<(Digest, Arc<[u8]>)>>>;

/// The ranks of an executor, and the numbers of their saves.
#[derive(Debug)]
pub(super) struct Turns {
    group: Arc<Group>,
    next: Mutex<u64>,
    newest: Newest,
}

/// The number of one call of `save`. It is held while the outcome of the call is decided.
pub(super) struct Turn<'a> {
    group: &'a Arc<Group>,
    next: MutexGuard<'a, u64>,
    newest: &'a Newest,
    state: RefCell<Handed>,
}

/// The part of a call that the committer knows.
enum Handed {
    /// Nothing. The value is the description of the plan in use, if there is one.
    Nothing(Option<Described>),
    /// The description. The committer waits for the outcome of the call.
    Description(Sender<What>),
    All,
}

/// Makes the two ends of a group's saves. `first` is the number of the first save.
pub(super) fn turns_and_rounds(group: Arc<Group>, first: u64) -> (Turns, Rounds) {
    let newest = Newest::default();
    let turns = Turns { group: group.clone(), next: Mutex::new(first), newest: newest.clone() };
    (turns, Rounds { group, known: Structures::none(), newest })
}

impl Turns {
    /// The position of this process among the ranks.
    pub fn member(&self) -> Member {
        self.group.member
    }

    /// Waits until it is the turn of this call.
    pub fn take(&self) -> Turn<'_> {
        let state = RefCell::new(Handed::Nothing(None));
        Turn { group: &self.group, next: lock(&self.next), newest: &self.newest, state }
    }
}

impl Turn<'_> {
    /// Returns the attempt of the save.
    pub fn attempt(&self) -> Attempt {
        self.group.attempt(*self.next)
    }

    /// Returns the overlap policy of this rank. Only rank 0 decides to skip saves.
    pub fn overlap(&self, overlap: Overlap) -> Overlap {
        match overlap {
            Overlap::Skip | Overlap::Latest if self.group.member.rank > 0 => Overlap::Queue(usize::MAX),
            overlap => overlap,
        }
    }

    /// Returns the share of this rank if the ranks have made a new plan since, because another rank's tensors
    /// changed.
    pub fn newer_share(&self, described: &Described) -> Option<Arc<[u8]>> {
        let newest = lock(self.newest);
        let (_, share) = newest.as_ref().filter(|(of, share)| *of == described.digest && *share != described.share)?;
        Some(share.clone())
    }

    /// Records that the call saves by a plan that was made before.
    pub fn uses(&self, described: Option<Described>) {
        *self.state.borrow_mut() = Handed::Nothing(described);
    }

    /// Sends the description of a new structure to the committer. The receiver gets the share of this rank.
    pub fn describe(&self, calls: &Sender<Called>, wanted: &Wanted, described: Described) -> Receiver<Answer> {
        let ((reply, answer), (then, what)) = (bounded(1), bounded(1));
        *self.state.borrow_mut() = Handed::Description(then);
        let described = Some(described);
        self.send(
            calls,
            Called { save: *self.next, wanted: wanted.clone(), described, early: Early::New(reply), what },
        );
        answer
    }

    /// Sends the outcome of the call to the committer, unless the committer knows it.
    pub fn call(&self, calls: &Sender<Called>, wanted: &Wanted, what: What) {
        match self.state.replace(Handed::All) {
            Handed::All => {}
            Handed::Description(then) => drop(then.send(what)),
            Handed::Nothing(described) => {
                let early = match &what {
                    What::Begun { task, .. } => Early::Begun(task.request.ticket.clone()),
                    What::Ended(outcome) => Early::Ended(outcome.clone()),
                    What::Refused(error) => Early::Refused(error.clone()),
                };
                let (then, known) = bounded(1);
                let _ = then.send(what);
                let (save, wanted) = (*self.next, wanted.clone());
                self.send(calls, Called { save, wanted, described, early, what: known });
            }
        }
    }

    /// Borrows the ranks in the place of a save.
    pub fn borrow(&self, calls: &Sender<Called>, wanted: &Wanted) -> Borrowed {
        let ((begin, begins), (lent, what)) = (bounded(1), bounded(1));
        *self.state.borrow_mut() = Handed::All;
        let (save, wanted) = (*self.next, wanted.clone());
        self.send(calls, Called { save, wanted, described: None, early: Early::Lent(begin), what });
        let group = self.group.clone();
        Borrowed { group, save, begins, lent }
    }

    fn send(&self, calls: &Sender<Called>, called: Called) {
        // The committer ends only after a shutdown, when no saves are taken.
        let _ = calls.send(called);
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.next += 1;
    }
}

/// The ranks, lent to an adapter.
pub(super) struct Borrowed {
    pub group: Arc<Group>,
    /// The number of the save that the adapter's exchanges replace.
    pub save: u64,
    /// Receives a message when the adapter gets the ranks.
    pub begins: Receiver<()>,
    /// Dropping it returns the ranks.
    pub lent: Sender<What>,
}

/// The request of a call of `save`.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub step: u64,
    pub name: String,
    pub overwrite: bool,
    pub deadline: Instant,
}

/// A call of `save`, as sent to the committer.
#[derive(Debug)]
pub(super) struct Called {
    save: u64,
    pub wanted: Wanted,
    described: Option<Described>,
    early: Early,
    /// Receives the outcome of the call.
    what: Receiver<What>,
}

/// The state of a call before the ranks agree.
#[derive(Debug)]
enum Early {
    /// The save is being staged by a plan that was made before.
    Begun(Arc<Ticket>),
    /// The save has a new structure, and waits for its share of the plan.
    New(Sender<Answer>),
    Ended(Outcome),
    Refused(Error),
    /// The call is no save: an adapter exchanges data with the other ranks.
    Lent(Sender<()>),
}

/// The decision of the ranks about a call that waits for its share.
#[derive(Debug)]
pub(super) enum Answer {
    Share(Arc<[u8]>),
    Ended(Outcome),
    Refused(Error),
}

/// The outcome of a call of `save` on this rank.
#[derive(Debug)]
pub(super) enum What {
    /// The save is being staged.
    Begun {
        task: Arc<Task>,
        /// Receives the task when its last chunk is done.
        ended: Receiver<Arc<Task>>,
        gate: Arc<Gate>,
    },
    /// The overlap policy ended the save.
    Ended(Outcome),
    /// The save was refused.
    Refused(Error),
}

/// The place where writers wait until the ranks have agreed and the attempt exists.
#[derive(Debug)]
pub(super) struct Gate(Completion<Result<Arc<dyn Writing>>>);

impl Gate {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Completion::new()))
    }
}

impl Begin for Gate {
    fn begin(&self, request: &Request) -> Result<Arc<dyn Writing>> {
        let late = || Error::new(ErrorKind::Deadline, "the ranks had not agreed on the save by its deadline");
        self.0.wait(request.ticket.deadline + request.ticket.grace).unwrap_or_else(|| Err(late()))
    }
}

/// How long after the deadline of a call the committer may still be busy with it. The exchanges of an adapter
/// end within two seconds of that deadline, so none is under way when the ranks are taken back.
pub(super) const LATE: Duration = Duration::from_secs(3);

/// Carries out the rounds of saves.
#[derive(Debug)]
pub(super) struct Rounds {
    group: Arc<Group>,
    known: Structures,
    newest: Newest,
}

/// The decision of the ranks about a call.
enum Next {
    /// All ranks write. `share` is this rank's part of the plan, if the plan is new.
    Commit(Attempted, Option<Arc<[u8]>>),
    /// The save ends without a commit.
    End(Result<Outcome>),
    /// The save ends on this rank. The others may continue it until they learn that.
    Withdraw(Error),
}

impl Rounds {
    /// The body of the committer: carries out the rounds of each call. `allow` checks on rank 0 whether a
    /// step may be written. `commit` ends a save that all ranks have agreed on, once its last chunk is done.
    pub fn run(
        mut self,
        calls: Receiver<Called>,
        allow: &dyn Fn(&Wanted) -> Result<()>,
        mut commit: impl FnMut(&Task, &Group, &Attempted),
    ) {
        for called in calls {
            if let Early::Lent(begin) = &called.early {
                if begin.send(()).is_err() {
                    // The adapter has given up waiting.
                    self.group.decline(called.save, called.wanted.deadline);
                }
                // An adapter that hangs, such as in a storage writer of the program, must not block the
                // ranks.
                if let Err(RecvTimeoutError::Timeout) = called.what.recv_deadline(called.wanted.deadline + LATE) {
                    let step = called.wanted.step;
                    tracing::error!(step, "the ranks go on without a planner or storage writer that hangs");
                }
                continue;
            }
            let next = self.agree(&called, allow);
            let Called { save, wanted: Wanted { deadline, .. }, early, what, .. } = called;
            if let Early::New(reply) = early {
                let answer = match &next {
                    Next::Commit(_, Some(share)) => Answer::Share(share.clone()),
                    Next::Commit(_, None) => Answer::Refused(Error::internal("rank 0 knows a structure that is new")),
                    Next::End(Ok(outcome)) => Answer::Ended(outcome.clone()),
                    Next::End(Err(error)) | Next::Withdraw(error) => Answer::Refused(error.clone()),
                };
                let _ = reply.send(answer);
            }
            // The call sends the outcome, or drops the sender, after a bounded time.
            let what = what
                .recv()
                .unwrap_or_else(|_| What::Refused(Error::new(ErrorKind::Cancelled, "a call of `save` has ended")));
            if let What::Begun { gate, .. } = &what {
                gate.0.complete(match &next {
                    Next::Commit(attempted, _) => attempted.attempt.clone().map(|attempt| attempt as Arc<dyn Writing>),
                    Next::End(Ok(_)) => Err(ended_by_rank_0()),
                    Next::End(Err(error)) | Next::Withdraw(error) => Err(error.clone()),
                });
            }
            match (what, next) {
                (What::Begun { task, ended, .. }, Next::Commit(attempted, _)) => {
                    wait_for_chunks(&task, &ended, self.group.member.rank);
                    commit(&task, &self.group, &attempted);
                    dropped(task);
                }
                (What::Begun { task, ended, .. }, Next::End(result)) => {
                    end(&task, &ended, result);
                    dropped(task);
                }
                (What::Begun { task, ended, .. }, Next::Withdraw(error)) => {
                    task.request.ticket.fail(error.clone());
                    let first = self.group.withdraw(save, &error, deadline);
                    end(&task, &ended, Err(first.unwrap_or(error)));
                    dropped(task);
                }
                (What::Ended(_) | What::Refused(_), Next::Withdraw(error)) => {
                    let _ = self.group.withdraw(save, &error, deadline);
                }
                (What::Refused(error), Next::Commit(attempted, _)) => self.refuse(&attempted, &error, deadline),
                (What::Ended(_), Next::Commit(attempted, _)) => {
                    self.refuse(&attempted, &Error::internal("the ranks agreed on a save that has ended"), deadline);
                }
                (What::Ended(_) | What::Refused(_), Next::End(_)) => {}
            }
        }
    }

    /// Fails a save on all ranks, because this rank has refused it after they agreed.
    fn refuse(&self, attempted: &Attempted, error: &Error, deadline: Instant) {
        let _ = self.group.refuse(attempted.save, error, deadline);
        if let (0, Ok(attempt)) = (self.group.member.rank, &attempted.attempt)
            && let Err(error) = attempt.abandon()
        {
            tracing::warn!(error = format_args!("{error:#}"), "a failed attempt is left to a sweep");
        }
    }

    /// Agrees with the other ranks on a call.
    fn agree(&mut self, called: &Called, allow: &dyn Fn(&Wanted) -> Result<()>) -> Next {
        let Called { save, wanted, described, early, .. } = called;
        let (group, save, deadline) = (self.group.clone(), *save, wanted.deadline);
        let (mut error, mut ended) = (None, None);
        match early {
            Early::Begun(ticket) => {
                if ticket.agreed.swap(true, Ordering::AcqRel) {
                    // The call that supersedes this save is about to end it.
                    ended = ticket.done.wait(deadline).and_then(Result::ok);
                }
                error = ticket.failure();
            }
            Early::New(_) => {}
            Early::Ended(outcome) if group.member.rank == 0 => ended = Some(outcome.clone()),
            Early::Ended(_) => error = Some(Error::new(ErrorKind::Cancelled, "a rank takes no more saves")),
            Early::Refused(why) => error = Some(why.clone()),
            Early::Lent(_) => error = Some(Error::internal("the ranks are lent")),
        }
        let description: &[u8] = described.as_ref().map_or(&[], |described| &described.bytes);
        let structure = described.as_ref().map_or(Digest::EMPTY, |described| described.digest);
        let vote = Vote {
            fresh: matches!(early, Early::New(_)),
            step: wanted.step,
            name: wanted.name.clone(),
            overwrite: wanted.overwrite,
            structure,
            error: error.as_ref().map(|error| group.wire(error)),
        };
        let mut begun = None;
        let agreed = guarded("the storage panicked while ranks agreed", || {
            if group.member.rank > 0 {
                return group.follow(save, &vote, description, deadline);
            }
            let mut begin = || {
                allow(wanted)?;
                begun = Some(group.begin(save, &wanted.name, wanted.overwrite)?);
                Ok(())
            };
            let world = group.member.world;
            let mut assign = |describe: Describe<'_>| assign(world, describe);
            let (known, ended) = (&mut self.known, ended.as_ref());
            group.decide(save, &vote, description, ended, known, &mut assign, &mut begin, deadline)
        });
        match agreed {
            Ok(Agreed::Go { plan, part }) => {
                let mut attempt = begun.map_or_else(|| group.join(save, &wanted.name), Ok);
                let share = part.map(Arc::<[u8]>::from);
                if let Some(share) = &share {
                    *lock(&self.newest) = Some((structure, share.clone()));
                }
                let other = |described: &Described| share.as_ref().is_some_and(|share| *share != described.share);
                if matches!(early, Early::Begun(_)) && described.as_ref().is_some_and(other) {
                    let why = "the tensors of another rank have changed, so this rank's share has changed: save again";
                    attempt = Err(Error::new(ErrorKind::Busy, why));
                }
                Next::Commit(Attempted { save, attempt, plan, structure: self.known.structure() }, share)
            }
            Ok(Agreed::Ended(outcome)) => Next::End(Ok(outcome)),
            Ok(Agreed::Refused(error)) => Next::End(Err(error)),
            // Rank 0 has told the others, as far as it could reach them.
            Err(error) if group.member.rank == 0 => Next::End(Err(error)),
            Err(error) => Next::Withdraw(error),
        }
    }
}

/// Merges the descriptions of all ranks. Returns the share of each rank, and the structure.
fn assign(world: u32, describe: Describe<'_>) -> Result<Assigned> {
    let mut merge = Merge::new(world);
    for rank in 0..world {
        let description = Description::decode(&describe(rank)?).map_err(|error| error.with_rank(rank))?;
        merge.add(rank, &description)?;
    }
    let whole = merge.finish()?;
    let shares = whole.shares.iter().map(|share| share.encode()).collect::<Result<_>>()?;
    Ok((shares, Some(Arc::new(Structure::of(whole)?))))
}

fn ended_by_rank_0() -> Error {
    Error::new(ErrorKind::Cancelled, "rank 0 ended the save by its overlap policy")
}

/// How long the rounds of a failed save wait for its chunks. A writer that hangs keeps its slab and its file
/// meanwhile, and must not block the rounds of later saves.
const CHUNKS_GRACE: Duration = Duration::from_secs(1);

/// Waits until every chunk is done: written, or returned because the save has failed.
fn wait_for_chunks(task: &Task, ended: &Receiver<Arc<Task>>, rank: u32) {
    let ticket = &task.request.ticket;
    if ended.recv_deadline(ticket.deadline).is_err() {
        let late = format!("this rank had not written its files by the deadline phase={:?}", ticket.phase());
        ticket.fail(Error::new(ErrorKind::Deadline, late).with_rank(rank));
        wait_for_failed_chunks(task, ended);
    }
}

/// Waits until the chunks of a failed save have been returned, unless a thread hangs with one.
fn wait_for_failed_chunks(task: &Task, ended: &Receiver<Arc<Task>>) {
    if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(CHUNKS_GRACE) {
        tracing::error!(
            step = task.request.ticket.step,
            "a thread hangs with a chunk of a failed save: later saves do not wait for it"
        );
    }
}

/// Ends a save that is not committed, once its last chunk is done.
fn end(task: &Arc<Task>, ended: &Receiver<Arc<Task>>, result: Result<Outcome>) {
    let ticket = &task.request.ticket;
    // A save that rank 0 has superseded has ended already, and no chunk of it will arrive.
    if ticket.done.is_complete() && !ticket.failed() {
        return;
    }
    ticket.fail(result.as_ref().err().cloned().unwrap_or_else(ended_by_rank_0));
    wait_for_failed_chunks(task, ended);
    drop(task.take_kept());
    ticket.finish(result).into_iter().for_each(Calls::here);
}
