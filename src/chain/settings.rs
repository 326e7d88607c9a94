//! The settings of a publisher, and its report about each version.

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

    /// Keeps versions that the newest full has made unnecessary until `versions` newer ones are there.
    /// Followers may still be applying the older ones. Default: 8.
    pub fn grace(mut self, versions: u64) -> Self {
        self.settings.grace = versions;
        self
    }

    /// Writes a full after at most `versions` deltas, or earlier when the deltas since the last full are
    /// longer than half of it. Default: 64.
    pub fn full_every(mut self, versions: u64) -> Self {
        self.settings.full_every = versions.max(1);
        self
    }

    /// Begins with a full, instead of reading the newest version: less memory and time at start, more bytes
    /// for followers. A program that goes back to an older state may use it or not.
    pub fn begin_with_full(mut self) -> Self {
        self.from_full = true;
        self
    }

    /// Sets the bytes of the arena through which the publisher stages tensors, if the program gives no
    /// executor. Default: 64 MiB.
    pub fn arena(mut self, bytes: u64) -> Self {
        self.arena = bytes;
        self
    }
}

/// The kind of a published version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// A complete step.
    Full,
    /// The changes since another version.
    Delta {
        /// The version that the delta is applied to.
        base: u64,
        /// How many elements changed. A tensor that is written whole counts with all of its elements.
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
    /// The length of the files of a full of the same state.
    pub full_bytes: u64,
    /// The digest of the state: names, dtypes, shapes and tensors.
    pub state: u64,
    /// Its directory.
    pub path: PathBuf,
    /// How long it took to find the changes and encode them; zero for a full.
    pub encoding: Duration,
}
