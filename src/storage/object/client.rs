//! Requests to one store. Each request has a deadline, and its retries are signed again.
//!
//! The crate repeats a request by itself only for seconds, because its repeats carry the first signature. For
//! longer failures this module repeats the request, after a pause that grows and varies, while the *budget*
//! of the store lasts. So callers do not send repeats at full rate to a store that refuses everything.
//! **Conditions.** This module never repeats a conditional put, because its answer alone decides nothing; see
//! `root`.

use super::errors;
use super::runtime;
use crate::completion::deadline_after;
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Mutex, lock};
use bytes::Bytes;
use futures_util::{StreamExt, stream};
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use object_store::{GetOptions, ObjectMeta, ObjectStore, PutMode, PutOptions, PutPayload, UpdateVersion};
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The operations that a store must support.
pub(super) trait Store: ObjectStore + MultipartStore {}

impl<T: ObjectStore + MultipartStore> Store for T {}

/// The total time for which a small request is tried.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);

/// How long one try of a small request may take.
const TRY: Duration = Duration::from_secs(15);

/// How long one listing may take, as long as the store sends the next page in the time of one try.
const LISTING: Duration = Duration::from_secs(3600);

/// Most keys that are deleted by one request.
const KEYS: usize = 1000;

/// The lowest rate at which bytes are expected to be transferred, in bytes per second. It sets how much more
/// time a try of a large request gets.
const LEAST_RATE: u64 = 1 << 20;

/// The first pause before a repeat; each later one is twice as long, up to the longest.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
pub(super) const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The maximum number of repeats in the budget, and how many are added each second. Without budget a repeat
/// waits for the longest pause.
const BUDGET: f64 = 100.0;
const REFILL: f64 = 5.0;

/// One store and a prefix in it. Clones use the same store and share its budget.
#[derive(Clone)]
pub(super) struct Client {
    store: Arc<dyn Store>,
    prefix: Key,
    /// The root as a URL, for messages.
    name: Arc<str>,
    patience: Duration,
    budget: Arc<Budget>,
    probed: Arc<AtomicBool>,
    /// A request has succeeded.
    worked: Arc<AtomicBool>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// How a put is conditioned.
#[derive(Clone, Debug)]
pub(super) enum Condition {
    /// The object must not exist.
    Absent,
    /// The object must be this version.
    Is(UpdateVersion),
}

impl Client {
    pub fn new(store: Arc<dyn Store>, prefix: Key, name: &str) -> Self {
        let (name, probed, worked) = (name.trim_end_matches('/').into(), Arc::default(), Arc::default());
        Self { store, prefix, name, patience: PATIENCE, budget: Arc::default(), probed, worked }
    }

    /// True if a probe has shown that the store respects conditions.
    pub fn is_probed(&self) -> bool {
        self.probed.load(Ordering::Relaxed)
    }

    pub fn set_probed(&self) {
        self.probed.store(true, Ordering::Relaxed);
    }

    /// The same store with another prefix.
    pub fn at(&self, prefix: Key, name: &str) -> Self {
        Self { prefix, name: name.trim_end_matches('/').into(), ..self.clone() }
    }

    /// Sets the total time for which a small request is tried: a minute.
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// The total time for which a small request is tried.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// The root as a URL.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The store itself, for requests that have no helper here.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// When a small request that starts now is given up.
    pub fn deadline(&self) -> Instant {
        deadline_after(self.patience)
    }

    /// When a request of `bytes` that starts now is given up.
    pub fn deadline_for(&self, bytes: u64) -> Instant {
        deadline_after(self.patience.saturating_add(Self::time_for(bytes)))
    }

    /// How much longer a request of `bytes` may take than a small one.
    pub fn time_for(bytes: u64) -> Duration {
        Duration::from_secs(bytes / LEAST_RATE)
    }

    /// The key `name` below the prefix, in the form that the store uses.
    pub fn key(&self, name: &str) -> Key {
        let parts = name.split('/').filter(|part| !part.is_empty());
        parts.fold(self.prefix.clone(), |key, part| key.join(part))
    }

    /// Runs `request` until it succeeds, fails permanently or the deadline passes, and blocks this thread. In
    /// an error, `what` says what could not be done to `key`. The request must be idempotent.
    pub fn call<T, R>(
        &self,
        what: &'static str,
        key: &str,
        deadline: Instant,
        request: impl Fn(Arc<dyn Store>, Key) -> R + Send + Sync + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
        R: Future<Output = object_store::Result<T>> + Send + 'static,
    {
        self.call_for(what, key, deadline, TRY, request)
    }

    /// As [`Client::call`]; one try may take `each`.
    pub fn call_for<T, R>(
        &self,
        what: &'static str,
        key: &str,
        deadline: Instant,
        each: Duration,
        request: impl Fn(Arc<dyn Store>, Key) -> R + Send + Sync + 'static,
    ) -> Result<T>
    where
        T: Send + 'static,
        R: Future<Output = object_store::Result<T>> + Send + 'static,
    {
        let (client, name) = (self.clone(), key.to_owned());
        let work = async move { client.repeated(what, &name, deadline, each, request).await };
        runtime::run(deadline, work)?.unwrap_or_else(|| Err(self.late(what, key)))
    }

    /// As [`Client::call`], for code that runs on the runtime; one try may take `each`.
    pub async fn repeated<T, R>(
        &self,
        what: &'static str,
        key: &str,
        deadline: Instant,
        each: Duration,
        request: impl Fn(Arc<dyn Store>, Key) -> R + Send + Sync,
    ) -> Result<T>
    where
        R: Future<Output = object_store::Result<T>> + Send,
    {
        let mut pause = FIRST_PAUSE;
        loop {
            let answer = tokio::time::timeout(each, request(self.store.clone(), self.key(key))).await;
            let error = match answer {
                Ok(Ok(value)) => {
                    self.worked.store(true, Ordering::Relaxed);
                    return Ok(value);
                }
                Ok(Err(answer)) => {
                    let error = self.error(what, key, &answer);
                    if !self.meaning(&answer).again {
                        return Err(error);
                    }
                    error
                }
                Err(_) => self.late(what, key),
            };
            let longest = if self.budget.take() { pause } else { LONGEST_PAUSE };
            let varied = varied(longest);
            if Instant::now() + varied >= deadline {
                return Err(error);
            }
            tracing::debug!(error = format_args!("{error:#}"), "a request to an object store is repeated");
            tokio::time::sleep(varied).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// The whole object at `key`, with its metadata. None if there is no such object.
    ///
    /// # Errors
    /// `Corrupt` if the object is longer than `limit` bytes; errors of the store.
    pub fn get(
        &self,
        what: &'static str,
        key: &str,
        limit: u64,
        deadline: Instant,
    ) -> Result<Option<(Bytes, ObjectMeta)>> {
        match self.get_unless(what, key, limit, None, deadline)? {
            Fetched::Whole(bytes, meta) => Ok(Some((bytes, meta))),
            Fetched::Absent | Fetched::Same => Ok(None),
        }
    }

    /// As `get`, but does not fetch the object if it still has the ETag `known`.
    pub fn get_unless(
        &self,
        what: &'static str,
        key: &str,
        limit: u64,
        known: Option<String>,
        deadline: Instant,
    ) -> Result<Fetched> {
        let whole = move |store: Arc<dyn Store>, key| {
            let options = GetOptions { if_none_match: known.clone(), ..GetOptions::default() };
            async move {
                let answer = match tokio::time::timeout(TRY, store.get_opts(&key, options)).await {
                    Ok(Err(answer)) if errors::is_missing(&answer) => return Ok(Ok(Fetched::Absent)),
                    Ok(Err(object_store::Error::NotModified { .. })) => return Ok(Ok(Fetched::Same)),
                    answer => answer.map_err(|_| errors::late())??,
                };
                let meta = answer.meta.clone();
                if meta.size > limit {
                    return Ok(Err(meta.size));
                }
                let bytes = tokio::time::timeout(TRY.saturating_add(Self::time_for(meta.size)), answer.bytes()).await;
                Ok(Ok(Fetched::Whole(bytes.map_err(|_| errors::late())??, meta)))
            }
        };
        let fetched = self.call_for(what, key, deadline, self.patience.saturating_add(Self::time_for(limit)), whole)?;
        fetched.map_err(|length| {
            let why = format!("an object is longer than it can be length={length} limit={limit}");
            Error::corrupt(why).with_path(format!("{}/{key}", self.name))
        })
    }

    /// Puts a small object under a key that no other content ever has.
    pub fn put(&self, what: &'static str, key: &str, bytes: Bytes, deadline: Instant) -> Result<()> {
        let (payload, each) =
            (PutPayload::from_bytes(bytes.clone()), TRY.saturating_add(Self::time_for(bytes.len() as u64)));
        self.call_for(what, key, deadline, each, move |store: Arc<dyn Store>, key| {
            let payload = payload.clone();
            async move { store.put_opts(&key, payload, PutOptions::default()).await.map(drop) }
        })
    }

    /// Sends one conditional put, once, and returns the version that it made, if the store tells it. An error
    /// alone does not tell the outcome: the put may have arrived, or may still arrive.
    pub fn put_if(
        &self,
        key: &str,
        bytes: Bytes,
        condition: Condition,
        deadline: Instant,
    ) -> Result<Option<UpdateVersion>, Answered> {
        let (store, at, payload) = (self.store.clone(), self.key(key), PutPayload::from_bytes(bytes));
        let mode = match condition {
            Condition::Absent => PutMode::Create,
            Condition::Is(version) => PutMode::Update(version),
        };
        let limit = deadline.min(deadline_after(TRY));
        let sent = runtime::run(limit, async move { store.put_opts(&at, payload, mode.into()).await });
        let unknown = |error| Answered { error, refused: false, certain: false, unsent: false };
        match sent {
            Ok(Some(Ok(put))) => {
                self.worked.store(true, Ordering::Relaxed);
                let version = UpdateVersion { e_tag: put.e_tag, version: put.version };
                Ok(Some(version).filter(|version| version.e_tag.is_some() || version.version.is_some()))
            }
            Ok(Some(Err(answer))) => Err(Answered {
                error: self.error("change", key, &answer),
                refused: errors::is_refused(&answer),
                certain: errors::is_certain(&answer, self.has_worked()),
                unsent: false,
            }),
            Ok(None) => Err(unknown(self.late("change", key))),
            Err(error) if error.kind() == ErrorKind::Internal => Err(unknown(error)),
            Err(error) => Err(Answered { unsent: true, ..unknown(error) }),
        }
    }

    /// Deletes objects. Missing objects count as deleted. The deadline applies to the first thousand objects;
    /// more objects get more time.
    pub fn delete(&self, what: &'static str, keys: Vec<Key>, deadline: Instant) -> Result<()> {
        for (index, keys) in keys.chunks(KEYS).enumerate() {
            let deadline = if index == 0 { deadline } else { self.deadline() };
            let keys = keys.to_vec();
            self.call_for(what, "", deadline, self.patience, move |store: Arc<dyn Store>, _| {
                let keys = keys.clone();
                async move {
                    let mut deleted = store.delete_stream(stream::iter(keys.into_iter().map(Ok)).boxed());
                    while let Some(answer) = in_time(deleted.next()).await? {
                        match answer {
                            Err(answer) if errors::is_missing(&answer) => {}
                            answer => drop(answer?),
                        }
                    }
                    Ok(())
                }
            })?;
        }
        Ok(())
    }

    /// All objects below `key`. A listing that fails is started again until `deadline`. The deadline does not
    /// end a listing that makes progress.
    pub fn list(&self, what: &'static str, key: &str, deadline: Instant) -> Result<Vec<ObjectMeta>> {
        let (client, name) = (self.clone(), key.to_owned());
        let work = async move {
            let list = async |store: Arc<dyn Store>, key: Key| {
                let (mut listed, mut all) = (store.list(Some(&key)), Vec::new());
                while let Some(object) = in_time(listed.next()).await? {
                    all.push(object?);
                }
                Ok(all)
            };
            client.repeated(what, &name, deadline, LISTING, list).await
        };
        let end = deadline.checked_add(LISTING).unwrap_or(deadline);
        runtime::run(end, work)?.unwrap_or_else(|| Err(self.late(what, key)))
    }

    /// The meaning of `answer`, given whether a request of this client has succeeded before.
    pub fn meaning(&self, answer: &object_store::Error) -> errors::Meaning {
        errors::meaning(answer, self.has_worked())
    }

    fn has_worked(&self) -> bool {
        self.worked.load(Ordering::Relaxed)
    }

    /// The error for `what` on `key`, which failed with `answer`.
    pub fn error(&self, what: &str, key: &str, answer: &object_store::Error) -> Error {
        errors::error(what, &self.name, key, answer, self.has_worked())
    }

    /// The error for `what` on `key`, which had no answer in time.
    pub fn late(&self, what: &str, key: &str) -> Error {
        let why = format!("cannot {what}: the store did not answer in time: check the network and the store");
        Error::new(ErrorKind::Unavailable, why).with_path(format!("{}/{key}", self.name))
    }
}

/// The next item that a store sends, unless it takes longer than one try.
async fn in_time<T>(next: impl Future<Output = T>) -> object_store::Result<T> {
    tokio::time::timeout(TRY, next).await.map_err(|_| errors::late())
}

/// The result of a get.
pub(super) enum Fetched {
    Absent,
    /// The object still has the known ETag.
    Same,
    Whole(Bytes, ObjectMeta),
}

/// Why a conditional put did not succeed, as far as the store tells.
#[derive(Debug)]
pub(super) struct Answered {
    pub error: Error,
    /// The store refused the condition, or says so.
    pub refused: bool,
    /// The store received exactly one request and did not carry it out, for a reason other than its
    /// condition.
    pub certain: bool,
    /// No request left this process.
    pub unsent: bool,
}

/// A limit on repeats, shared by all requests to a store.
struct Budget(Mutex<(f64, Instant)>);

impl Default for Budget {
    fn default() -> Self {
        Self(Mutex::new((BUDGET, Instant::now())))
    }
}

impl Budget {
    /// Adds the repeats that are due since the last call, and takes one. False if there is none.
    fn take(&self) -> bool {
        let (left, last) = &mut *lock(&self.0);
        let now = Instant::now();
        *left = (*left + now.duration_since(*last).as_secs_f64() * REFILL).min(BUDGET);
        *last = now;
        let enough = *left >= 1.0;
        if enough {
            *left -= 1.0;
        }
        enough
    }
}

/// A pause of half to three halves of `pause`, so that requests that failed together are not repeated
/// together.
pub(super) fn varied(pause: Duration) -> Duration {
    let fraction = f64::from(uuid::Uuid::new_v4().as_fields().0) / f64::from(u32::MAX);
    pause.mul_f64(0.5 + fraction)
}
