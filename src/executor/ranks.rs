//! Saves by several ranks: numbers them in the order of calls, and carries out their rounds in a thread.
//!
//! **Order.** Every call of `save` has a number, also one that is refused, because the ranks count calls: a
//! rank that skipped one by itself would save another step than the others from then on. [`Turns`] hands
//! out the numbers; the thread that commits carries out the rounds of one save after another. **Overlap.**
//! Rank 0 applies the overlap policy, and the others follow it. **Completion.** A writer that needs the
//! attempt waits in its [`Gate`] until the ranks have agreed.

use crate::commit::several::{Agreed, Attempted, Group, Structures, Vote};
use crate::completion::{Calls, Completion};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::{dropped, guarded};
use crate::id::Attempt;
use crate::outcome::Outcome;
use crate::plan::Request;
use crate::settings::Overlap;
use crate::storage::Writing;
use crate::sync::{Mutex, MutexGuard, lock};
use crate::writer::{Begin, Task};
use crossbeam_channel::{Receiver, Sender};
use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// The ranks of an executor, and the numbers of their saves.
#[derive(Debug)]
pub(super) struct Turns {
    pub group: Arc<Group>,
    next: Mutex<u64>,
}

/// The number of one call of `save`, held while the call decides what becomes of it.
pub(super) struct Turn<'a> {
    pub group: &'a Group,
    next: MutexGuard<'a, u64>,
    /// The thread that carries out the rounds knows of the call.
    known: Cell<bool>,
}

impl Turns {
    pub fn new(group: Arc<Group>) -> Self {
        Self { group, next: Mutex::new(0) }
    }

    /// Waits for the turn of this call.
    pub fn take(&self) -> Turn<'_> {
        Turn { group: &self.group, next: lock(&self.next), known: Cell::new(false) }
    }
}

impl Turn<'_> {
    /// The number of the save.
    pub fn save(&self) -> u64 {
        *self.next
    }

    /// The attempt of the save.
    pub fn attempt(&self) -> Attempt {
        self.group.attempt(self.save())
    }

    /// The overlap policy of this rank: what skips saves is rank 0's to decide.
    pub fn overlap(&self, overlap: Overlap) -> Overlap {
        match overlap {
            Overlap::Skip | Overlap::Latest if self.group.member.rank > 0 => Overlap::Queue(usize::MAX),
            overlap => overlap,
        }
    }

    /// Hands the call over, unless it was before.
    pub fn call(&self, calls: &Sender<Called>, wanted: &Wanted, what: What) {
        if !self.known.replace(true) {
            let Wanted { step, name, overwrite, deadline } = wanted.clone();
            // The thread has ended only after a shutdown, which takes no saves.
            let _ = calls.send(Called { save: self.save(), step, name, overwrite, deadline, what });
        }
    }
}

/// What a call of `save` wants.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub step: u64,
    pub name: String,
    pub overwrite: bool,
    pub deadline: Instant,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.next += 1;
    }
}

/// A call of `save`, for the thread that carries out the rounds.
#[derive(Debug)]
pub(super) struct Called {
    pub save: u64,
    pub step: u64,
    pub name: String,
    pub overwrite: bool,
    pub deadline: Instant,
    pub what: What,
}

/// What became of a call of `save` on this rank.
#[derive(Debug)]
pub(super) enum What {
    /// It is being staged.
    Begun {
        task: Arc<Task>,
        /// Receives the task when its last chunk is done.
        ended: Receiver<Arc<Task>>,
        gate: Arc<Gate>,
    },
    /// The overlap policy ended it.
    Ended(Outcome),
    /// It was refused.
    Refused(Error),
}

/// Where writers wait until the ranks have agreed and the attempt exists.
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

/// Carries out the rounds of saves.
#[derive(Debug)]
pub(super) struct Rounds {
    group: Arc<Group>,
    known: Structures,
}

/// A save of which every chunk is done, and how it ends.
pub(super) enum Next {
    /// All ranks have written; it is to be committed.
    Commit(Attempted),
    /// It ends without a commit.
    End(Result<Outcome>),
    /// It ends on this rank, and the others may go on with it until they learn that.
    Withdraw(Error),
}

impl Rounds {
    pub fn new(group: Arc<Group>) -> Self {
        Self { group, known: Structures::none() }
    }

    /// Agrees with the other ranks on a call, and lets its writers go on. `allow` checks on rank 0 whether
    /// the step may be written.
    pub fn agree(&mut self, called: &Called, allow: &dyn Fn(&Called) -> Result<()>) -> Next {
        let (group, save) = (self.group.clone(), called.save);
        let (mut error, mut ended) = (None, None);
        let mut description = Vec::new();
        match &called.what {
            What::Begun { task, .. } => {
                let ticket = &task.request.ticket;
                description = task.request.plan.description();
                if ticket.agreed.swap(true, Ordering::AcqRel) {
                    // The call that supersedes it is about to end it.
                    ended = ticket.done.wait(called.deadline).and_then(Result::ok);
                }
                error = ticket.failure();
            }
            What::Ended(outcome) if group.member.rank == 0 => ended = Some(outcome.clone()),
            What::Ended(_) => error = Some(Error::new(ErrorKind::Cancelled, "a rank takes no more saves")),
            What::Refused(why) => error = Some(why.clone()),
        }
        let vote = Vote {
            step: called.step,
            name: called.name.clone(),
            overwrite: called.overwrite,
            structure: Digest::of(&description),
            error: error.as_ref().map(|error| group.wire(error)),
        };
        let mut begun = None;
        let agreed = guarded("the storage panicked while ranks agreed", || {
            if group.member.rank > 0 {
                return group.follow(save, &vote, &description, called.deadline);
            }
            let mut begin = || {
                allow(called)?;
                begun = Some(group.begin(save, &called.name, called.overwrite)?);
                Ok(())
            };
            let mut assign = |states: Vec<Vec<u8>>| Ok(vec![Vec::new(); states.len()]);
            let (known, ended) = (&mut self.known, ended.as_ref());
            group.decide(save, &vote, &description, ended, known, &mut assign, &mut begin, called.deadline)
        });
        let next = match agreed {
            Ok(Agreed::Go { plan, .. }) => {
                let attempt = begun.map_or_else(|| group.join(save, &called.name), Ok);
                Next::Commit(Attempted { save, attempt, plan })
            }
            Ok(Agreed::Ended(outcome)) => Next::End(Ok(outcome)),
            Ok(Agreed::Refused(error)) => Next::End(Err(error)),
            // Rank 0 has told the others, as far as it could.
            Err(error) if group.member.rank == 0 => Next::End(Err(error)),
            Err(error) => Next::Withdraw(error),
        };
        if let What::Begun { gate, .. } = &called.what {
            gate.0.complete(match &next {
                Next::Commit(attempted) => attempted.attempt.clone().map(|attempt| attempt as Arc<dyn Writing>),
                Next::End(Ok(_)) => Err(ended_by_rank_0()),
                Next::End(Err(error)) | Next::Withdraw(error) => Err(error.clone()),
            });
        }
        next
    }
}

fn ended_by_rank_0() -> Error {
    Error::new(ErrorKind::Cancelled, "rank 0 ended the save by its overlap policy")
}

impl Rounds {
    /// The body of the thread: carries out the rounds of each call. `commit` ends a save that all ranks have
    /// agreed on, once its last chunk is done.
    pub fn run(
        mut self,
        calls: Receiver<Called>,
        allow: &dyn Fn(&Called) -> Result<()>,
        mut commit: impl FnMut(&Task, &Group, &Attempted),
    ) {
        for called in calls {
            let next = self.agree(&called, allow);
            let (save, deadline) = (called.save, called.deadline);
            match (called.what, next) {
                (What::Begun { task, ended, .. }, Next::Commit(attempted)) => {
                    let rank = self.group.member.rank;
                    wait_for_chunks(&task, &ended, rank);
                    commit(&task, &self.group, &attempted);
                    dropped(task);
                }
                (What::Begun { task, ended, .. }, Next::End(result)) => {
                    end(&task, &ended, result);
                    dropped(task);
                }
                (What::Begun { task, ended, .. }, Next::Withdraw(error)) => {
                    task.request.ticket.fail(error.clone());
                    self.group.withdraw(save, &error, deadline);
                    end(&task, &ended, Err(error));
                    dropped(task);
                }
                (What::Ended(_) | What::Refused(_), Next::Withdraw(error)) => {
                    self.group.withdraw(save, &error, deadline);
                }
                (What::Ended(_) | What::Refused(_), Next::Commit(_)) => {
                    let error = Error::internal("the ranks agreed on a save that this one has refused");
                    self.group.withdraw(save, &error, deadline);
                }
                (What::Ended(_) | What::Refused(_), Next::End(_)) => {}
            }
        }
    }
}

/// Waits until every chunk is done: written, or returned because the save has failed.
fn wait_for_chunks(task: &Task, ended: &Receiver<Arc<Task>>, rank: u32) {
    let ticket = &task.request.ticket;
    if ended.recv_deadline(ticket.deadline).is_err() {
        let late = format!("this rank had not written its files by the deadline phase={:?}", ticket.phase());
        ticket.fail(Error::new(ErrorKind::Deadline, late).with_rank(rank));
        let _ = ended.recv();
    }
}

/// Ends a save that is not committed, once its last chunk is done.
fn end(task: &Arc<Task>, ended: &Receiver<Arc<Task>>, result: Result<Outcome>) {
    let ticket = &task.request.ticket;
    // A save that rank 0 has superseded has ended already, and none of its chunks will come.
    if ticket.done.is_complete() && !ticket.failed() {
        return;
    }
    ticket.fail(result.as_ref().err().cloned().unwrap_or_else(ended_by_rank_0));
    let _ = ended.recv();
    drop(task.take_kept());
    ticket.finish(result).into_iter().for_each(Calls::here);
}
