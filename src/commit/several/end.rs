//! The rounds after everything is written: receipts, the publish by rank 0, and the outcome.

use super::message::{Receipt, Report, Verdict, decode, encode};
use super::session::{Group, HEAR_GRACE};
use crate::error::{Error, ErrorKind, Result};
use crate::mutant::{self, Mutant};
use crate::ranks::Phase;
use crate::storage::shared::{SharedWriting, Vetoed};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

/// The note with the outcome of the last save, for ranks whose round failed.
const OUTCOME: &str = "outcome";

/// How long after the deadline of a save rank 0 still tells its outcome.
const TELL_GRACE: Duration = Duration::from_secs(5);

/// Maximum length of the note with an outcome.
const MAX_OUTCOME: u64 = 1 << 16;

/// What one rank contributes to a save.
pub(crate) trait Part {
    /// Whether the save replaces a step.
    fn overwrite(&self) -> bool;

    /// Makes the files of this rank and their names durable, and returns the receipt.
    fn seal(&mut self) -> Result<Receipt>;

    /// On rank 0: checks that the parts make up a step, and writes the tables and the manifest.
    fn assemble(&mut self, receipts: &BTreeMap<u32, Receipt>) -> Result<()>;

    /// On the other ranks, before the receipt. After this call, this rank cannot fail the save.
    ///
    /// # Errors
    /// Why it has failed before.
    fn promise(&self) -> Result<()>;

    /// On rank 0, before the claim. After this call, nothing on this rank can fail the save.
    ///
    /// # Errors
    /// Why it has failed before.
    fn begin_publish(&self) -> Result<()>;
}

impl Group {
    /// Takes part in the last rounds of a save that this rank cannot write, so that the save fails on all
    /// ranks at once. Returns the failure of another rank, if rank 0 tells one or fails itself.
    pub fn withdraw(&self, save: u64, why: &Error, deadline: Instant) -> Option<Error> {
        let deadline = deadline + TELL_GRACE;
        let mut none = |_: u32, _: &[u8]| ControlFlow::Continue(());
        let sent = encode(&Report::Failed(self.wire(why))).and_then(|report| {
            self.coordinator.gather(self.round(save, Phase::Receipt), &report, &mut none, deadline)?;
            decode(&self.coordinator.tell(self.round(save, Phase::Outcome), None, deadline)?, 0)
        });
        match sent {
            Ok(Verdict::Failed(first)) if !first.names(self.member.rank) => return Some(first.into_error()),
            Ok(_) => {}
            // Rank 0 is lost, and another rank has vetoed the attempt before this rank could open it.
            Err(lost) if why.kind() == ErrorKind::NotFound && lost.ranks() == [0] => return Some(lost),
            Err(error) => {
                tracing::warn!(error = format_args!("{error:#}"), "the other ranks may not know that this one failed");
            }
        }
        None
    }

    /// Fails a save that this rank has refused after the ranks agreed on it. Returns the failure of another
    /// rank, if rank 0 tells one.
    pub fn refuse(&self, save: u64, why: &Error, deadline: Instant) -> Option<Error> {
        if self.member.rank > 0 {
            return self.withdraw(save, why, deadline);
        }
        let failed = Verdict::Failed(self.wire(why));
        let mut enough = |_: u32, _: &[u8]| ControlFlow::Break(());
        let told = encode(&Report::Failed(self.wire(why))).and_then(|report| {
            self.coordinator.gather(self.round(save, Phase::Receipt), &report, &mut enough, deadline + TELL_GRACE)?;
            let message = encode(&failed)?;
            self.coordinator.tell(self.round(save, Phase::Outcome), Some(&message), deadline + TELL_GRACE)
        });
        if let Err(error) = told {
            tracing::warn!(error = format_args!("{error:#}"), "the other ranks may not know that rank 0 failed");
        }
        None
    }

    /// Ends a save on this rank. `failed` is the reason, if this rank has failed already.
    ///
    /// # Errors
    /// `Indeterminate` when the step may or may not be durable. With any other kind, the step never will be
    /// durable.
    pub fn end(
        &self,
        save: u64,
        attempt: &dyn SharedWriting,
        part: &mut dyn Part,
        failed: Option<Error>,
        deadline: Instant,
    ) -> Result<()> {
        let sealed = failed.map_or_else(|| part.seal(), Err).map_err(|error| error.with_rank(self.member.rank));
        let rounds = Rounds { group: self, save, attempt, deadline };
        if self.member.rank == 0 { rounds.lead(part, &sealed) } else { rounds.report(part, sealed) }
    }
}

/// The last rounds of one save on this rank.
struct Rounds<'a> {
    group: &'a Group,
    save: u64,
    attempt: &'a dyn SharedWriting,
    deadline: Instant,
}

impl Rounds<'_> {
    /// On rank 0: collects the receipts, publishes, and tells the outcome.
    fn lead(&self, part: &mut dyn Part, sealed: &Result<Receipt>) -> Result<()> {
        let published = self.collect(sealed).and_then(|receipts| self.publish(part, &receipts));
        self.tell(&match &published {
            Ok(()) => Verdict::Durable,
            Err(error) if error.kind() == ErrorKind::Indeterminate => Verdict::Unknown(self.group.wire(error)),
            Err(error) => Verdict::Failed(self.group.wire(error)),
        });
        published
    }

    /// Tells the outcome, and leaves it as a note if it is known. A rank that gets neither the message nor
    /// the note decides by a veto.
    fn tell(&self, verdict: &Verdict) {
        let noted = match verdict {
            Verdict::Unknown(_) => Ok(()),
            known => encode(&(self.save, known))
                .and_then(|note| self.group.shared.put_note(self.group.session.generation, OUTCOME, &note)),
        };
        let told = encode(verdict).and_then(|message| {
            let round = self.group.round(self.save, Phase::Outcome);
            self.group.coordinator.tell(round, Some(&message), self.deadline + TELL_GRACE)
        });
        for error in noted.err().into_iter().chain(told.err()) {
            tracing::warn!(error = format_args!("{error:#}"), "the outcome of a save may not reach all ranks");
        }
    }

    /// Collects the receipts of all ranks.
    ///
    /// # Errors
    /// The first failure of a rank; `Deadline` or `Unavailable`, with the ranks that are missing.
    fn collect(&self, own: &Result<Receipt>) -> Result<BTreeMap<u32, Receipt>> {
        let report =
            own.as_ref().map_or_else(|error| Report::Failed(self.group.wire(error)), |r| Report::Written(r.clone()));
        let mut receipts = BTreeMap::new();
        let mut wrong = own.as_ref().err().cloned();
        let mut each = |rank: u32, bytes: &[u8]| {
            let heard = decode::<Report>(bytes, rank).and_then(|report| match report {
                Report::Written(theirs) => {
                    let own = own.as_ref().map_err(Error::clone)?;
                    check(&theirs, own, rank).map(|()| theirs)
                }
                Report::Failed(error) => Err(error.into_error()),
            });
            match heard {
                Ok(receipt) => receipts.insert(rank, receipt),
                Err(error) => {
                    wrong.get_or_insert(error);
                    return ControlFlow::Break(());
                }
            };
            if mutant::on(Mutant::Receipts) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        let round = self.group.round(self.save, Phase::Receipt);
        let gathered = self.group.coordinator.gather(round, &encode(&report)?, &mut each, self.deadline);
        if let Some(error) = wrong {
            return Err(error);
        }
        gathered?;
        if !mutant::on(Mutant::Receipts) {
            self.group.complete(receipts.len())?;
        }
        Ok(receipts)
    }

    /// Publishes the attempt that all ranks have written.
    fn publish(&self, part: &mut dyn Part, receipts: &BTreeMap<u32, Receipt>) -> Result<()> {
        part.assemble(receipts)?;
        part.begin_publish()?;
        self.attempt.claim()?;
        if !mutant::on(Mutant::Zombie) {
            self.group.check_newest()?;
        }
        if mutant::on(Mutant::ToldFirst) {
            self.tell(&Verdict::Durable);
        }
        self.attempt.publish(part.overwrite())
    }

    /// On another rank: sends the receipt, and learns the outcome.
    fn report(&self, part: &mut dyn Part, sealed: Result<Receipt>) -> Result<()> {
        // From here on only rank 0 or a veto decides the outcome.
        let sealed = sealed.and_then(|receipt| part.promise().map(|()| receipt));
        let report =
            sealed.as_ref().map_or_else(|error| Report::Failed(self.group.wire(error)), |r| Report::Written(r.clone()));
        let coordinator = &self.group.coordinator;
        let mut none = |_: u32, _: &[u8]| ControlFlow::Continue(());
        let round = |phase| self.group.round(self.save, phase);
        let sent = encode(&report)
            .and_then(|report| coordinator.gather(round(Phase::Receipt), &report, &mut none, self.deadline));
        let heard = sent
            .and_then(|()| coordinator.tell(round(Phase::Outcome), None, self.deadline + HEAR_GRACE))
            .and_then(|bytes| decode::<Verdict>(&bytes, 0));
        match (sealed, heard) {
            (Ok(_), Ok(verdict)) => verdict.into_result(),
            (Ok(_), Err(lost)) => self.decide(lost),
            // This rank failed because rank 0 had deleted the attempt after the failure of another rank.
            (Err(_), Ok(Verdict::Failed(first))) if !first.names(self.group.member.rank) => Err(first.into_error()),
            (Err(own), _) => Err(own),
        }
    }

    /// Reads the outcome from the storage, or decides it there by a veto, because rank 0 did not tell it.
    ///
    /// # Errors
    /// `lost` if the veto came in time; otherwise `Indeterminate`.
    fn decide(&self, lost: Error) -> Result<()> {
        if let Ok(Some(note)) = self.group.shared.note(self.group.session.generation, OUTCOME, MAX_OUTCOME)
            && let Ok((save, verdict)) = decode::<(u64, Verdict)>(&note, 0)
            && save == self.save
        {
            return verdict.into_result();
        }
        if mutant::on(Mutant::NoVeto) {
            return Err(lost);
        }
        let lost = lost.with_ranks([0]);
        match self.attempt.veto() {
            Ok(Vetoed::Done) => Err(lost),
            Ok(Vetoed::TooLate) => {
                let why = "the outcome did not come from rank 0, and its publish can no longer be stopped";
                Err(Error::new(ErrorKind::Indeterminate, why).with_ranks(lost.ranks().to_vec()).with_source(lost))
            }
            Err(error) => {
                let why = "the outcome did not come from rank 0, and whether it can still publish is unknown";
                Err(Error::new(ErrorKind::Indeterminate, why).with_ranks(lost.ranks().to_vec()).with_source(error))
            }
        }
    }
}

/// Refuses a receipt of another save.
fn check(theirs: &Receipt, own: &Receipt, rank: u32) -> Result<()> {
    let of = |receipt: &Receipt| (receipt.step, receipt.attempt, receipt.plan);
    if of(theirs) == of(own) || mutant::on(Mutant::ReceiptCheck) {
        return Ok(());
    }
    let show = |receipt: &Receipt| format!("step={} attempt={} plan={}", receipt.step, receipt.attempt, receipt.plan);
    let why = format!("a rank has written something else ({}) than rank 0 ({})", show(theirs), show(own));
    Err(Error::invalid(why).with_ranks([rank]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Digest;
    use crate::id::Attempt;

    #[test]
    fn a_receipt_of_another_save_is_refused_with_its_rank() {
        let (attempt, plan) = (Attempt::new(), Digest::of(b"plan"));
        let own = Receipt { step: 1, attempt, plan, bytes: 0, rows: 0, digest: Digest::EMPTY };
        check(&Receipt { bytes: 9, ..own.clone() }, &own, 3).unwrap();
        let others = [
            Receipt { step: 2, ..own.clone() },
            Receipt { attempt: Attempt::new(), ..own.clone() },
            Receipt { plan: Digest::of(b"another plan"), ..own.clone() },
        ];
        for other in others {
            let error = check(&other, &own, 3).unwrap_err();
            assert_eq!((error.kind(), error.ranks()), (ErrorKind::Invalid, &[3][..]), "{error}");
        }
    }
}
