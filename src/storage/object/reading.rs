//! Reading the files of a step.

use super::client::Client;
use crate::error::{Error, ErrorKind, Result};
use crate::storage::FileReading;
use bytes::Bytes;
use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange};
use std::fmt;
use std::sync::Arc;
use std::time::SystemTime;

/// Says why an object of a step is not there: after a look at the root, `NotFound` where the step was pruned
/// or replaced, else `Corrupt`.
pub(super) type WhyMissing = Arc<dyn Fn(&str) -> Error + Send + Sync>;

/// A file of a published step.
pub(super) struct ObjectReading {
    client: Client,
    key: String,
    len: u64,
    modified: Option<SystemTime>,
    why_missing: WhyMissing,
}

impl fmt::Debug for ObjectReading {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client.name(), self.key)
    }
}

impl ObjectReading {
    /// Opens the file at `key`; None if there is none.
    pub fn open(client: &Client, key: String, why_missing: WhyMissing) -> Result<Option<Self>> {
        let Some(meta) = client.head("look at the file", &key, client.deadline())? else { return Ok(None) };
        let modified = Some(SystemTime::from(meta.last_modified));
        Ok(Some(Self { client: client.clone(), key, len: meta.size, modified, why_missing }))
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
            Error::corrupt(what).with_path(format!("{}/{}", self.client.name(), self.key))
        })?;
        if wanted == 0 {
            return Ok(());
        }
        let deadline = self.client.deadline_for(wanted);
        let read = self.client.call("read the file", &self.key, deadline, move |store, key: Key| async move {
            let range = Some(GetRange::Bounded(offset..end));
            store.get_opts(&key, GetOptions { range, ..GetOptions::default() }).await?.bytes().await
        });
        let bytes: Bytes = match read {
            Err(error) if error.kind() == ErrorKind::NotFound => return Err((self.why_missing)(&self.key)),
            read => read?,
        };
        if bytes.len() != buffer.len() {
            let what = format!("the store gave another number of bytes wanted={wanted} given={}", bytes.len());
            return Err(Error::corrupt(what).with_path(format!("{}/{}", self.client.name(), self.key)));
        }
        buffer.copy_from_slice(&bytes);
        Ok(())
    }
}
