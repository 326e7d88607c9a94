//! What a rank of an executor contributes to a save: its files, the rows that describe them, and on rank 0
//! the manifest.

use super::end::Part;
use super::message::Receipt;
use super::rows;
use super::session::Group;
use crate::commit::concluded::{Concluded, Ending, concluded};
use crate::commit::single::{committed, enter};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::columns::TENSORS_TABLE;
use crate::format::entries::MANIFEST;
use crate::memory::AlignedBuffer;
use crate::outcome::Phase;
use crate::plan::{Receipts, Request};
use crate::storage::shared::SharedWriting;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Maximum length of the rows of a rank.
const MAX_ROWS: u64 = 1 << 32;

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
    let Ending { request, receipts, path, table, .. } = ending;
    let ticket = &request.ticket;
    let attempt = match &attempted.attempt {
        Ok(attempt) => attempt.clone(),
        Err(error) => {
            group.withdraw(attempted.save, error, ticket.deadline);
            return concluded(ticket, None, Err(ticket.failure().unwrap_or_else(|| error.clone())));
        }
    };
    let failed = ticket.failure().or_else(|| receipts.as_ref().err().cloned());
    let plan = attempted.plan;
    let mut part = Written { group, attempt: attempt.as_ref(), plan, request, receipts: receipts.as_ref().ok(), table };
    let ended = group.end(attempted.save, attempt.as_ref(), &mut part, failed, ticket.deadline);
    concluded(ticket, Some(attempt), ended.and_then(|()| Ok(committed(request, &receipts?, path))))
}

/// What the writers of this rank have written.
struct Written<'a> {
    group: &'a Group,
    attempt: &'a dyn SharedWriting,
    plan: Digest,
    request: &'a Request,
    /// None if something was not written.
    receipts: Option<&'a Receipts>,
    /// Memory for the rows.
    table: &'a mut AlignedBuffer,
}

impl Part for Written<'_> {
    fn overwrite(&self) -> bool {
        self.request.overwrite
    }

    fn seal(&mut self) -> Result<Receipt> {
        let receipts = self.receipts.ok_or_else(|| Error::internal("a save that was not written is sealed"))?;
        rows::fill(self.request, receipts, self.table)?;
        let rank = self.group.member.rank;
        self.group.shared.put_note(self.group.session.generation, &rows_of(rank), self.table)?;
        self.attempt.sync_names()?;
        let ticket = &self.request.ticket;
        Ok(Receipt {
            step: ticket.step,
            attempt: ticket.attempt(),
            plan: self.plan,
            bytes: self.request.plan.length,
            rows: self.table.len() as u64,
            digest: Digest::of(self.table),
        })
    }

    fn assemble(&mut self, receipts: &BTreeMap<u32, Receipt>) -> Result<()> {
        let mut parts = Vec::with_capacity(receipts.len());
        for (rank, receipt) in receipts {
            let note = self.group.shared.note(self.group.session.generation, &rows_of(*rank), MAX_ROWS)?;
            let note = note.filter(|note| Digest::of(note) == receipt.digest);
            let why = || Error::corrupt("the rows of a rank's files are not what it wrote").with_ranks([*rank]);
            parts.push(note.ok_or_else(why)?);
        }
        let (table, manifest) = rows::step(self.request, self.group.member.world, &parts)?;
        self.attempt.put(TENSORS_TABLE, &table)?;
        self.attempt.put(MANIFEST, &manifest)
    }

    fn promise(&self) -> Result<()> {
        enter(&self.request.ticket, Phase::Promised)
    }

    fn begin_publish(&self) -> Result<()> {
        enter(&self.request.ticket, Phase::Publishing)
    }
}

fn rows_of(rank: u32) -> String {
    format!("rows-{rank:05}")
}
