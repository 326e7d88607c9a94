//! Take-overs of a tier, and the chain of sessions whose steps a session may promote.
//!
//! **Protocol.** A session is recorded in a tier as the newest before anything in it is listed. What the
//! tier's newest session was before decides which steps of the root may be promoted: those of a node that
//! comes back late are of a session that is not in the chain. **Crash.** The chain is a note beside the
//! session in the root; where it is lost, the chain begins anew with the session that the take-over found.

use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::Storage;
use crate::storage::shared::{SessionRecord, Shared};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// The name of the note.
const NOTE: &str = "tiers.json";

/// Maximum length of the note.
const MAX_NOTE: u64 = 16 << 20;

/// How many sessions of a chain are noted: the steps of older ones are long promoted or deleted.
const MOST: usize = 1000;

/// A storage that a session has taken over.
#[derive(Debug)]
pub(super) struct TakenOver {
    /// None: no other process sees the storage.
    pub shared: Option<Arc<dyn Shared>>,
    pub generation: u64,
    pub found: Found,
}

/// The newest session before a take-over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No session had taken the storage over.
    Nothing,
    Session(Uuid),
    /// It cannot be told which.
    Unknown,
}

/// A take-over that may be tried again: a session is recorded in a storage once.
#[derive(Debug, Default)]
pub(super) struct TakingOver(Option<(u64, Found)>);

impl TakingOver {
    /// Records `session` as the newest of `storage`, and forbids every publish of older ones.
    pub fn take(&mut self, storage: &dyn Storage, session: Uuid) -> Result<TakenOver> {
        let Some(shared) = storage.shared() else {
            return Ok(TakenOver { shared: None, generation: 1, found: Found::Nothing });
        };
        let (generation, found) = match self.0 {
            Some(recorded) => recorded,
            None => *self.0.insert(record(shared.as_ref(), session)?),
        };
        shared.take_over(generation)?;
        Ok(TakenOver { shared: Some(shared), generation, found })
    }
}

/// Records the session, and returns its generation and which was the newest before.
fn record(shared: &dyn Shared, session: Uuid) -> Result<(u64, Found)> {
    let before = shared.newest()?;
    let generation = shared.open_session(&SessionRecord {
        // A try that failed may have left something under its name.
        session: Uuid::new_v4(),
        token: session.to_string(),
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
        nonces: Vec::new(),
    })?;
    let found = match before {
        None if generation == 1 => Found::Nothing,
        Some((newest, Some(record))) if newest + 1 == generation => {
            Uuid::parse_str(&record.token).map_or(Found::Unknown, Found::Session)
        }
        _ => Found::Unknown,
    };
    Ok((generation, found))
}

/// What is noted in a root of the tiers behind it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Note {
    pub(super) tiers: BTreeMap<String, Chain>,
}

impl Note {
    /// The note of the newest session of a root. What cannot be read is as if there were none.
    pub fn read(storage: &dyn Storage) -> Self {
        let read = || -> Result<Option<Vec<u8>>> {
            let Some(shared) = storage.shared() else { return Ok(None) };
            let Some((newest, _)) = shared.newest()? else { return Ok(None) };
            shared.note(newest, NOTE, MAX_NOTE)
        };
        let parsed = |bytes: Vec<u8>| serde_json::from_slice(&bytes).map_err(|e| Error::corrupt("a note").with_source(e));
        match read().and_then(|bytes| bytes.map(parsed).transpose()) {
            Ok(note) => note.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(
                    error = format_args!("{error:#}"),
                    "what earlier sessions knew of the tiers is lost: fewer of their steps are promoted"
                );
                Self::default()
            }
        }
    }

    /// Writes the note beside the session `generation` of a root.
    pub(super) fn write(&self, shared: &dyn Shared, generation: u64) -> Result<()> {
        let bytes =
            serde_json::to_vec(self).map_err(|e| Error::internal("cannot write a note of the tiers").with_source(e))?;
        shared.put_note(generation, NOTE, &bytes)
    }
}

/// The sessions whose steps may be promoted to one tier.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct Chain {
    /// Steps that name no session: those of before the root had tiers.
    unmarked: bool,
    /// Sessions of this root of which each was the newest of the tier when the next one took it over.
    sessions: Vec<Uuid>,
    /// Sessions of this root since then that did not reach the tier.
    pending: Vec<Uuid>,
    /// Attempts in the root that the tier has had: what it deleted of them is not promoted again.
    pub had: HashSet<Attempt>,
}

impl Chain {
    /// The chain before the session has reached the tier.
    pub fn pending(mut self, session: Uuid) -> Self {
        self.pending.push(session);
        self
    }

    /// The chain of a session that took the tier over after `found`, and whether it goes on from the chain of
    /// before. `others` are the chains to other tiers, which count for a tier that is new.
    pub fn after<'a>(self, found: Found, session: Uuid, others: impl Iterator<Item = &'a Self>) -> (Self, bool) {
        let Self { unmarked, mut sessions, mut pending, had } = self;
        pending.retain(|other| *other != session);
        let goes_on = match found {
            Found::Nothing => {
                sessions.append(&mut pending);
                let known: Vec<Uuid> = others.flat_map(|chain| chain.sessions.iter().copied()).collect();
                sessions.splice(0..0, known);
                sessions.push(session);
                return (Self { unmarked: true, sessions, pending, had }.short(), true);
            }
            Found::Session(newest) if sessions.last() == Some(&newest) => {
                sessions.append(&mut pending);
                true
            }
            // The steps of the newest session of a tier are never a fork in it.
            Found::Session(newest) => {
                sessions = vec![newest];
                // It may be one of this root that died before it could note what it had found.
                let of_this_root = pending.iter().position(|other| *other == newest);
                sessions.extend(of_this_root.into_iter().flat_map(|at| pending.split_off(at + 1)));
                of_this_root.is_some()
            }
            Found::Unknown => {
                sessions.clear();
                false
            }
        };
        if sessions.last() != Some(&session) {
            sessions.push(session);
        }
        (Self { unmarked: unmarked && goes_on, sessions, pending: Vec::new(), had }.short(), goes_on)
    }

    fn short(mut self) -> Self {
        let surplus = self.sessions.len().saturating_sub(MOST);
        self.sessions.drain(..surplus);
        self
    }

    /// Whether a step of this session, or of none, may be promoted.
    pub fn allows(&self, session: Option<Uuid>) -> bool {
        mutant::on(Mutant::ForeignGeneration)
            || session.map_or(self.unmarked, |session| self.sessions.contains(&session))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::local::Local;

    fn ids<const N: usize>() -> [Uuid; N] {
        std::array::from_fn(|_| Uuid::new_v4())
    }

    fn none<'a>() -> impl Iterator<Item = &'a Chain> {
        std::iter::empty()
    }

    #[test]
    fn a_session_goes_on_from_the_newest_one_of_its_own_root_and_from_no_other() {
        let [first, second, third, other] = ids();
        let (chain, _) = Chain::default().after(Found::Nothing, first, none());
        assert!(chain.allows(None) && chain.allows(Some(first)) && !chain.allows(Some(other)));
        let (own, goes_on) = chain.clone().after(Found::Session(first), second, none());
        assert!(goes_on && own.allows(Some(first)) && own.allows(None));
        // Another node took the tier over in between: what this root wrote before is a fork.
        let (late, goes_on) = chain.clone().after(Found::Session(other), second, none());
        assert!(!goes_on && !late.allows(Some(first)) && !late.allows(None) && late.allows(Some(second)));
        let (late, _) = late.after(Found::Session(second), third, none());
        assert!(!late.allows(Some(first)) && late.allows(Some(second)));
        let (unknown, goes_on) = chain.after(Found::Unknown, second, none());
        assert!(!goes_on && !unknown.allows(Some(first)) && unknown.allows(Some(second)));
    }

    #[test]
    fn sessions_that_did_not_reach_the_tier_are_in_the_chain_of_the_next_one() {
        let [first, away, back, other] = ids();
        let (chain, _) = Chain::default().after(Found::Nothing, first, none());
        let chain = chain.pending(away);
        let (reached, goes_on) = chain.clone().after(Found::Session(first), back, none());
        assert!(goes_on && reached.allows(Some(away)) && reached.allows(Some(first)));
        let (fork, goes_on) = chain.clone().after(Found::Session(other), back, none());
        assert!(!goes_on && !fork.allows(Some(away)) && !fork.allows(Some(first)));
        // `away` reached it after all, and died before it could note what it had found.
        let (silent, goes_on) = chain.after(Found::Session(away), back, none());
        assert!(goes_on && silent.allows(Some(away)) && !silent.allows(Some(first)));
    }

    #[test]
    fn a_new_tier_gets_the_steps_of_the_chains_to_other_tiers() {
        let [first, second] = ids();
        let (old, _) = Chain::default().after(Found::Nothing, first, none());
        let (new, _) = Chain::default().after(Found::Nothing, second, [&old].into_iter());
        assert!(new.allows(Some(first)) && new.allows(Some(second)));
    }

    #[test]
    fn a_take_over_finds_the_session_before_it_and_the_note_comes_back() {
        let root = tempfile::tempdir().unwrap();
        let storage = Local::open(root.path()).unwrap();
        let [first, second] = ids();
        let taken = TakingOver::default().take(&storage, first).unwrap();
        assert_eq!((taken.generation, taken.found), (1, Found::Nothing));
        let (chain, _) = Chain::default().after(taken.found, first, none());
        let note = Note { tiers: [("shared".to_owned(), chain.clone())].into() };
        note.write(taken.shared.unwrap().as_ref(), taken.generation).unwrap();
        assert_eq!(Note::read(&storage).tiers["shared"], chain);
        let taken = TakingOver::default().take(&storage, second).unwrap();
        assert_eq!((taken.generation, taken.found), (2, Found::Session(first)));
    }
}
