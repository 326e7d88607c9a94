//! The content of the root object: which steps exist, and which session may change them.
//!
//! The object is JSON and ends with its own digest, as a manifest does. No two versions have the same
//! content: `change` counts, and each change has a `nonce`. A store compares versions by content (an ETag).
//! If a content could occur again, the condition of a request that arrives late could hold by mistake.

use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::seal;
use crate::id::Attempt;
use crate::mutant::{self, Mutant};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

const FORMAT: &str = "ashore root";
const VERSION: u32 = 1;

/// Maximum length of the root object in bytes: some 100,000 steps.
pub(super) const MAX_LENGTH: u64 = 64 << 20;

/// Number of newest changes whose nonces the root object keeps.
pub(super) const REMEMBERED: usize = 32;

/// The content of the root object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    format: String,
    version: u32,
    /// How many changes there have been.
    pub change: u64,
    /// The nonces of the newest changes, oldest first.
    pub recent: Vec<Uuid>,
    /// How many sessions have taken the root over.
    pub generation: u64,
    /// The newest session.
    pub session: Owner,
    /// The steps, sorted by name.
    pub steps: Vec<Entry>,
    /// Attempts of this generation that can never be published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub vetoed: Vec<Attempt>,
    /// The marks of steps.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marks: Option<serde_json::Value>,
}

/// A session that owns a root, for messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Owner {
    pub id: Uuid,
    /// The run that the session is part of; empty if the run has no name.
    pub run: String,
    pub host: String,
    pub pid: u32,
}

/// A step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub name: String,
    pub attempt: Attempt,
    /// The generation that wrote it.
    pub generation: u64,
    /// Its manifest; None if it has none.
    pub manifest: Option<Whole>,
}

/// The length and digest of an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Whole {
    pub length: u64,
    pub digest: Digest,
}

impl Entry {
    /// The prefix of its objects.
    pub fn directory(&self) -> String {
        directory(&self.name, self.generation, self.attempt)
    }
}

/// The prefix of the objects of an attempt.
pub(super) fn directory(name: &str, generation: u64, attempt: Attempt) -> String {
    format!("{name}/{generation}-{attempt}")
}

/// The generation and attempt that [`directory`] wrote into the last component.
pub(super) fn parse_directory(component: &str) -> Option<(u64, Attempt)> {
    let (generation, attempt) = component.split_once('-')?;
    let number: u64 = generation.parse().ok()?;
    Some((number, Attempt::parse(attempt)?)).filter(|_| number.to_string() == generation)
}

impl State {
    /// The state before any change. It is never stored.
    pub fn empty() -> Self {
        let session = Owner { id: Uuid::nil(), run: String::new(), host: String::new(), pid: 0 };
        Self {
            format: FORMAT.into(),
            version: VERSION,
            change: 0,
            recent: Vec::new(),
            generation: 0,
            session,
            steps: Vec::new(),
            vetoed: Vec::new(),
            marks: None,
        }
    }

    /// The nonce of the last change.
    pub fn nonce(&self) -> Uuid {
        self.recent.last().copied().unwrap_or_default()
    }

    /// The step `name`.
    pub fn step(&self, name: &str) -> Option<&Entry> {
        self.find(name).ok().and_then(|at| self.steps.get(at))
    }

    /// True when a step has its objects in `directory`.
    pub fn names(&self, directory: &str) -> bool {
        let step = directory.split_once('/').and_then(|(name, _)| self.step(name));
        step.is_some_and(|step| step.directory() == directory)
    }

    /// Adds a step; returns the one that it replaces.
    pub fn put(&mut self, entry: Entry) -> Option<Entry> {
        match self.find(&entry.name) {
            Ok(at) => self.steps.get_mut(at).map(|old| std::mem::replace(old, entry)),
            Err(at) => {
                self.steps.insert(at, entry);
                None
            }
        }
    }

    /// Removes a step and returns it.
    pub fn take(&mut self, name: &str) -> Option<Entry> {
        self.find(name).ok().map(|at| self.steps.remove(at))
    }

    fn find(&self, name: &str) -> Result<usize, usize> {
        self.steps.binary_search_by(|step| step.name.as_str().cmp(name))
    }

    /// Marks this state as one change later than the state from which it was made.
    pub fn changed(mut self) -> Self {
        if mutant::on(Mutant::StoreContentReturns) {
            (self.change, self.recent) = (1, vec![Uuid::nil()]);
            return self;
        }
        self.change += 1;
        let oldest = (self.recent.len() + 1).saturating_sub(REMEMBERED);
        self.recent.drain(..oldest);
        self.recent.push(Uuid::new_v4());
        self
    }

    /// The bytes of the root object.
    ///
    /// # Errors
    /// `NoSpace` when there are too many steps for one object.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self).map_err(|e| Error::internal("cannot write json").with_source(e))?;
        text.pop();
        let bytes = seal::seal(text);
        if bytes.len() as u64 > MAX_LENGTH {
            let why = format!("the root names too many steps: prune some steps={}", self.steps.len());
            return Err(Error::new(crate::error::ErrorKind::NoSpace, why));
        }
        Ok(bytes)
    }

    /// Parses a root object.
    ///
    /// # Errors
    /// `Corrupt` for bytes that are not a root object; `Invalid` for a root object of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let text = seal::unseal(bytes).ok_or_else(|| {
            Error::corrupt(format!("the root object is damaged: its digest does not fit bytes={}", bytes.len()))
        })?;
        let mut json = text.to_vec();
        json.push(b'}');
        let unreadable = |e| Error::corrupt("the root object cannot be read").with_source(e);
        let head: Head = serde_json::from_slice(&json).map_err(unreadable)?;
        if head.format != FORMAT {
            return Err(Error::corrupt(format!("not a root object of this library format={:?}", head.format)));
        }
        if head.version != VERSION {
            let why = "the root object has a version that this library does not read";
            return Err(Error::invalid(format!("{why} version={} supported={VERSION}", head.version)));
        }
        let state: Self = serde_json::from_slice(&json).map_err(unreadable)?;
        let sorted = state.steps.windows(2).all(|two| matches!(two, [a, b] if a.name < b.name));
        let plain = state.steps.iter().all(|step| crate::storage::name::check_step(&step.name).is_ok());
        if !sorted || !plain || state.change == 0 || state.recent.is_empty() {
            return Err(Error::corrupt("the root object contradicts itself"));
        }
        Ok(state)
    }
}

/// The fields that every version of a root object has.
#[derive(Deserialize)]
struct Head {
    format: String,
    version: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str) -> Entry {
        let manifest = Some(Whole { length: 7, digest: Digest::of(b"x") });
        Entry { name: name.into(), attempt: Attempt::new(), generation: 3, manifest }
    }

    #[test]
    fn a_root_object_reads_back_and_one_flipped_bit_is_seen() {
        let mut state = State::empty();
        state.put(entry("step-2"));
        state.put(entry("step-1"));
        let state = state.changed();
        let bytes = state.to_bytes().unwrap();
        assert_eq!(State::parse(&bytes).unwrap(), state);
        for at in 0..bytes.len() {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1;
            assert!(State::parse(&flipped).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_root_object_of_another_version_is_refused_as_such() {
        let mut state = State::empty().changed();
        state.version = 2;
        let error = State::parse(&state.to_bytes().unwrap()).unwrap_err();
        assert_eq!(error.kind(), crate::error::ErrorKind::Invalid);
    }

    #[test]
    fn a_step_that_comes_and_goes_leaves_another_content() {
        let before = State::empty().changed();
        let mut state = before.clone();
        state.put(entry("step-1"));
        let mut state = state.changed();
        state.take("step-1");
        let after = state.changed();
        assert_ne!(before.to_bytes().unwrap(), after.to_bytes().unwrap());
    }

    #[test]
    fn a_root_names_the_directory_of_a_step_and_no_other_of_the_same_attempt() {
        let mut state = State::empty();
        let step = entry("step-1");
        state.put(step.clone());
        assert!(state.names(&step.directory()));
        for other in [directory("step-1", 4, step.attempt), directory("step-2", 3, step.attempt), "step-1".into()] {
            assert!(!state.names(&other), "{other}");
        }
    }

    #[test]
    fn directories_of_attempts_are_recognised_and_others_are_not() {
        let attempt = Attempt::new();
        let name = directory("step-1", 12, attempt);
        let last = name.strip_prefix("step-1/").unwrap();
        assert_eq!(parse_directory(last), Some((12, attempt)));
        for other in ["12", "12-", "-1", "x-y", &format!("012-{attempt}"), &format!("+1-{attempt}")] {
            assert_eq!(parse_directory(other), None, "{other}");
        }
    }
}
