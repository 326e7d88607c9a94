//! The storage to which an executor saves versions. A version is staged in memory first, because the commit
//! needs all of its bytes to choose between a delta and a full.

use super::shared::Shared;
use crate::error::{Error, Result};
use crate::id::{Attempt, parse_version_name};
use crate::storage::{FileWriting, Reading, Storage, Sweep, Swept, Writing};
use crate::sync::{Mutex, lock};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The storage that receives the saves of versions.
#[derive(Clone)]
pub(super) struct VersionStorage {
    pub shared: Arc<Shared>,
    /// True if this storage is brought to an executor of the program. The committer of that executor settles
    /// a save before its future resolves. So long work is left to the sweep that its tidying thread does
    /// after each save.
    pub brought: bool,
}

impl fmt::Debug for VersionStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VersionStorage({:?})", self.shared.storage)
    }
}

impl Storage for VersionStorage {
    fn begin(&self, name: &str, attempt: Attempt, _: bool) -> Result<Arc<dyn Writing>> {
        let Some((number, false)) = parse_version_name(name) else {
            return Err(Error::invalid("only versions are saved to a chain").with_path(self.describe(name)));
        };
        let staged = self.shared.memory.begin(name, attempt, true)?;
        let (shared, published, tidies) = (self.shared.clone(), Mutex::new(None), !self.brought);
        Ok(Arc::new(VersionWriting { shared, staged, name: name.into(), number, attempt, tidies, published }))
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.shared.storage.open(name)
    }

    /// Lists no steps: versions are not steps of an executor's catalog.
    fn list(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn confirm(&self, name: &str) -> Result<()> {
        self.shared.storage.confirm(name)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.shared.storage.remove(name)
    }

    fn sweep(&self, how: Sweep) -> Result<Swept> {
        if self.brought {
            self.shared.tidy();
        }
        self.shared.storage.sweep(how)
    }

    fn touch(&self) -> Result<()> {
        self.shared.storage.touch()
    }

    fn hint(&self, _: &str) -> Result<()> {
        Ok(())
    }

    /// Returns the chain, for an executor that also saves elsewhere.
    fn elsewhere(&self, _: &Path, _: bool) -> Result<Arc<dyn Storage>> {
        Ok(Arc::new(self.clone()))
    }

    fn describe(&self, name: &str) -> PathBuf {
        self.shared.storage.describe(name)
    }
}

/// A version being saved.
struct VersionWriting {
    shared: Arc<Shared>,
    staged: Arc<dyn Writing>,
    name: String,
    number: u64,
    attempt: Attempt,
    /// Whether settling the version also tidies the chain.
    tidies: bool,
    /// The version that was made durable in the chain.
    published: Mutex<Option<Arc<dyn Writing>>>,
}

impl fmt::Debug for VersionWriting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VersionWriting({})", self.name)
    }
}

impl Writing for VersionWriting {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        self.staged.create(file, len)
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        self.staged.put(file, bytes)
    }

    fn publish(&self, _: bool) -> Result<()> {
        self.staged.publish(true)?;
        let (writing, published) = self.shared.commit(&self.name, self.number)?;
        if let Some(slot) = lock(&self.shared.slots).remove(&self.attempt).and_then(|slot| slot.upgrade()) {
            let _ = slot.set(published);
        }
        *lock(&self.published) = Some(writing);
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        let published = lock(&self.published).take();
        let settled = published.map_or(Ok(()), |writing| writing.settle());
        if self.tidies {
            self.shared.tidy();
        }
        settled
    }

    fn abandon(&self) -> Result<()> {
        lock(&self.shared.slots).remove(&self.attempt);
        match self.staged.abandon() {
            // The version was staged whole and then refused. The commit has deleted the files that it had
            // written.
            Err(_) => Ok(()),
            abandoned => abandoned,
        }
    }
}
