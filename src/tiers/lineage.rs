//! Take-overs of a tier, and the lineage of sessions whose steps a session may promote.
//!
//! **Protocol.** A session is recorded in a tier as the newest before anything in the tier is listed. The
//! session that was the newest before decides which steps of the root may be promoted. Steps of a node that
//! comes back late belong to a session that is not in the lineage.
//! **Crash.** The lineage is a note beside the session in the root. Where the note is lost, the lineage
//! begins anew with the session that the take-over found.

use crate::error::{Error, ErrorKind, Result};
use crate::guard;
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use crate::storage::Storage;
use crate::storage::shared::{SessionRecord, Shared};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use uuid::Uuid;

/// The name of the note.
const NOTE: &str = "tiers.json";

/// Maximum length of the note.
const MAX_NOTE: u64 = 16 << 20;

/// The maximum number of sessions without a note that a read skips.
const MOST_UNNOTED: usize = 100;

/// The maximum number of sessions of a lineage in the note. Steps of older sessions were promoted or deleted
/// long ago.
const MOST: usize = 1000;

/// The newest session of a storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Found {
    /// No session had taken the storage over.
    Nothing,
    Session(Uuid),
    /// The storage has a newest session, but its identity cannot be read.
    Unknown,
}

/// The state of a storage before its take-over.
pub(super) struct Looked {
    /// None: no other process sees the storage.
    pub shared: Option<Arc<dyn Shared>>,
    pub found: Found,
    /// The generation that a session recorded next gets, if no other session is recorded before it.
    pub next: u64,
}

impl Looked {
    pub fn at(storage: &dyn Storage) -> Result<Self> {
        let Some(shared) = storage.shared() else { return Ok(Self { shared: None, found: Found::Nothing, next: 1 }) };
        let (newest, found) = match shared.newest()? {
            None => (0, Found::Nothing),
            Some((newest, record)) => {
                let session = record.and_then(|record| Uuid::parse_str(&record.token).ok());
                (newest, session.map_or(Found::Unknown, Found::Session))
            }
        };
        Ok(Self { shared: Some(shared), found, next: newest + 1 })
    }

    /// Records `session` as the newest. Returns its generation.
    pub fn record(&self, session: Uuid) -> Result<u64> {
        let Some(shared) = &self.shared else { return Ok(self.next) };
        shared.open_session(&SessionRecord {
            // A failed try may have left something under the name of its session.
            session: Uuid::new_v4(),
            token: session.to_string(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            pid: std::process::id(),
            nonces: Vec::new(),
        })
    }
}

/// The note in a root about the tiers behind it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Note {
    pub(super) tiers: BTreeMap<String, Lineage>,
    /// The tiers that this session has taken over.
    pub(super) ours: BTreeSet<String>,
}

impl Note {
    /// Reads the note of the newest session of a root. A note that cannot be read counts as absent.
    pub fn read(storage: &dyn Storage) -> Self {
        let read = || -> Result<Option<Vec<u8>>> {
            let Some(shared) = storage.shared() else { return Ok(None) };
            let Some((newest, _)) = shared.newest()? else { return Ok(None) };
            // A session that died before it could write its own note has done nothing in a tier. The note
            // before it is still there.
            for generation in (1..=newest).rev().take(MOST_UNNOTED) {
                match shared.note(generation, NOTE, MAX_NOTE) {
                    Ok(None) => {}
                    Err(error) if error.kind() == ErrorKind::NotFound => {}
                    note => return note,
                }
            }
            Ok(None)
        };
        match read().and_then(|bytes| bytes.map(|bytes| Self::parse(&bytes)).transpose()) {
            Ok(note) => note.unwrap_or_default(),
            Err(error) => {
                tracing::warn!(
                    error = format_args!("{error:#}"),
                    "cannot read the note of the tiers of an earlier session: fewer of its steps are promoted"
                );
                Self::default()
            }
        }
    }

    fn parse(bytes: &[u8]) -> Result<Self> {
        serde_json::from_slice(bytes).map_err(|e| Error::corrupt("a note of the tiers is damaged").with_source(e))
    }

    /// Reads the note of the session `generation` of a root.
    ///
    /// # Errors
    /// `Unavailable` if there is none: a newer session deletes it.
    pub(super) fn of(shared: &dyn Shared, generation: u64) -> Result<Self> {
        let none = || {
            let why = "rank 0 has written no note of the tiers: has another session taken the root over?";
            Error::new(ErrorKind::Unavailable, format!("{why} generation={generation}"))
        };
        Self::parse(&shared.note(generation, NOTE, MAX_NOTE)?.ok_or_else(none)?)
    }

    /// Keeps the note of an older session for a session that has done nothing yet. Best effort, as all notes
    /// are.
    pub(crate) fn keep(&self, shared: &dyn Shared, generation: u64) {
        if !self.tiers.is_empty() {
            let noted = Self { tiers: self.tiers.clone(), ours: BTreeSet::new() };
            guard::attempt("keep the note of the tiers of an earlier session", || noted.write(shared, generation));
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
pub(super) struct Lineage {
    /// Whether steps that name no session may be promoted: they were written before the root had tiers.
    unmarked: bool,
    /// Sessions of this root. Each was the newest of the tier when the next one took the tier over.
    sessions: Vec<Uuid>,
    /// Later sessions of this root that did not reach the tier.
    pending: Vec<Uuid>,
    /// A take-over that was about to happen.
    next: Option<Next>,
    /// Attempts in the root that the tier has had. An attempt that the tier deleted is not promoted again.
    pub had: HashSet<Attempt>,
}

/// The lineage that a take-over makes, noted before the take-over. If the tier knows the session under this
/// generation, the take-over happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Next {
    generation: u64,
    session: Uuid,
    unmarked: bool,
    sessions: Vec<Uuid>,
    goes_on: bool,
}

impl Lineage {
    /// Returns the lineage before the session has reached the tier.
    pub fn pending(mut self, session: Uuid) -> Self {
        self.pending.push(session);
        self
    }

    /// Returns the lineage, with the effect of a take-over whose session died before it could note that
    /// effect. The second value is false if that session is `session` itself and did not continue the earlier
    /// lineage.
    fn settled(mut self, looked: &Looked, session: Uuid) -> (Self, bool) {
        let Some(next) = self.next.take() else { return (self, true) };
        if (next.generation + 1, Found::Session(next.session)) != (looked.next, looked.found) {
            return (self, true);
        }
        let made = self.pending.iter().position(|pending| *pending == next.session);
        self.pending.drain(..made.map_or(0, |made| made + 1));
        (self.unmarked, self.sessions) = (next.unmarked, next.sessions);
        (self, next.session != session || next.goes_on)
    }

    /// Returns the lineage of `session` if it takes the tier over now, and whether it continues the earlier
    /// lineage. `others` are the lineages of other tiers, which count for a tier that is new.
    pub fn after<'a>(&self, looked: &Looked, session: Uuid, others: impl Iterator<Item = &'a Self>) -> (Self, bool) {
        let (Self { unmarked, mut sessions, mut pending, had, .. }, settled) = self.clone().settled(looked, session);
        pending.retain(|other| *other != session);
        let (mut unmarked, mut had, mut goes_on) = (unmarked, had, settled);
        match looked.found {
            Found::Nothing => {
                sessions.append(&mut pending);
                sessions.splice(0..0, others.flat_map(|lineage| lineage.sessions.iter().copied()));
                // The attempts that an earlier tier of this name had are not in this tier.
                (unmarked, had) = (true, HashSet::new());
            }
            Found::Session(newest) if sessions.last() == Some(&newest) => sessions.append(&mut pending),
            // In a tier, the steps of the tier's newest session are never a fork.
            Found::Session(newest) => (sessions, unmarked, goes_on) = (vec![newest], false, false),
            Found::Unknown => (sessions, unmarked, goes_on) = (Vec::new(), false, false),
        }
        if sessions.last() != Some(&session) {
            sessions.push(session);
        }
        (Self { unmarked, sessions, pending: Vec::new(), next: None, had }.short(), goes_on)
    }

    /// Returns this lineage, together with the lineage that a take-over is about to make.
    pub fn before(&self, after: &(Self, bool), looked: &Looked, session: Uuid) -> Self {
        let (Self { unmarked, sessions, .. }, goes_on) = after;
        let next = Next {
            generation: looked.next,
            session,
            unmarked: *unmarked,
            sessions: sessions.clone(),
            goes_on: *goes_on,
        };
        // A noted take-over stays in the lineage if it happened.
        let (mut lineage, _) = self.clone().settled(looked, session);
        lineage.next = Some(next);
        lineage
    }

    fn short(mut self) -> Self {
        let surplus = self.sessions.len().saturating_sub(MOST);
        self.sessions.drain(..surplus);
        self
    }

    /// Whether a step of this session in the tier may be replaced. A step that names no session was there
    /// before the tier, or belongs to another root.
    pub fn replaces(&self, session: Option<Uuid>) -> bool {
        session.is_some_and(|session| self.sessions.contains(&session))
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

    fn none<'a>() -> impl Iterator<Item = &'a Lineage> {
        std::iter::empty()
    }

    fn looked(found: Found, next: u64) -> Looked {
        Looked { shared: None, found, next }
    }

    fn first(session: Uuid) -> Lineage {
        Lineage::default().pending(session).after(&looked(Found::Nothing, 1), session, none()).0
    }

    #[test]
    fn a_session_goes_on_from_the_newest_one_of_its_own_root_and_from_no_other() {
        let [one, two, three, other] = ids();
        let lineage = first(one);
        assert!(lineage.allows(None) && lineage.allows(Some(one)) && !lineage.allows(Some(other)));
        let (own, goes_on) = lineage.clone().pending(two).after(&looked(Found::Session(one), 2), two, none());
        assert!(goes_on && own.allows(Some(one)) && own.allows(None));
        // Another node took the tier over in between. So the steps that this root wrote before are a fork.
        let (late, goes_on) = lineage.clone().pending(two).after(&looked(Found::Session(other), 3), two, none());
        assert!(!goes_on && !late.allows(Some(one)) && !late.allows(None) && late.allows(Some(two)));
        let (late, _) = late.pending(three).after(&looked(Found::Session(two), 4), three, none());
        assert!(!late.allows(Some(one)) && late.allows(Some(two)));
        let (unknown, goes_on) = lineage.after(&looked(Found::Unknown, 3), two, none());
        assert!(!goes_on && !unknown.allows(Some(one)) && unknown.allows(Some(two)));
    }

    #[test]
    fn sessions_that_did_not_reach_the_tier_are_in_the_chain_of_the_next_one() {
        let [one, away, back, other] = ids();
        let lineage = first(one).pending(away).pending(back);
        let (reached, goes_on) = lineage.after(&looked(Found::Session(one), 2), back, none());
        assert!(goes_on && reached.allows(Some(away)) && reached.allows(Some(one)));
        let (fork, goes_on) = lineage.after(&looked(Found::Session(other), 3), back, none());
        assert!(!goes_on && !fork.allows(Some(away)) && !fork.allows(Some(one)));
    }

    #[test]
    fn a_session_that_died_in_its_take_over_is_in_the_chain_with_what_it_had_found() {
        let [one, died, back, other] = ids();
        let pending = first(one).pending(died);
        for (found, next, linked) in [(Found::Session(one), 2, true), (Found::Session(other), 3, false)] {
            let look = looked(found, next);
            let noted = pending.before(&pending.after(&look, died, none()), &look, died).pending(back);
            // The tier knows the session.
            let (after, _) = noted.after(&looked(Found::Session(died), next + 1), back, none());
            assert!(after.allows(Some(died)) && after.allows(Some(one)) == linked, "{found:?}");
            // The session was not recorded.
            let (after, goes_on) = noted.after(&look, back, none());
            assert!(goes_on == linked && after.allows(Some(died)) == linked);
            // Another session was recorded before it, and it was recorded after that one.
            let (after, _) = noted.after(&looked(Found::Session(died), next + 2), back, none());
            assert!(after.allows(Some(died)) && !after.allows(Some(one)));
        }
    }

    #[test]
    fn a_new_tier_gets_the_steps_of_the_chains_to_other_tiers() {
        let [one, two] = ids();
        let old = first(one);
        let (new, _) = Lineage::default().after(&looked(Found::Nothing, 1), two, [&old].into_iter());
        assert!(new.allows(Some(one)) && new.allows(Some(two)));
    }

    #[test]
    fn a_look_finds_the_session_that_was_recorded_and_the_note_outlives_a_session_without_one() {
        let root = tempfile::tempdir().unwrap();
        let storage = Local::open(root.path()).unwrap();
        let [one, two] = ids();
        let look = Looked::at(&storage).unwrap();
        assert_eq!((look.found, look.next, look.record(one).unwrap()), (Found::Nothing, 1, 1));
        let note = Note { tiers: [("shared".to_owned(), first(one))].into(), ..Note::default() };
        note.write(look.shared.unwrap().as_ref(), 1).unwrap();
        let look = Looked::at(&storage).unwrap();
        assert_eq!((look.found, look.next, look.record(two).unwrap()), (Found::Session(one), 2, 2));
        assert_eq!(Note::read(&storage).tiers["shared"], first(one));
    }
}
