//! What a publisher is told, and what it says of each version.

use crate::delta::Form;
use crate::id::Attempt;
use crate::storage::Storage;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Builds a [`Publisher`](super::Publisher).
#[derive(Debug)]
pub struct PublisherBuilder {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) settings: Settings,
    pub(super) from_full: bool,
    pub(super) arena: u64,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Settings {
    pub form: Form,
    pub grace: u64,
    pub full_every: u64,
}

impl PublisherBuilder {
    pub(super) fn new(storage: Arc<dyn Storage>) -> Self {
        let settings = Settings { form: Form::Packed, grace: 8, full_every: 64 };
        Self { storage, settings, from_full: false, arena: 64 << 20 }
    }

    /// Sets how deltas are written. Default: [`Form::Packed`].
    pub fn form(mut self, form: Form) -> Self {
        self.settings.form = form;
        self
    }

    /// Keeps versions that the newest full has made unnecessary until `versions` more are there, for
    /// followers that still apply them. Default: 8.
    pub fn grace(mut self, versions: u64) -> Self {
        self.settings.grace = versions;
        self
    }

    /// Writes a full after at most so many deltas; earlier when the deltas since the last full have half its
    /// length. Default: 64.
    pub fn full_every(mut self, versions: u64) -> Self {
        self.settings.full_every = versions.max(1);
        self
    }

    /// Begins with a full, instead of reading the newest version: less memory and time at start, more bytes
    /// for followers. For a program that goes back to an older state, either is right.
    pub fn begin_with_full(mut self) -> Self {
        self.from_full = true;
        self
    }

    /// Sets the bytes of the arena through which a publisher without an executor of the program stages
    /// tensors. Default: 64 MiB.
    pub fn arena(mut self, bytes: u64) -> Self {
        self.arena = bytes;
        self
    }
}

/// What a version was published as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A complete step.
    Full,
    /// What changed.
    Delta {
        /// The version that it is put on.
        base: u64,
        /// How many elements changed; of a tensor that is written whole, all.
        changed: u64,
    },
}

/// A durable version.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Published {
    /// Its number.
    pub version: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// Full or delta.
    pub kind: Kind,
    /// The length of its files.
    pub bytes: u64,
    /// The length of the files that a full would have.
    pub full_bytes: u64,
    /// The digest of its state: names, dtypes, shapes and tensors.
    pub state: u64,
    /// Its directory.
    pub path: PathBuf,
    /// How long finding the changes and coding them took; zero for a full.
    pub encoding: Duration,
}
