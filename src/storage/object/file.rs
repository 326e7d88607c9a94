//! Writes a file of an attempt: an upload in parts, sent from the slabs that hold the bytes.
//!
//! **Protocol.** A file of one part is put whole. For a longer file, the first complete part makes the upload
//! and a record of it (`<attempt>/uploads/<file>`), from which a sweep can abort the upload. The writer that
//! completes a part sends it. `seal` completes the upload and deletes the record. **Completion.** The writer
//! blocks until the store has the part, so as many parts are in flight as there are writers. If the
//! completion of an upload was not answered, the object at its key decides. No other file ever has this key.
//! **Memory.** A slab returns to the arena when all parts with bytes in it are stored or given up, and no
//! connection holds these bytes (`uploads`). **Failure.** A part is tried until the patience of the store or
//! the save ends; then the file is lost.

use super::client::Client;
use super::parts::{Limits, Parts, Ready};
use super::runtime;
use crate::completion::deadline_after;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::Slab;
use crate::settings::IoMode;
use crate::storage::{FileWriting, Writers};
use crate::sync::{Mutex, lock};
use bytes::Bytes;
use object_store::multipart::PartId;
use object_store::{GetOptions, MultipartId, ObjectMeta, PutPayload};
use std::fmt;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

/// Shorter requests are sent from a copy of their bytes.
pub(super) const LONG: usize = 64 << 10;

/// How long one try of a part may take, not counting the time for its bytes.
const TRY: Duration = Duration::from_secs(15);

/// How long a store may take to put the parts of an upload together.
const COMPLETION: Duration = Duration::from_secs(300);

/// How long `seal` tries to delete the record of a complete upload. After that a sweep deletes it.
const RECORD: Duration = Duration::from_secs(5);

/// The link between an attempt and its files.
pub(super) trait Counted: Send + Sync {
    /// A file is sealed.
    fn sealed(&self);
    /// A file is lost, and the attempt with it.
    fn lost(&self);
    /// How the executor writes. None if the storage was not told.
    fn writers(&self) -> Option<Writers> {
        None
    }
    /// When the save fails if it has not ended. None if there is no such limit.
    fn expires(&self) -> Option<Instant> {
        None
    }
}

/// A file of an attempt.
pub(super) struct ObjectFile {
    client: Client,
    key: String,
    len: u64,
    part: u64,
    parts: Mutex<Parts>,
    /// The upload of a file of several parts, once the first part is complete.
    upload: OnceLock<Result<MultipartId>>,
    attempt: Arc<dyn Counted>,
}

impl fmt::Debug for ObjectFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client.name(), self.key)
    }
}

impl ObjectFile {
    /// A new file of `len` bytes at `key`, which no other file ever has.
    ///
    /// # Errors
    /// `Invalid` when the file is too long for a store, or the arena is too small for its parts.
    pub fn create(client: &Client, key: String, len: u64, attempt: Arc<dyn Counted>) -> Result<Self> {
        Self::within(Limits::STORES, client, key, len, attempt)
    }

    pub(super) fn within(
        limits: Limits,
        client: &Client,
        key: String,
        len: u64,
        attempt: Arc<dyn Counted>,
    ) -> Result<Self> {
        let path = || format!("{}/{key}", client.name());
        let part = limits.part(len).map_err(|error| error.with_path(path()))?;
        if let Some(writers) = attempt.writers() {
            fits(writers, part, len).map_err(|error| error.with_path(path()))?;
        }
        let parts = Mutex::new(Parts::new(len, part));
        Ok(Self { client: client.clone(), key, len, part, parts, upload: OnceLock::new(), attempt })
    }

    fn located(&self, error: Error) -> Error {
        error.with_path(format!("{}/{}", self.client.name(), self.key))
    }

    /// The key of the record of the upload.
    fn record(&self) -> String {
        let (attempt, file) = self.key.rsplit_once('/').unwrap_or(("", &self.key));
        format!("{attempt}/uploads/{file}")
    }

    /// Marks the file as lost if `done` is an error.
    fn lost_by<T>(&self, done: Result<T>) -> Result<T> {
        done.map_err(|error| {
            let error = self.located(error);
            if lock(&self.parts).lose(&error) {
                self.attempt.lost();
            }
            error
        })
    }

    /// The deadline of requests that need `time` in addition to the patience of the client.
    fn deadline(&self, time: Duration) -> Instant {
        let deadline = self.client.deadline().checked_add(time).unwrap_or_else(|| self.client.deadline());
        self.attempt.expires().map_or(deadline, |expires| deadline.min(expires))
    }

    /// Runs requests and blocks this thread until they end.
    fn run<T: Send + 'static>(
        &self,
        what: &'static str,
        deadline: Instant,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let done = runtime::run(deadline, work)?.unwrap_or_else(|| Err(self.client.late(what, &self.key)));
        done.map_err(|error| expired(error, self.attempt.expires()))
    }

    fn add(&self, offset: u64, bytes: Bytes) -> Result<()> {
        // In a statement of its own, because `lost_by` locks the parts, too.
        let added = lock(&self.parts).add(offset, &bytes);
        let ready = self.lost_by(added)?;
        // From here on only the parts hold bytes of the slab.
        drop(bytes);
        for Ready { index, payload } in ready {
            let id = self.lost_by(self.send(index, payload))?;
            lock(&self.parts).stored(index, id);
        }
        Ok(())
    }

    /// Stores a part, and returns the store's name for it. None for a file of one part.
    fn send(&self, index: usize, payload: PutPayload) -> Result<Option<PartId>> {
        let bytes = payload.content_length();
        // Short payloads are copied, so that the connection never holds a slab for them.
        let payload = if bytes < LONG { PutPayload::from_bytes(owned(&payload)) } else { payload };
        let several = self.len > self.part;
        let id = if several { Some(self.upload()?) } else { None };
        let each = TRY + Client::time_for(bytes as u64);
        // Long enough that a part survives an outage of the store of a minute.
        let deadline = self.deadline(each.saturating_mul(4));
        let (client, key) = (self.client.clone(), self.key.clone());
        self.run("write the file", deadline, async move {
            let put = move |store: Arc<dyn super::client::Store>, key| {
                let (id, payload) = (id.clone(), payload.clone());
                async move {
                    match id {
                        Some(id) => store.put_part(&key, &id, index, payload).await.map(Some),
                        None => store.put_opts(&key, payload, Default::default()).await.map(|_| None),
                    }
                }
            };
            client.repeated("write the file", &key, deadline, each, put).await
        })
    }

    /// Returns the upload. The first call makes the upload and its record.
    fn upload(&self) -> Result<MultipartId> {
        let make = || {
            let (client, key, record) = (self.client.clone(), self.key.clone(), self.record());
            let deadline = self.deadline(Duration::ZERO);
            self.run("begin an upload", deadline, async move {
                let create = async |store: Arc<dyn super::client::Store>, key| store.create_multipart(&key).await;
                let id = client.repeated("begin an upload", &key, deadline, TRY, create).await?;
                let bytes = Bytes::from(id.clone());
                let put = move |store: Arc<dyn super::client::Store>, key| {
                    let payload = PutPayload::from_bytes(bytes.clone());
                    async move { store.put_opts(&key, payload, Default::default()).await }
                };
                client.repeated("record an upload", &record, deadline, TRY, put).await?;
                Ok(id)
            })
        };
        self.upload.get_or_init(make).clone()
    }

    /// Completes the upload.
    fn complete(&self, id: MultipartId, parts: Vec<PartId>) -> Result<()> {
        let deadline = self.deadline(COMPLETION);
        let (client, key, len) = (self.client.clone(), self.key.clone(), self.len);
        let asking = client.clone();
        self.run("complete the upload", deadline, async move {
            let complete = move |store: Arc<dyn super::client::Store>, key| {
                let (asking, id, parts) = (asking.clone(), id.clone(), parts.clone());
                async move {
                    let count = parts.len();
                    let Err(answer) = store.complete_multipart(&key, &id, parts).await else { return Ok(()) };
                    // An answer other than success may be the answer to a repeat of a request that had
                    // succeeded.
                    let head = GetOptions { head: true, ..GetOptions::default() };
                    match store.get_opts(&key, head).await {
                        Ok(there) if is_upload(&there.meta, len, count) => Ok(()),
                        // Nothing is known yet, so both requests are sent again.
                        Err(unknown) if asking.meaning(&unknown).again => Err(unknown),
                        _ => Err(answer),
                    }
                }
            };
            client.repeated("complete the upload", &key, deadline, COMPLETION, complete).await
        })
    }

    fn finish(&self) -> Result<()> {
        let ids = lock(&self.parts).seal()?;
        if self.len == 0 {
            return self.send(0, PutPayload::new()).map(drop);
        }
        let Some(id) = self.upload.get() else { return Ok(()) };
        self.complete(id.clone()?, ids)?;
        let record = self.record();
        // The file is whole even if the record stays.
        let shortly = deadline_after(RECORD).min(self.client.deadline());
        let deleted = self.client.delete("delete the record", vec![self.client.key(&record)], shortly);
        if let Err(error) = deleted {
            tracing::warn!(
                error = format_args!("{error:#}"),
                record,
                "the record of a complete upload is left to a sweep"
            );
        }
        Ok(())
    }
}

/// Changes the error of a store that did not answer in time into the save's own `Deadline`, if that deadline
/// has passed.
pub(super) fn expired(error: Error, expires: Option<Instant>) -> Error {
    let passed = expires.is_some_and(|expires| Instant::now() >= expires);
    if passed && error.kind() == ErrorKind::Unavailable { error.with_kind(ErrorKind::Deadline) } else { error }
}

/// True if the object at the key of an upload is the whole file. Nothing else is ever put there.
fn is_upload(there: &ObjectMeta, len: u64, parts: usize) -> bool {
    let tag = there.e_tag.as_deref().unwrap_or_default().trim_matches('"');
    // At Amazon the ETag of an object ends with the number of its parts. At other stores it does not.
    let count = tag.rsplit_once('-').filter(|(digest, _)| digest.len() == 32).and_then(|(_, n)| n.parse().ok());
    there.size == len && count.is_none_or(|count: usize| count == parts)
}

/// A copy of the bytes.
fn owned(payload: &PutPayload) -> Bytes {
    let mut copy = Vec::with_capacity(payload.content_length());
    payload.iter().for_each(|piece| copy.extend_from_slice(piece));
    copy.into()
}

/// Refuses an arena that cannot hold the parts in flight: one part for each writer, one part that is being
/// filled, and a chunk that begins the next part.
fn fits(writers: Writers, part: u64, len: u64) -> Result<()> {
    let Writers { arena, chunk, threads } = writers;
    let parts = len.div_ceil(part).min(threads as u64 + 1);
    // The ends of parts and chunks differ, so a part may lie in one slab more than it fills.
    let shared = if part.is_multiple_of(chunk) || len <= part { 0 } else { chunk };
    let slabs = part.min(len).next_multiple_of(chunk).saturating_add(shared);
    let needed = parts.saturating_mul(slabs).saturating_add(if parts > 1 { chunk } else { 0 });
    if needed <= arena {
        return Ok(());
    }
    let why = "the arena cannot hold the parts of a file that are in flight: raise `arena`, lower `writers`, or save \
        with more `files`";
    Err(Error::invalid(format!("{why} arena={arena} needed={needed} part={part} writers={threads} bytes={len}")))
}

impl FileWriting for ObjectFile {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.add(offset, Bytes::copy_from_slice(bytes))
    }

    fn write_slab(&self, offset: u64, slab: Slab) -> Result<()> {
        self.add(offset, Bytes::from_owner(slab))
    }

    fn seal(&self) -> Result<()> {
        self.lost_by(self.finish())?;
        self.attempt.sealed();
        Ok(())
    }

    fn mode(&self) -> IoMode {
        IoMode::Buffered
    }
}
