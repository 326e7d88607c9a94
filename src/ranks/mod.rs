//! Coordination of the ranks that save one checkpoint together.
//!
//! A [`Coordinator`] carries small messages between rank 0 and the other ranks. It decides nothing: a step
//! exists only through a rename on the storage, which rank 0 alone carries out. So a coordinator may lose,
//! delay or repeat messages without tearing a step.
//!
//! **Consistency.** Every message belongs to a [`Round`]: session, save and phase. A coordinator returns no
//! message of another round. **Completion.** Every wait ends at its deadline, with an error of kind
//! `Deadline` that names the missing ranks, as far as they are known. **Crash.** A rank that is started again
//! has a new nonce, so it is in no session until the ranks meet again. **Failure.** If a rank is known to be
//! dead, waits for it end early, with `Unavailable`.
//!
//! | coordinator | needs | notices a dead rank | a message costs |
//! |---|---|---|---|
//! | [`Alone`] | nothing: one rank | | nothing |
//! | [`SharedDirectory`] | a directory that all ranks see, and a run token | at once on the same host, else at the deadline | a small file |
//! | `Etcd` (feature `etcd`) | an etcd server | 10 to 15 s later | a put, a watch |
//! | `Mpi` (feature `mpi`) | an installed MPI | at the deadline; mpirun ends the job | a message |
//! | [`Callback`] | an all-gather of the program | as the all-gather does | a part of an all-gather |

mod alone;
pub(crate) mod board;
mod callback;
mod directory;
mod envelope;
#[cfg(feature = "etcd")]
mod etcd;
pub mod launcher;
#[cfg(feature = "mpi")]
mod mpi;
mod refusal;

pub use alone::Alone;
pub use callback::Callback;
pub use directory::SharedDirectory;
pub(crate) use envelope::read_any;
#[cfg(feature = "etcd")]
pub use etcd::Etcd;
#[cfg(feature = "mpi")]
pub use mpi::Mpi;

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::ops::ControlFlow;
use std::time::Instant;
use uuid::Uuid;

/// The longest message, in bytes. Plans and tables travel through the storage.
pub const MAX_MESSAGE: usize = 4096;

/// The position of a process among the ranks of a job.
///
/// ```
/// use ashore::ranks::Member;
/// // The third of eight processes, four to a host.
/// let member = Member { rank: 2, world: 8, local_rank: 2 };
/// assert_eq!(Member::ALONE.world, 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Its number, from 0. Rank 0 publishes.
    pub rank: u32,
    /// The number of ranks, at least 1.
    pub world: u32,
    /// Its number among the ranks of its host.
    pub local_rank: u32,
}

impl Member {
    /// A process that saves alone.
    pub const ALONE: Self = Self { rank: 0, world: 1, local_rank: 0 };
}

/// The message of a rank about itself when the ranks meet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Its position.
    pub member: Member,
    /// A random number that this process draws. A process that is started again draws another one.
    pub nonce: Uuid,
    /// The identity of the run that the launcher gives to all its processes.
    pub token: String,
    /// The name of its host, for messages.
    pub host: String,
    /// Its process id, for messages.
    pub pid: u32,
}

/// One set of living processes that save together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Session {
    /// Its identity.
    pub id: Uuid,
    /// Its number in the root. The session with the highest number owns the root.
    pub generation: u64,
}

/// The round that a message belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Round {
    /// The session.
    pub session: Uuid,
    /// The number of the save in the session, from 0. Not the step, because a step can be saved twice.
    pub save: u64,
    /// The part of the save.
    pub phase: Phase,
}

/// The parts of a save in which ranks exchange messages, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Phase {
    /// The ranks agree to save the same step, by the same plan.
    Agree,
    /// The ranks exchange plans, because the structure is new.
    Plan,
    /// Each rank has made its files durable.
    Receipt,
    /// Rank 0 tells how the save ended.
    Outcome,
}

/// Carries messages between rank 0 and the other ranks of a job.
///
/// One thread at a time calls the methods of a coordinator, in the same order on all ranks.
pub trait Coordinator: Send + Sync + Debug {
    /// The position of this process.
    fn member(&self) -> Member;

    /// Brings all ranks together, once per session. Rank 0 calls `open` with the greeting of every rank, in
    /// the order of ranks. `open` returns the session, or refuses. `meet` returns on every rank the session
    /// that was opened with this rank's greeting, or the error of `open`.
    ///
    /// # Errors
    /// `Deadline`, with the missing ranks; `Invalid` if two processes have the same rank, or a rank is not
    /// below the number of ranks; the error of `open`.
    fn meet(
        &self,
        hello: &Hello,
        open: &mut dyn FnMut(&[Hello]) -> Result<Session>,
        deadline: Instant,
    ) -> Result<Session>;

    /// Hands `message` to rank 0. On rank 0, `each` is called once for every rank, its own included, with the
    /// rank and its message, as messages arrive. The call returns when all messages have arrived or `each`
    /// returns `Break`. On other ranks it returns when the message is under way.
    ///
    /// # Errors
    /// `Deadline` or `Unavailable`, with the missing ranks. `Invalid` if the message is longer than
    /// [`MAX_MESSAGE`].
    fn gather(
        &self,
        round: Round,
        message: &[u8],
        each: &mut dyn FnMut(u32, &[u8]) -> ControlFlow<()>,
        deadline: Instant,
    ) -> Result<()>;

    /// Tells all ranks the message of rank 0. `message` is `Some` on rank 0 and `None` on the others. Every
    /// rank returns the message.
    ///
    /// # Errors
    /// `Deadline` or `Unavailable` if rank 0 did not tell the message in time. `Invalid` if the message is
    /// longer than [`MAX_MESSAGE`].
    fn tell(&self, round: Round, message: Option<&[u8]>, deadline: Instant) -> Result<Vec<u8>>;

    /// The ranks whose message of `round` has not arrived, as far as this rank can know. Empty if it cannot
    /// know.
    fn missing(&self, round: Round) -> Vec<u32>;

    /// Ends the participation of this rank. Waits of others may end early.
    fn leave(&self);
}

/// The largest number of ranks. It limits the memory that this library allocates if a variable of a launcher
/// is wrong.
const MAX_WORLD: u32 = 1 << 20;

impl Member {
    /// Refuses an impossible position.
    fn checked(self) -> Result<Self> {
        let Self { rank, world, .. } = self;
        if rank < world && world <= MAX_WORLD {
            return Ok(self);
        }
        let rule = format!("the rank must be below the number of ranks, which is at most {MAX_WORLD} world={world}");
        Err(Error::invalid(rule).with_rank(rank))
    }
}

/// Refuses a message that is too long for a coordinator.
fn checked_length(message: &[u8]) -> Result<()> {
    if message.len() <= MAX_MESSAGE {
        return Ok(());
    }
    let bytes = message.len();
    Err(Error::invalid(format!(
        "a message between ranks has at most {MAX_MESSAGE} bytes: write it to the storage bytes={bytes}"
    )))
}

/// Refuses a call in which rank 0 passes no message, or another rank passes one.
fn told(member: Member, message: Option<&[u8]>) -> Result<Option<&[u8]>> {
    match (member.rank, message) {
        (0, Some(message)) => checked_length(message).map(|()| Some(message)),
        (1.., None) => Ok(None),
        (rank, _) => Err(Error::invalid("rank 0 tells, and the other ranks are told").with_rank(rank)),
    }
}
