//! Files that several steps share. A step whose file did not change got another name of the older file.

use super::Catalog;
use crate::error::{ErrorKind, Result};
use crate::storage::Inode;
use std::collections::HashMap;
use std::path::PathBuf;

/// A step that shares a file with another step, so that both have the same bytes on the medium.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sharing {
    /// The step in its name.
    pub step: u64,
    /// The name of its directory.
    pub name: String,
    /// Its path.
    pub path: PathBuf,
    /// The name of the file in this step.
    pub file: String,
}

impl Catalog {
    /// Returns the other steps that share the file `file` of the step in the directory `name`, oldest first.
    /// Damage of the file is damage of all of these steps. Steps that cannot be opened are included. Clones
    /// are not found, because they share blocks and not the file.
    ///
    /// # Errors
    /// `NotFound` when there is no such directory; an I/O error.
    pub fn sharing(&self, name: &str, file: &str) -> Result<Vec<Sharing>> {
        let shared = self.storage.open(name)?.inode(file)?.filter(|inode| inode.names > 1);
        let Some(shared) = shared else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for (step, other) in self.names()? {
            if other == name {
                continue;
            }
            let opened = match self.storage.open(&other) {
                // Another process removed it.
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                opened => opened?,
            };
            for file in opened.list()? {
                if opened.inode(&file)?.is_some_and(|inode| inode.identity == shared.identity) {
                    found.push(Sharing { step, name: other.clone(), path: self.storage.describe(&other), file });
                }
            }
        }
        Ok(found)
    }

    /// The files of the step `name` that have several names. Empty if that is unknown.
    pub(super) fn shared_files(&self, name: &str) -> Vec<Inode> {
        if self.storage.directory().is_none() {
            return Vec::new();
        }
        let files = || -> Result<Vec<Inode>> {
            let opened = self.storage.open(name)?;
            let inodes = opened.list()?.into_iter().filter_map(|file| opened.inode(&file).transpose());
            Ok(inodes.collect::<Result<Vec<_>>>()?.into_iter().filter(|inode| inode.names > 1).collect())
        };
        files().unwrap_or_default()
    }
}

/// The files with several names in the steps that a prune removes. For each identity: how many names the file
/// had, and how many of them the prune removes.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedFiles(HashMap<(u64, u64), (u64, u64)>);

impl SharedFiles {
    /// Counts the names of one step, and returns the bytes of its files that stay under other names.
    pub(super) fn staying(&mut self, files: &[Inode]) -> u64 {
        let mut staying = 0;
        for inode in files {
            let (names, gone) = self.0.entry(inode.identity).or_insert((inode.names, 0));
            *gone += 1;
            staying += if *gone < *names { inode.len } else { 0 };
        }
        staying
    }
}
