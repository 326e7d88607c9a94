//! Exchanges that an adapter adds to the rounds of saves. Every rank hands bytes to rank 0, which hands bytes
//! back to each rank.
//!
//! The bytes lie in notes on the storage and may have any length. Messages carry lengths, digests and errors.
//! **Failure.** An error of any rank, or of the work on rank 0, is the error of all ranks.

use super::message::{Vote, decode, encode};
use super::session::{Group, HEAR_GRACE};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::guard::guarded;
use crate::ranks::Phase;
use crate::wire::WireError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::Instant;

/// Maximum length of a note.
const MAX_NOTE: u64 = 1 << 32;

/// The answers of rank 0.
pub(crate) enum Reply {
    /// One answer for each rank.
    Each(Vec<Vec<u8>>),
    /// The same answer for all ranks.
    Same(Vec<u8>),
}

/// The length and digest of a note that a rank has left.
#[derive(Clone, Copy, PartialEq, Serialize, Deserialize)]
struct Left {
    length: u64,
    digest: Digest,
}

/// The message of a rank to rank 0.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Handed {
    Left(Left),
    Failed(WireError),
}

/// The message of rank 0. A failure is encoded like the failure of a [`Decision`](super::message::Decision).
#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Answered {
    /// The answers are in a note for each rank. Each note identifies itself.
    Each,
    Same(Left),
    Failed(WireError),
}

impl Group {
    /// Hands `part` to rank 0, where `reduce` gets the parts of all ranks, and returns the answer of `reduce`
    /// for this rank.
    ///
    /// # Errors
    /// The error of the lowest rank that failed, with all ranks that failed; the error of `reduce`, with rank
    /// 0; `Deadline` or `Unavailable`, with the missing ranks.
    pub fn exchange(
        &self,
        save: u64,
        phase: Phase,
        part: Result<Vec<u8>>,
        reduce: &mut dyn FnMut(Vec<Vec<u8>>) -> Result<Reply>,
        deadline: Instant,
    ) -> Result<Vec<u8>> {
        let round = self.round(save, phase);
        let rank = self.member.rank;
        // The program or the storage may hang in between. After the other ranks have given up nothing is
        // sent, because messages of a later save may be under way.
        let last = deadline.max(Instant::now());
        if rank == 0 {
            let collected = self.collect(save, phase, part, deadline);
            let mut mine = Vec::new();
            let answered = collected.and_then(|parts| {
                let reduced = guarded("the work that rank 0 does for all ranks panicked", || reduce(parts));
                self.answer(save, phase, reduced?, &mut mine)
            });
            let answered = answered.map_err(|error| if error.ranks().is_empty() { error.with_rank(0) } else { error });
            let failed = |error: &Error| Answered::Failed(self.wire(error));
            let message = encode(&answered.as_ref().map_or_else(failed, Clone::clone))?;
            let told = self.in_time(last).and_then(|()| self.coordinator.tell(round, Some(&message), deadline));
            answered?;
            return told.map(|_| mine);
        }
        let left = part.and_then(|part| self.leave(&note("to", phase, rank), &part));
        let message = encode(&left.map_or_else(|error| Handed::Failed(self.wire(&error)), Handed::Left))?;
        self.in_time(last)?;
        self.coordinator.gather(round, &message, &mut |_, _| ControlFlow::Continue(()), deadline)?;
        let told = self.coordinator.tell(round, None, deadline + HEAR_GRACE)?;
        match decode::<Answered>(&told, 0)? {
            Answered::Same(left) => self.take(&note("from", phase, 0), left, 0),
            Answered::Each => self.take_mine(save, phase),
            Answered::Failed(error) => Err(error.into_error()),
        }
    }

    /// Checks that the ranks still listen to an exchange with this deadline.
    ///
    /// # Errors
    /// `Deadline`.
    pub fn in_time(&self, deadline: Instant) -> Result<()> {
        if Instant::now() < deadline + HEAR_GRACE {
            return Ok(());
        }
        let why = "the ranks did not wait for a planner or storage writer any longer, because its deadline has passed";
        Err(Error::new(ErrorKind::Deadline, why).with_ranks([self.member.rank]))
    }

    /// Collects the parts of all ranks on rank 0. It waits for all ranks, so that it can name every rank that
    /// failed.
    fn collect(&self, save: u64, phase: Phase, part: Result<Vec<u8>>, deadline: Instant) -> Result<Vec<Vec<u8>>> {
        let (mut left, mut failed) = (BTreeMap::new(), BTreeMap::new());
        let mut each = |rank: u32, bytes: &[u8]| {
            match handed(bytes, rank) {
                _ if rank == 0 => {}
                Ok(there) => _ = left.insert(rank, there),
                Err(error) => _ = failed.insert(rank, error),
            }
            ControlFlow::Continue(())
        };
        let mine = encode(&Handed::Left(Left { length: 0, digest: Digest::EMPTY }))?;
        let gathered = self.coordinator.gather(self.round(save, phase), &mine, &mut each, deadline);
        let part = part.map_err(|error| failed.insert(0, error.with_rank(0)));
        if let Some(error) = all_of(failed) {
            return Err(error);
        }
        gathered?;
        self.complete(left.len() + 1)?;
        let theirs = left.into_iter().map(|(rank, left)| self.take(&note("to", phase, rank), left, rank));
        part.ok().map(Ok).into_iter().chain(theirs).collect()
    }

    /// Leaves the answers of rank 0 as notes. `mine` gets the answer for rank 0 itself.
    fn answer(&self, save: u64, phase: Phase, reply: Reply, mine: &mut Vec<u8>) -> Result<Answered> {
        match reply {
            Reply::Same(bytes) => {
                let left = self.leave(&note("from", phase, 0), &bytes)?;
                *mine = bytes;
                Ok(Answered::Same(left))
            }
            Reply::Each(parts) => {
                let (world, given) = (self.member.world, parts.len());
                if given != world as usize {
                    let why = format!("rank 0 needs an answer for each rank world={world} answers={given}");
                    return Err(Error::invalid(why));
                }
                for (rank, bytes) in (0..).zip(parts) {
                    if rank == 0 {
                        *mine = bytes;
                    } else {
                        self.leave(&note("from", phase, rank), &[&self.key(save), &bytes[..]].concat())?;
                    }
                }
                Ok(Answered::Each)
            }
        }
    }

    /// The first bytes of a note, which identify it. The ranks take every note before the next exchange, so
    /// session and save number distinguish it from all other notes of the same name.
    fn key(&self, save: u64) -> [u8; 24] {
        let mut key = [0; 24];
        key[..16].copy_from_slice(self.session.id.as_bytes());
        key[16..].copy_from_slice(&save.to_le_bytes());
        key
    }

    fn leave(&self, name: &str, bytes: &[u8]) -> Result<Left> {
        self.shared.put_note(self.session.generation, name, bytes)?;
        Ok(Left { length: bytes.len() as u64, digest: Digest::of(bytes) })
    }

    fn take(&self, name: &str, left: Left, from: u32) -> Result<Vec<u8>> {
        let bytes = self.shared.note(self.session.generation, name, MAX_NOTE)?.unwrap_or_default();
        if (Left { length: bytes.len() as u64, digest: Digest::of(&bytes) }) == left {
            return Ok(bytes);
        }
        let why = "a note of a rank is not what it wrote: do all ranks see the root of rank 0?";
        Err(Error::corrupt(why).with_ranks([from]))
    }

    fn take_mine(&self, save: u64, phase: Phase) -> Result<Vec<u8>> {
        let name = note("from", phase, self.member.rank);
        let bytes = self.shared.note(self.session.generation, &name, MAX_NOTE)?.unwrap_or_default();
        match bytes.strip_prefix(&self.key(save)) {
            Some(part) => Ok(part.to_vec()),
            None => Err(Error::corrupt("rank 0 has left no answer for this rank").with_ranks([self.member.rank])),
        }
    }

    /// Takes part in the first exchange of a save that this rank gives up.
    pub fn decline(&self, save: u64, deadline: Instant) {
        let why = Error::new(ErrorKind::Cancelled, "a rank gave up the save before its turn in the order of saves");
        let _ = self.exchange(save, Phase::Agree, Err(why), &mut |_| Ok(Reply::Same(Vec::new())), deadline);
    }
}

/// Reads the message of a rank to rank 0. A rank whose call was refused sends the same message as for a
/// refused save.
fn handed(bytes: &[u8], rank: u32) -> Result<Left> {
    match decode::<Handed>(bytes, rank) {
        Ok(Handed::Left(left)) => Ok(left),
        Ok(Handed::Failed(error)) => Err(error.into_error()),
        Err(other) => {
            match decode::<Vote>(bytes, rank) {
                Ok(Vote { error: Some(error), .. }) => Err(error.into_error()),
                Ok(_) => Err(Error::invalid("a rank saves while the others plan: do all make the same calls?")
                    .with_ranks([rank])),
                Err(_) => Err(other),
            }
        }
    }
}

/// The error of the lowest rank that failed, with all ranks that failed.
fn all_of(failed: BTreeMap<u32, Error>) -> Option<Error> {
    if failed.len() < 2 {
        return failed.into_values().next();
    }
    let first = failed.values().next()?;
    let ranks = failed.iter().flat_map(|(rank, error)| error.ranks().iter().copied().chain([*rank]));
    Some(Error::new(first.kind(), first.message()).with_ranks(ranks).with_source_of(first))
}

fn note(way: &str, phase: Phase, rank: u32) -> String {
    format!("{way}-{phase:?}-{rank:05}").to_lowercase()
}
