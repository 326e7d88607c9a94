//! The rounds after everything is written: receipts, the publish by rank 0, and the outcome.

use super::message::{Receipt, Report, Verdict, decode, encode};
use super::rows;
use super::session::Group;
use crate::commit::concluded::{Concluded, Ending, concluded};
use crate::commit::single::{committed, enter};
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::MANIFEST;
use crate::memory::AlignedBuffer;
use crate::mutant::{self, Mutant};
use crate::outcome::Phase as SavePhase;
use crate::plan::{Receipts, Request};
use crate::ranks::Phase;
use crate::storage::shared::{SharedWriting, Vetoed};
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The note with the outcome of the last save, for ranks whose round broke.
const OUTCOME: &str = "outcome";

/// How long rank 0 tells the outcome of a save whose deadline has passed.
const TELL_GRACE: Duration = Duration::from_secs(5);

/// Maximum length of the notes that this module reads.
const MAX_NOTE: u64 = 1 << 32;

/// A save that the ranks have agreed on.
#[derive(Debug)]
pub(crate) struct Attempted {
    /// Its number in the session.
    pub save: u64,
    /// The error is why this rank cannot write it.
    pub attempt: Result<Arc<dyn SharedWriting>>,
    /// The digest of the plan that all ranks write by.
    pub plan: Digest,
}

/// Ends a save on this rank.
pub(crate) fn conclude(group: &Group, attempted: &Attempted, ending: Ending<'_>) -> Concluded {
    let ticket = &ending.request.ticket;
    let Ending { request, receipts, path, manifest, .. } = ending;
    let (save, plan) = (attempted.save, attempted.plan);
    let receipts = ticket.failure().map_or(receipts, Err);
    let attempt = match &attempted.attempt {
        Ok(attempt) => attempt.clone(),
        Err(error) => {
            group.withdraw(save, error, ticket.deadline);
            return concluded(ticket, None, Err(ticket.failure().unwrap_or_else(|| error.clone())));
        }
    };
    let rank = Rank { group, save, attempt: attempt.as_ref(), plan, request, deadline: ticket.deadline };
    let written = receipts.and_then(|receipts| Ok((rank.seal(&receipts, manifest)?, receipts)));
    let ended = if group.member.rank == 0 { rank.lead(written) } else { rank.report(written) };
    concluded(ticket, Some(attempt), ended.map(|receipts| committed(request, &receipts, path)))
}

impl Group {
    /// Takes part in the last rounds of a save that this rank cannot write, so that it fails on all ranks at
    /// once.
    pub fn withdraw(&self, save: u64, why: &Error, deadline: Instant) {
        let deadline = deadline.max(Instant::now() + TELL_GRACE);
        let mut none = |_: u32, _: &[u8]| ControlFlow::Continue(());
        let sent = encode(&Report::Failed(self.wire(why))).and_then(|report| {
            self.coordinator.gather(self.round(save, Phase::Receipt), &report, &mut none, deadline)?;
            self.coordinator.tell(self.round(save, Phase::Outcome), None, deadline)
        });
        if let Err(error) = sent {
            tracing::warn!(error = format_args!("{error:#}"), "the other ranks may not know that this one failed");
        }
    }
}

/// One save as this rank ends it.
struct Rank<'a> {
    group: &'a Group,
    save: u64,
    attempt: &'a dyn SharedWriting,
    plan: Digest,
    request: &'a Request,
    deadline: Instant,
}

impl Rank<'_> {
    /// Makes durable what this rank has written, leaves the rows of its files as a note, and returns its
    /// receipt.
    fn seal(&self, receipts: &Receipts, buffer: &mut AlignedBuffer) -> Result<Receipt> {
        let ticket = &self.request.ticket;
        rows::fill(self.request, receipts, buffer)?;
        let digest = Digest::of(buffer);
        self.group.shared.put_note(self.group.session.generation, &rows_of(self.group.member.rank), buffer)?;
        self.attempt.sync_names()?;
        let (step, attempt, bytes) = (ticket.step, ticket.attempt(), self.request.plan.length);
        Ok(Receipt { step, attempt, plan: self.plan, bytes, rows: buffer.len() as u64, digest })
    }

    /// On rank 0: collects the receipts, publishes, and tells the outcome.
    fn lead(&self, written: Result<(Receipt, Receipts)>) -> Result<Receipts> {
        let collected = self.collect(written.as_ref().map(|(receipt, _)| receipt));
        let published = collected.and_then(|receipts| self.publish(&receipts));
        let verdict = match &published {
            Ok(()) => Verdict::Durable,
            Err(error) if error.kind() == ErrorKind::Indeterminate => Verdict::Unknown(self.group.wire(error)),
            Err(error) => Verdict::Failed(self.group.wire(error)),
        };
        self.tell(&verdict);
        published?;
        written.map(|(_, receipts)| receipts)
    }

    /// Tells the outcome, and leaves it as a note if it is known. A rank that neither reaches decides by a
    /// veto.
    fn tell(&self, verdict: &Verdict) {
        let save = self.save;
        let told = encode(verdict).and_then(|message| {
            if !matches!(verdict, Verdict::Unknown(_)) {
                self.group.shared.put_note(self.group.session.generation, OUTCOME, &encode(&(save, verdict))?)?;
            }
            // The outcome of a save whose deadline has passed is still worth telling.
            let deadline = self.deadline.max(Instant::now() + TELL_GRACE);
            self.group.coordinator.tell(self.group.round(save, Phase::Outcome), Some(&message), deadline)
        });
        if let Err(error) = told {
            let step = self.request.ticket.step;
            tracing::warn!(step, error = format_args!("{error:#}"), "the outcome of a save did not reach all ranks");
        }
    }

    /// Collects the receipts of all ranks.
    ///
    /// # Errors
    /// The first failure of a rank; `Deadline` or `Unavailable`, with the ranks that are missing.
    fn collect(&self, own: Result<&Receipt, &Error>) -> Result<BTreeMap<u32, Receipt>> {
        let report = match own {
            Ok(receipt) => Report::Written(receipt.clone()),
            Err(error) => Report::Failed(self.group.wire(error)),
        };
        let mut receipts = BTreeMap::new();
        let mut wrong = own.err().cloned();
        let mut each = |rank: u32, bytes: &[u8]| {
            let heard = decode::<Report>(bytes, rank).and_then(|report| match report {
                Report::Written(receipt) => {
                    own.map_err(Error::clone).and_then(|own| self.check(&receipt, own, rank)).map(|()| receipt)
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
            let enough = mutant::on(Mutant::Receipts);
            if enough { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
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

    /// Refuses a receipt that is not of this save.
    fn check(&self, theirs: &Receipt, own: &Receipt, rank: u32) -> Result<()> {
        let same = (theirs.step, theirs.attempt, theirs.plan) == (own.step, own.attempt, own.plan);
        if same || mutant::on(Mutant::ReceiptCheck) {
            return Ok(());
        }
        let Receipt { step, attempt, plan, .. } = theirs;
        let why = format!(
            "a rank has written something else step={step} attempt={attempt} plan={plan} expected_step={} expected_attempt={} expected_plan={}",
            own.step, own.attempt, own.plan
        );
        Err(Error::invalid(why).with_ranks([rank]))
    }

    /// Publishes what all ranks have written.
    fn publish(&self, receipts: &BTreeMap<u32, Receipt>) -> Result<()> {
        let generation = self.group.session.generation;
        let mut parts = Vec::with_capacity(receipts.len());
        for (rank, receipt) in receipts {
            let note = self.group.shared.note(generation, &rows_of(*rank), MAX_NOTE)?.unwrap_or_default();
            if Digest::of(&note) != receipt.digest {
                let why = "the rows of a rank's files are not what it wrote";
                return Err(Error::corrupt(why).with_ranks([*rank]));
            }
            parts.push(note);
        }
        self.attempt.put(MANIFEST, &rows::manifest(self.request, self.group.member.world, &parts)?)?;
        enter(&self.request.ticket, SavePhase::Publishing)?;
        self.attempt.claim()?;
        if !mutant::on(Mutant::Zombie) {
            self.group.check_newest()?;
        }
        if mutant::on(Mutant::ToldFirst) {
            self.tell(&Verdict::Durable);
        }
        self.attempt.publish(self.request.overwrite)
    }

    /// On another rank: sends the receipt, and learns the outcome.
    fn report(&self, written: Result<(Receipt, Receipts)>) -> Result<Receipts> {
        // From here on only rank 0 decides, or a veto.
        let written = written.and_then(|written| enter(&self.request.ticket, SavePhase::Promised).map(|()| written));
        let report = match &written {
            Ok((receipt, _)) => Report::Written(receipt.clone()),
            Err(error) => Report::Failed(self.group.wire(error)),
        };
        let (save, coordinator) = (self.save, &self.group.coordinator);
        let mut none = |_: u32, _: &[u8]| ControlFlow::Continue(());
        let round = |phase| self.group.round(save, phase);
        let sent = encode(&report)
            .and_then(|report| coordinator.gather(round(Phase::Receipt), &report, &mut none, self.deadline));
        let heard = sent
            .and_then(|()| coordinator.tell(round(Phase::Outcome), None, self.deadline))
            .and_then(|bytes| decode::<Verdict>(&bytes, 0));
        let (_, receipts) = written?;
        let ended = heard.map_or_else(|lost| self.decide(lost), Verdict::into_result);
        ended.map(|()| receipts)
    }

    /// Learns or decides the outcome on the storage, because it was not told.
    ///
    /// # Errors
    /// `lost` if the veto came in time; otherwise `Indeterminate`.
    fn decide(&self, lost: Error) -> Result<()> {
        let generation = self.group.session.generation;
        if let Ok(Some(note)) = self.group.shared.note(generation, OUTCOME, MAX_NOTE)
            && let Ok((save, verdict)) = decode::<(u64, Verdict)>(&note, 0)
            && save == self.save
        {
            return verdict.into_result();
        }
        if mutant::on(Mutant::NoVeto) {
            return Err(lost);
        }
        let lost = if lost.ranks().is_empty() { lost.with_ranks([0]) } else { lost };
        match self.attempt.veto() {
            Ok(Vetoed::Done) => Err(lost),
            Ok(Vetoed::TooLate) => {
                let why = "the outcome did not come from rank 0, and its publish can no longer be stopped";
                Err(Error::new(ErrorKind::Indeterminate, why).with_source(lost))
            }
            Err(error) => {
                let why = "the outcome did not come from rank 0, and whether it can still publish is unknown";
                Err(Error::new(ErrorKind::Indeterminate, why).with_source(error))
            }
        }
    }
}

fn rows_of(rank: u32) -> String {
    format!("rows-{rank:05}")
}
