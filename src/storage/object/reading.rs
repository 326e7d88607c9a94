//! Reads the files of a step: ranges of an object, copied to their place as they arrive.
//!
//! **Protocol.** The thread that reads polls the body itself and copies each frame to its place, so a dropped
//! request can no longer write anywhere. A body that stalls, breaks off or is slow is dropped, and the rest
//! of the range is requested again. The second request usually reaches another server. **Completion.** `Ok`
//! when every byte has arrived. The layers above check the bytes by digests.

use super::client::Client;
use super::errors;
use super::runtime;
use crate::error::{Error, Result};
use crate::storage::{Access, FileReading};
use bytes::Bytes;
use futures_util::StreamExt;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectMeta};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};
use tokio::time::{Instant as Clock, timeout_at};

/// How the files of a store are read: in ranges of 8 MiB, 16 at once.
pub(super) fn access() -> Access {
    Access::remote(8 << 20, 16)
}

/// Bytes that are read together with the length when a file is opened: all of a manifest, or the header of a
/// table.
const HEAD: u64 = 16 << 10;

/// How long the first answer, or the next bytes of a body, may take before the rest is requested again. It
/// doubles with each request, up to the longest.
const STALL: Duration = Duration::from_secs(2);
const LONGEST_STALL: Duration = Duration::from_secs(30);

/// The pause before a request that follows an error; it doubles, up to the longest.
const PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// Reads the root to find why an object of a step is missing. The error is `NotFound` if the step was pruned
/// or replaced, else `Corrupt`.
pub(super) type WhyMissing = Arc<dyn Fn(&str) -> Error + Send + Sync>;

/// A file of a published step.
pub(super) struct ObjectReading {
    client: Client,
    key: String,
    len: u64,
    modified: Option<SystemTime>,
    /// The first bytes of the file, and how many of them were already read. A second read of them asks the
    /// store.
    head: Bytes,
    read: AtomicU64,
    why_missing: WhyMissing,
}

impl fmt::Debug for ObjectReading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client.name(), self.key)
    }
}

/// Why a request did not return all of a range.
enum Ended {
    /// The store sent nothing more in time.
    Stalled,
    Answered(object_store::Error),
    /// The store sent another range than the one requested.
    Other(String),
}

impl From<object_store::Error> for Ended {
    fn from(answer: object_store::Error) -> Self {
        Self::Answered(answer)
    }
}

impl ObjectReading {
    /// Opens the file at `key`. None if there is no such file.
    pub fn open(client: &Client, key: String, why_missing: WhyMissing) -> Result<Option<Self>> {
        let first = GetOptions { range: Some(GetRange::Bounded(0..HEAD)), ..GetOptions::default() };
        let open = move |store: Arc<dyn super::client::Store>, key: Key| {
            let first = first.clone();
            async move {
                let answer = match store.get_opts(&key, first).await {
                    Err(answer) if errors::is_missing(&answer) => return Ok(None),
                    Err(answer) => {
                        // An empty object has no first bytes.
                        let head = GetOptions { head: true, ..GetOptions::default() };
                        return match store.get_opts(&key, head).await {
                            Ok(there) if there.meta.size == 0 => Ok(Some((there.meta, Bytes::new()))),
                            _ => Err(answer),
                        };
                    }
                    Ok(answer) => answer,
                };
                let (meta, begins) = (answer.meta.clone(), answer.range.start == 0);
                let head = answer.bytes().await?;
                Ok::<_, object_store::Error>(Some((meta, if begins { head } else { Bytes::new() })))
            }
        };
        let found: Option<(ObjectMeta, Bytes)> = client.call("open the file", &key, client.deadline(), open)?;
        Ok(found.map(|(meta, head)| {
            let modified = Some(SystemTime::from(meta.last_modified));
            // A copy, because the bytes may be part of a longer buffer.
            let head = Bytes::copy_from_slice(head.get(..meta.size.min(HEAD) as usize).unwrap_or_default());
            Self { client: client.clone(), key, len: meta.size, modified, head, read: AtomicU64::new(0), why_missing }
        }))
    }

    fn located(&self, error: Error) -> Error {
        error.with_path(format!("{}/{}", self.client.name(), self.key))
    }

    /// Fills `buffer` from `offset`.
    async fn fill(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let (mut done, mut stall, mut pause) = (0, STALL, PAUSE);
        while done < buffer.len() {
            let before = done;
            let Err(ended) = self.request(offset, buffer, &mut done, stall).await else { return Ok(()) };
            let error = match ended {
                Ended::Stalled => self.client.late("read the file", &self.key),
                Ended::Answered(answer) if errors::is_missing(&answer) => return Err((self.why_missing)(&self.key)),
                Ended::Answered(answer) => {
                    let error = self.client.error("read the file", &self.key, &answer);
                    if !self.client.meaning(&answer).again {
                        return Err(error);
                    }
                    error
                }
                Ended::Other(what) => return Err(self.located(Error::corrupt(what))),
            };
            if done == before {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            stall = (stall * 2).min(LONGEST_STALL);
            let left = buffer.len() - done;
            tracing::debug!(error = format_args!("{error:#}"), left, "the rest of a range is requested anew");
        }
        Ok(())
    }

    /// Requests the rest of a range, and counts the copied bytes in `done`.
    async fn request(&self, offset: u64, buffer: &mut [u8], done: &mut usize, stall: Duration) -> Result<(), Ended> {
        let (start, end) = (offset + *done as u64, offset + buffer.len() as u64);
        // The whole body has a time limit, too, because a body of which a byte arrives now and then is as bad
        // as a stalled one.
        let latest = Clock::now() + stall + Client::time_for(end - start);
        let limit = || latest.min(Clock::now() + stall);
        let options = GetOptions { range: Some(GetRange::Bounded(start..end)), ..GetOptions::default() };
        let (store, key) = (self.client.store().clone(), self.client.key(&self.key));
        let answer = timeout_at(limit(), store.get_opts(&key, options)).await.map_err(|_| Ended::Stalled)??;
        let given = answer.range.clone();
        if given != (start..end) {
            let what = "the store gave another range than the one requested: the file may have another length";
            return Err(Ended::Other(format!("{what} requested={start}..{end} given={given:?}")));
        }
        let mut body = answer.into_stream();
        while *done < buffer.len() {
            let Some(frame) = timeout_at(limit(), body.next()).await.map_err(|_| Ended::Stalled)? else {
                // The body broke off.
                return Err(Ended::Stalled);
            };
            let frame = frame?;
            let room = buffer.get_mut(*done..).and_then(|room| room.get_mut(..frame.len()));
            let longer = || Ended::Other(format!("the store gave more bytes than requested={start}..{end}"));
            room.ok_or_else(longer)?.copy_from_slice(&frame);
            *done += frame.len();
        }
        Ok(())
    }
}

impl FileReading for ObjectReading {
    fn len(&self) -> u64 {
        self.len
    }

    fn modified(&self) -> Option<SystemTime> {
        self.modified
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let wanted = buffer.len() as u64;
        let end = offset.checked_add(wanted).filter(|end| *end <= self.len);
        let end = end.ok_or_else(|| {
            let what = format!("a file ends too early offset={offset} wanted={wanted} len={}", self.len);
            self.located(Error::corrupt(what))
        })?;
        if end <= self.head.len() as u64 && self.read.fetch_max(end, Ordering::Relaxed) <= offset {
            buffer.copy_from_slice(&self.head[offset as usize..end as usize]);
            return Ok(());
        }
        let deadline: Instant = self.client.deadline_for(wanted);
        let filled = runtime::run_here(deadline, self.fill(offset, buffer))?;
        filled.unwrap_or_else(|| Err(self.client.late("read the file", &self.key)))
    }
}
