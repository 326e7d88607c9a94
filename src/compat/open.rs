//! A bounded cache of open executors, for adapters whose calls name a directory.

use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::settings::Settings;
use std::path::Path;

/// The most recently used executors, each under a key. Each has its own arena and threads, so the cache is
/// small.
#[derive(Debug)]
pub(crate) struct Open<K> {
    most: usize,
    settings: Settings,
    /// Most recently used first.
    executors: Vec<(K, CheckpointExecutor)>,
}

impl<K: PartialEq> Open<K> {
    /// Creates a cache of at most `most` executors with these settings.
    pub fn new(most: usize, settings: Settings) -> Self {
        Self { most, settings, executors: Vec::new() }
    }

    /// Returns the executor of `key`, over `root`. A full cache drops the least recently used executor, which
    /// waits for its saves.
    ///
    /// # Errors
    /// As [`Builder::build`](crate::Builder::build).
    pub fn executor(&mut self, key: K, root: impl AsRef<Path>) -> Result<&CheckpointExecutor> {
        let executor = match self.executors.iter().position(|(open, _)| *open == key) {
            Some(at) => self.executors.remove(at).1,
            None => {
                self.executors.truncate(self.most - 1);
                CheckpointExecutor::builder(root.as_ref())
                    .settings(self.settings.clone())
                    .alone()
                    .no_tier_from_env()
                    .build()?
            }
        };
        self.executors.insert(0, (key, executor));
        self.last()
            .map(|(_, executor)| executor)
            .ok_or_else(|| Error::internal("an open executor is missing from the cache"))
    }

    /// The most recently used executor.
    pub fn last(&self) -> Option<&(K, CheckpointExecutor)> {
        self.executors.first()
    }

    /// Closes the executors whose key does not fit.
    pub fn retain(&mut self, fits: impl Fn(&K) -> bool) {
        self.executors.retain(|(key, _)| fits(key));
    }

    /// Shuts down all executors, and returns their errors.
    pub fn shut_down(&mut self) -> impl Iterator<Item = Error> {
        let timeout = self.settings.shutdown_timeout;
        self.executors.drain(..).filter_map(move |(_, executor)| executor.shutdown(timeout).err())
    }
}
