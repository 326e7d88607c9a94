//! Executors that stay open, for faces that are told a directory with each call.

use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::settings::Settings;
use std::path::Path;

/// The executors used last, each under a key. Each has an arena and threads of its own, so there are few.
#[derive(Debug)]
pub(crate) struct Open<K> {
    most: usize,
    settings: Settings,
    /// The one used last is first.
    executors: Vec<(K, CheckpointExecutor)>,
}

impl<K: PartialEq> Open<K> {
    /// At most `most` executors with these settings.
    pub fn new(most: usize, settings: Settings) -> Self {
        Self { most, settings, executors: Vec::new() }
    }

    /// The executor of `key`, over `root`. Where there are too many, the one that was not used for longest is dropped, and waits for
    /// its saves.
    ///
    /// # Errors
    /// As [`Builder::build`](crate::Builder::build).
    pub fn executor(&mut self, key: K, root: impl AsRef<Path>) -> Result<&CheckpointExecutor> {
        let executor = match self.executors.iter().position(|(open, _)| *open == key) {
            Some(at) => self.executors.remove(at).1,
            None => {
                self.executors.truncate(self.most - 1);
                CheckpointExecutor::builder(root.as_ref()).settings(self.settings.clone()).build()?
            }
        };
        self.executors.insert(0, (key, executor));
        self.last().map(|(_, executor)| executor).ok_or_else(|| Error::internal("an executor is gone"))
    }

    /// The one used last.
    pub fn last(&self) -> Option<&(K, CheckpointExecutor)> {
        self.executors.first()
    }

    /// Closes those whose key does not fit.
    pub fn retain(&mut self, fits: impl Fn(&K) -> bool) {
        self.executors.retain(|(key, _)| fits(key));
    }

    /// Shuts all of them down, and returns the errors.
    pub fn shut_down(&mut self) -> impl Iterator<Item = Error> {
        let timeout = self.settings.shutdown_timeout;
        self.executors.drain(..).filter_map(move |(_, executor)| executor.shutdown(timeout).err())
    }
}
