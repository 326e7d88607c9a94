//! A published step, as a reader has it open.

use super::reading::{ObjectReading, WhyMissing, access};
use super::session::Inner;
use super::state::{Entry, Whole};
use super::sweep::UPLOADS;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::MANIFEST;
use crate::id::Attempt;
use crate::storage::name::check_file;
use crate::storage::{Access, FileReading, Reading};
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// How often a manifest with a wrong digest is fetched, because its bytes may have been damaged in transit.
const FETCHES: usize = 2;

/// A published step in an object store.
#[derive(Debug)]
pub(super) struct ObjectStep {
    inner: Arc<Inner>,
    entry: Entry,
}

impl ObjectStep {
    pub fn new(inner: &Arc<Inner>, entry: Entry) -> Self {
        Self { inner: inner.clone(), entry }
    }

    fn key(&self, file: &str) -> String {
        format!("{}/{file}", self.entry.directory())
    }

    /// Reads the root to find why an object of this step is missing.
    fn why_missing(&self) -> WhyMissing {
        let (inner, directory) = (self.inner.clone(), self.entry.directory());
        Arc::new(move |key| missing(&inner, &directory, key))
    }

    /// Reads the manifest, whose length and digest are in the root.
    fn manifest(&self, whole: Whole) -> Result<Manifest> {
        let (client, key) = (&self.inner.client, self.key(MANIFEST));
        for _ in 0..FETCHES {
            let found = client.get("read the manifest", &key, whole.length, client.deadline_for(whole.length))?;
            let (bytes, meta) = found.ok_or_else(|| gone(missing(&self.inner, &self.entry.directory(), &key)))?;
            if bytes.len() as u64 == whole.length && Digest::of(&bytes) == whole.digest {
                return Ok(Manifest { path: self.inner.path(&key), bytes, modified: meta.last_modified.into() });
            }
        }
        let why = "the manifest is not the one that the root names: its digest does not fit";
        Err(Error::corrupt(why).with_path(self.inner.path(&key)))
    }
}

/// Returns the error that says why an object of the step in `directory` is missing.
fn missing(inner: &Inner, directory: &str, key: &str) -> Error {
    let error = match inner.root.read() {
        Ok(Some(root)) if root.names(directory) => Error::corrupt("a file of the checkpoint is missing"),
        Ok(_) => Error::new(ErrorKind::NotFound, "the step was pruned or replaced while it was open"),
        Err(error) => error,
    };
    error.with_path(inner.path(key))
}

/// Turns `Corrupt` into `NotFound` for a file that is missing when it is opened. The caller decides what that
/// means.
fn gone(error: Error) -> Error {
    if error.kind() == ErrorKind::Corrupt { error.with_kind(ErrorKind::NotFound) } else { error }
}

impl Reading for ObjectStep {
    fn open(&self, file: &str) -> Result<Arc<dyn FileReading>> {
        check_file(file)?;
        if let (MANIFEST, Some(whole)) = (file, self.entry.manifest) {
            return Ok(Arc::new(self.manifest(whole)?));
        }
        let key = self.key(file);
        match ObjectReading::open(&self.inner.client, key.clone(), self.why_missing())? {
            Some(file) => Ok(Arc::new(file)),
            None => Err(gone(missing(&self.inner, &self.entry.directory(), &key))),
        }
    }

    fn access(&self) -> Access {
        access()
    }

    fn identity(&self) -> Option<(u64, u64)> {
        Some(identity(self.entry.attempt))
    }

    fn is_recorded(&self) -> bool {
        self.entry.manifest.is_some()
    }

    fn list(&self) -> Result<Vec<String>> {
        let (client, directory) = (&self.inner.client, self.entry.directory());
        let prefix = client.key(&directory);
        let found = client.list("list the files of a step", &directory, client.deadline())?;
        let file = |object: &object_store::ObjectMeta| {
            let mut parts = object.location.prefix_match(&prefix)?;
            let file = parts.next()?.as_ref().to_owned();
            (parts.next().is_none() && file != UPLOADS).then_some(file)
        };
        Ok(found.iter().filter_map(file).collect())
    }
}

/// The identity of a step, made from its attempt.
pub(super) fn identity(attempt: Attempt) -> (u64, u64) {
    let bits = attempt.to_u128();
    ((bits >> 64) as u64, bits as u64)
}

/// A manifest in memory.
struct Manifest {
    path: String,
    bytes: Bytes,
    modified: SystemTime,
}

impl fmt::Debug for Manifest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.path)
    }
}

impl FileReading for Manifest {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn modified(&self) -> Option<SystemTime> {
        Some(self.modified)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.bytes.get(start..start.saturating_add(buffer.len())).ok_or_else(|| {
            let (wanted, len) = (buffer.len(), self.bytes.len());
            let what = format!("a file ends too early offset={offset} wanted={wanted} len={len}");
            Error::corrupt(what).with_path(&self.path)
        })?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}
