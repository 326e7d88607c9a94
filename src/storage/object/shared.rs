//! Sessions of several ranks on a store, and the attempts that they write together.
//!
//! A session is recorded by a change of the root object. Its record and the notes of its ranks are objects
//! under `.ranks/<generation>/`.

use super::attempt::ObjectAttempt;
use super::session::{Inner, owner};
use crate::error::{Error, ErrorKind, Result};
use crate::storage::name::check_file;
use crate::storage::shared::{SessionRecord, Shared, SharedAttempt, SharedWriting};
use crate::sync::{Mutex, lock};
use bytes::Bytes;
use object_store::path::Path as Key;
use std::sync::Arc;

/// The prefix of all notes that ranks leave for each other. No step has such a name.
pub(super) const RANKS: &str = ".ranks";

/// The note with the record of a session.
const RECORD: &str = "session.json";

/// Maximum length of the record of a session: 100,000 nonces.
const MAX_RECORD: u64 = 4 << 20;

/// The interface to sessions in an object store; see the module.
#[derive(Debug)]
pub(super) struct ObjectShared {
    inner: Arc<Inner>,
    /// The last record of a session that was read, with its generation. A record never changes.
    read: Mutex<Option<(u64, SessionRecord)>>,
}

impl ObjectShared {
    pub fn new(inner: &Arc<Inner>) -> Self {
        Self { inner: inner.clone(), read: Mutex::new(None) }
    }

    fn key(generation: u64, name: &str) -> Result<String> {
        check_file(name).map_err(|error| error.with_kind(ErrorKind::Invalid))?;
        Ok(format!("{RANKS}/{generation}/{name}"))
    }

    /// The record of a session. None if there is none, or if it cannot be parsed.
    ///
    /// # Errors
    /// Why the store does not tell.
    fn record(&self, generation: u64) -> Result<Option<SessionRecord>> {
        let mut read = lock(&self.read);
        if let Some((known, record)) = &*read
            && *known == generation
        {
            return Ok(Some(record.clone()));
        }
        let bytes = self.note(generation, RECORD, MAX_RECORD)?;
        let record = bytes.and_then(|bytes| serde_json::from_slice::<SessionRecord>(&bytes).ok());
        Ok(record.map(|record| read.insert((generation, record)).1.clone()))
    }
}

impl Shared for ObjectShared {
    fn open_session(&self, record: &SessionRecord) -> Result<u64> {
        let mut owner = owner(record.session, record.token.clone());
        (owner.host, owner.pid) = (record.host.clone(), record.pid);
        let generation = self.inner.take_over(owner)?;
        let bytes = serde_json::to_vec(record)
            .map_err(|error| Error::internal("cannot write the record of a session").with_source(error))?;
        self.put_note(generation, RECORD, &bytes)?;
        Ok(generation)
    }

    fn newest(&self) -> Result<Option<(u64, Option<SessionRecord>)>> {
        let Some(root) = self.inner.root.read()? else { return Ok(None) };
        if root.generation == 0 {
            return Ok(None);
        }
        let of_root = || {
            let (session, token, host, pid) =
                (root.session.id, root.session.run.clone(), &root.session.host, root.session.pid);
            SessionRecord { session, token, host: host.clone(), pid, nonces: Vec::new() }
        };
        Ok(Some((root.generation, Some(self.record(root.generation)?.unwrap_or_else(of_root)))))
    }

    /// Deletes the notes of older sessions. The change of the root has already made it impossible to publish
    /// their attempts.
    fn take_over(&self, generation: u64) -> Result<()> {
        let client = &self.inner.client;
        let prefix = client.key(RANKS);
        let old = |key: &Key| {
            let of = key.prefix_match(&prefix)?.next()?.as_ref().parse::<u64>().ok()?;
            (of < generation).then(|| key.clone())
        };
        let cleared = client.list("list the notes of sessions", RANKS, client.deadline()).and_then(|notes| {
            let notes = notes.iter().filter_map(|note| old(&note.location)).collect();
            client.delete("delete the notes of older sessions", notes, client.deadline())
        });
        if let Err(error) = cleared {
            tracing::debug!(error = format_args!("{error:#}"), "notes of an older session are left");
        }
        Ok(())
    }

    fn begin(&self, attempt: SharedAttempt<'_>, overwrite: bool) -> Result<Arc<dyn SharedWriting>> {
        let SharedAttempt { name, attempt, generation } = attempt;
        Ok(ObjectAttempt::begin(&self.inner, name, attempt, generation, overwrite)?)
    }

    fn join(&self, attempt: SharedAttempt<'_>) -> Result<Arc<dyn SharedWriting>> {
        let SharedAttempt { name, attempt, generation } = attempt;
        Ok(ObjectAttempt::join(&self.inner, name, attempt, generation)?)
    }

    fn put_note(&self, generation: u64, name: &str, bytes: &[u8]) -> Result<()> {
        let (client, key) = (&self.inner.client, Self::key(generation, name)?);
        client.put("write a note", &key, Bytes::copy_from_slice(bytes), client.deadline_for(bytes.len() as u64))
    }

    fn note(&self, generation: u64, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
        let (client, key) = (&self.inner.client, Self::key(generation, name)?);
        let found = client.get("read a note", &key, limit, client.deadline_for(limit))?;
        Ok(found.map(|(bytes, _)| bytes.to_vec()))
    }

    fn delete_note(&self, generation: u64, name: &str) -> Result<()> {
        let (client, key) = (&self.inner.client, Self::key(generation, name)?);
        client.delete("delete a note", vec![client.key(&key)], client.deadline())
    }
}
