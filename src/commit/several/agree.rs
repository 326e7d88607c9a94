//! The rounds before anything is written. The ranks agree on the step, and on plans that fit together.

use super::message::{Decision, Vote, decode, encode};
use super::part::Structure;
use super::session::{Group, HEAR_GRACE};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::outcome::Outcome;
use crate::ranks::Phase;
use crate::wire::WireError;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// Maximum length of a note with a description or a part of a plan.
const MAX_NOTE: u64 = 1 << 32;

/// Reads the description of a rank.
pub(crate) type Describe<'a> = &'a mut dyn FnMut(u32) -> Result<Vec<u8>>;

/// Computes, from the descriptions of all ranks, the part of the plan for each rank, and the structure that
/// rank 0 writes.
pub(crate) type Assign<'a> = &'a mut dyn FnMut(Describe<'_>) -> Result<Assigned>;

/// The part of each rank, and the structure that rank 0 writes.
pub(crate) type Assigned = (Vec<Vec<u8>>, Option<Arc<Structure>>);

/// The descriptions for which rank 0 has a plan.
#[derive(Debug)]
pub(crate) struct Structures {
    /// The digest of each rank's description.
    digests: Vec<Digest>,
    plan: Digest,
    structure: Option<Arc<Structure>>,
}

impl Structures {
    /// The structure of the last plan.
    pub fn structure(&self) -> Option<Arc<Structure>> {
        self.structure.clone()
    }

    /// No plan yet.
    pub fn none() -> Self {
        Self { digests: Vec::new(), plan: Digest::EMPTY, structure: None }
    }
}

/// The digest by which ranks compare descriptions and parts of plans. It leaves out the CRC-64 at the end of
/// each of them, because the CRC of any text followed by its own CRC is always the same number.
pub(crate) fn identity(encoded: &[u8]) -> Digest {
    Digest::of(encoded.split_last_chunk::<8>().map_or(encoded, |(text, _)| text))
}

/// What the ranks have agreed on.
#[derive(Debug)]
pub(crate) enum Agreed {
    /// Every rank writes. `part` is the part of the plan for this rank, if the plan is new.
    Go { plan: Digest, part: Option<Vec<u8>> },
    /// The save ends without being written.
    Ended(Outcome),
    /// The save fails on all ranks, and rank 0 has told the reason.
    Refused(Error),
}

/// The message of [`Phase::Plan`], which announces a note of a rank.
#[derive(Serialize, Deserialize)]
struct Noted {
    length: u64,
    digest: Digest,
}

impl Group {
    /// The agreement on rank 0. `ended` is the outcome, if the overlap policy of rank 0 ends the save.
    /// `begin` makes the attempt, before any rank is told to write.
    ///
    /// # Errors
    /// Why the save fails on all ranks: an error of one rank; `Invalid` if the ranks disagree; `Deadline` or
    /// `Unavailable`, with the missing ranks.
    #[expect(clippy::too_many_arguments, reason = "each is a part of one decision")]
    pub fn decide(
        &self,
        save: u64,
        vote: &Vote,
        description: &[u8],
        ended: Option<&Outcome>,
        known: &mut Structures,
        assign: Assign<'_>,
        begin: &mut dyn FnMut() -> Result<()>,
        deadline: Instant,
    ) -> Result<Agreed> {
        let decided = self.count(save, vote, ended, known, deadline);
        let (mut phase, mut part) = (Phase::Agree, None);
        let decided = match decided {
            Ok(Decision::Plan) => {
                self.tell(save, phase, &Decision::Plan, deadline)?;
                phase = Phase::Plan;
                self.plan(save, vote, description, known, assign, deadline).map(|(plan, mine)| {
                    part = Some(mine);
                    Decision::Go { plan }
                })
            }
            decided => decided,
        };
        let decided = decided.and_then(|decision| {
            if matches!(decision, Decision::Go { .. }) {
                begin()?;
            }
            Ok(decision)
        });
        let decision = decided.as_ref().map_or_else(|error| Decision::Failed(self.wire(error)), Clone::clone);
        let told = self.tell(save, phase, &decision, deadline);
        let decision = decided?;
        told?;
        agreed(decision, part)
    }

    /// Counts the votes.
    fn count(
        &self,
        save: u64,
        vote: &Vote,
        ended: Option<&Outcome>,
        known: &Structures,
        deadline: Instant,
    ) -> Result<Decision> {
        let mut votes = BTreeMap::new();
        let mut wrong = None;
        let mut each = |rank: u32, bytes: &[u8]| {
            match decode::<Vote>(bytes, rank) {
                Ok(Vote { error: Some(error), .. }) => wrong = Some(error.into_error()),
                Ok(theirs) => {
                    votes.insert(rank, theirs);
                    return ControlFlow::Continue(());
                }
                Err(error) => wrong = Some(error),
            }
            ControlFlow::Break(())
        };
        let gathered = self.coordinator.gather(self.round(save, Phase::Agree), &encode(vote)?, &mut each, deadline);
        if let Some(error) = wrong {
            return Err(error);
        }
        gathered?;
        self.complete(votes.len())?;
        match ended {
            Some(Outcome::Skipped { by }) => return Ok(Decision::Skipped { by: *by }),
            Some(Outcome::Superseded { by }) => return Ok(Decision::Superseded { by: *by }),
            Some(Outcome::Durable(_)) => return Err(Error::internal("a save was durable before it was agreed on")),
            None => {}
        }
        for (rank, theirs) in &votes {
            let differ = |what: &str, ours: String, theirs: String| {
                let why = format!("ranks differ in the {what} of a save rank_0={ours} rank_{rank}={theirs}");
                Err(Error::invalid(why).with_ranks([*rank]))
            };
            if theirs.step != vote.step {
                return differ("step", vote.step.to_string(), theirs.step.to_string());
            }
            if theirs.name != vote.name {
                return differ("name", format!("{:?}", vote.name), format!("{:?}", theirs.name));
            }
            if theirs.overwrite != vote.overwrite {
                return differ("`overwrite`", vote.overwrite.to_string(), theirs.overwrite.to_string());
            }
        }
        // A rank did not get its part of the known plan if the save for which the plan was made failed. Then
        // the ranks need a new plan.
        let same = known.digests.len() == votes.len()
            && votes.values().all(|vote| !vote.fresh)
            && votes.values().map(|v| v.structure).eq(known.digests.iter().copied());
        Ok(if same { Decision::Go { plan: known.plan } } else { Decision::Plan })
    }

    /// Makes a plan from the descriptions that the ranks leave as notes. Returns the digest of the plan and
    /// the part of rank 0.
    fn plan(
        &self,
        save: u64,
        vote: &Vote,
        description: &[u8],
        known: &mut Structures,
        assign: Assign<'_>,
        deadline: Instant,
    ) -> Result<(Digest, Vec<u8>)> {
        let mut noted = BTreeMap::new();
        let mut wrong = None;
        let mut each = |rank: u32, bytes: &[u8]| match decode::<Result<Noted, WireError>>(bytes, rank) {
            Ok(Ok(note)) => {
                noted.insert(rank, note);
                ControlFlow::Continue(())
            }
            Ok(Err(error)) => {
                wrong = Some(error.into_error());
                ControlFlow::Break(())
            }
            Err(error) => {
                wrong = Some(error);
                ControlFlow::Break(())
            }
        };
        let own = Noted { length: description.len() as u64, digest: vote.structure };
        let own = encode(&Ok::<_, WireError>(own))?;
        let gathered = self.coordinator.gather(self.round(save, Phase::Plan), &own, &mut each, deadline);
        if let Some(error) = wrong {
            return Err(error);
        }
        gathered?;
        self.complete(noted.len())?;
        let mut describe = |rank: u32| match (rank, noted.get(&rank)) {
            (0, _) => Ok(description.to_vec()),
            (_, Some(note)) => self.read(&state_of(rank), note, rank),
            (_, None) => Err(Error::internal("a rank has left no description of its state").with_rank(rank)),
        };
        let (parts, structure) = assign(&mut describe)?;
        let mut plan = Digest::EMPTY;
        for (rank, part) in (0..).zip(&parts) {
            self.shared.put_note(self.session.generation, &part_of(rank), part)?;
            plan = plan.then(identity(part), part.len() as u64);
        }
        // Two plans differ if the same bytes are divided into different parts.
        let lengths: Vec<u8> = parts.iter().flat_map(|part| (part.len() as u64).to_le_bytes()).collect();
        plan = plan.then(Digest::of(&lengths), lengths.len() as u64);
        *known = Structures { digests: noted.values().map(|note| note.digest).collect(), plan, structure };
        parts.into_iter().next().map(|mine| (plan, mine)).ok_or_else(|| Error::internal("a plan without parts"))
    }

    fn read(&self, name: &str, note: &Noted, rank: u32) -> Result<Vec<u8>> {
        let bytes = self.shared.note(self.session.generation, name, MAX_NOTE)?.unwrap_or_default();
        if identity(&bytes) == note.digest {
            return Ok(bytes);
        }
        let why = "rank 0 reads another description of state than a rank wrote: does the rank see the root of rank 0?";
        Err(Error::corrupt(why).with_ranks([rank]))
    }

    /// The agreement on a rank other than rank 0. `description` describes its state.
    ///
    /// # Errors
    /// `Deadline` or `Unavailable` when rank 0 does not answer. Rank 0 may go on without this rank.
    pub fn follow(&self, save: u64, vote: &Vote, description: &[u8], deadline: Instant) -> Result<Agreed> {
        let mut none = |_: u32, _: &[u8]| ControlFlow::Continue(());
        self.coordinator.gather(self.round(save, Phase::Agree), &encode(vote)?, &mut none, deadline)?;
        let decision = self.hear(save, Phase::Agree, deadline)?;
        if decision != Decision::Plan {
            return agreed(decision, None);
        }
        let rank = self.member.rank;
        let noted = self.shared.put_note(self.session.generation, &state_of(rank), description);
        let noted = noted.map(|()| Noted { length: description.len() as u64, digest: vote.structure });
        let message = encode(&noted.as_ref().map_err(|error| self.wire(error)))?;
        self.coordinator.gather(self.round(save, Phase::Plan), &message, &mut none, deadline)?;
        let decision = self.hear(save, Phase::Plan, deadline);
        noted?;
        let part = self.shared.note(self.session.generation, &part_of(rank), MAX_NOTE)?;
        agreed(decision?, part)
    }

    pub fn wire(&self, error: &Error) -> WireError {
        WireError::of_rank(error, self.member.rank)
    }

    fn tell(&self, save: u64, phase: Phase, decision: &Decision, deadline: Instant) -> Result<()> {
        let message = encode(decision)?;
        self.coordinator.tell(self.round(save, phase), Some(&message), deadline).map(|_| ())
    }

    fn hear(&self, save: u64, phase: Phase, deadline: Instant) -> Result<Decision> {
        decode(&self.coordinator.tell(self.round(save, phase), None, deadline + HEAR_GRACE)?, 0)
    }

    /// Checks that a successful gather had messages of all ranks.
    pub(super) fn complete(&self, heard: usize) -> Result<()> {
        if heard == self.member.world as usize {
            return Ok(());
        }
        let world = self.member.world;
        Err(Error::new(ErrorKind::Internal, format!("a round ended without all ranks heard={heard} world={world}")))
    }
}

fn agreed(decision: Decision, part: Option<Vec<u8>>) -> Result<Agreed> {
    match decision {
        Decision::Go { plan } => Ok(Agreed::Go { plan, part }),
        Decision::Skipped { by } => Ok(Agreed::Ended(Outcome::Skipped { by })),
        Decision::Superseded { by } => Ok(Agreed::Ended(Outcome::Superseded { by })),
        Decision::Failed(error) => Ok(Agreed::Refused(error.into_error())),
        Decision::Plan => Err(Error::internal("rank 0 asks for plans twice").with_ranks([0])),
    }
}

fn state_of(rank: u32) -> String {
    format!("state-{rank:05}")
}

fn part_of(rank: u32) -> String {
    format!("plan-{rank:05}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Description, Merge};
    use crate::state::StateDict;

    /// Regression: the digest of a whole description, with its own CRC at the end, was the same for all
    /// descriptions, so ranks used a plan of another structure.
    #[test]
    fn other_descriptions_and_shares_have_other_identities() {
        let encoded = |bytes: usize| {
            let mut state = StateDict::new();
            state.tensor("t", vec![0_u8; bytes]).unwrap();
            let (description, _) = Description::of(&state, 1).unwrap();
            let mut merge = Merge::new(1);
            merge.add(0, &description).unwrap();
            (description.encode().unwrap().0, merge.finish().unwrap().shares[0].encode().unwrap())
        };
        let ((a, share), (b, _)) = (encoded(8), encoded(9));
        assert_eq!((a.len(), Digest::of(&a)), (b.len(), Digest::of(&b)), "what a CRC does");
        assert_ne!(identity(&a), identity(&b));
        assert_eq!(identity(&a), identity(&a.clone()));
        let mut other = share.clone();
        other[10] ^= 1;
        assert_ne!(identity(&share), identity(&other));
    }
}
