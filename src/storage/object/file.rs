//! Writing a file of an attempt.

use super::client::Client;
use crate::error::{Error, ErrorKind, Result};
use crate::memory::AlignedBuffer;
use crate::settings::IoMode;
use crate::storage::FileWriting;
use crate::sync::{Mutex, lock};
use bytes::Bytes;
use std::fmt;
use std::sync::Arc;

/// What an attempt hears of its files.
pub(super) trait Counted: Send + Sync {
    /// A file is sealed.
    fn sealed(&self);
    /// A file is lost, and the attempt with it.
    fn lost(&self);
}

/// The bytes of a file that is sealed.
struct Whole(AlignedBuffer);

impl AsRef<[u8]> for Whole {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A file, kept in memory until its seal puts it.
pub(super) struct ObjectFile {
    client: Client,
    key: String,
    len: u64,
    bytes: Mutex<Option<AlignedBuffer>>,
    attempt: Arc<dyn Counted>,
}

impl fmt::Debug for ObjectFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.client.name(), self.key)
    }
}

impl ObjectFile {
    /// A new file of `len` bytes at `key`, which no other file ever has.
    pub fn create(client: &Client, key: String, len: u64, attempt: Arc<dyn Counted>) -> Result<Self> {
        let no_room = || Error::new(ErrorKind::NoSpace, format!("no memory for a file len={len}"));
        let room = usize::try_from(len).map_err(|_| no_room())?;
        let bytes = AlignedBuffer::try_new(room).ok_or_else(no_room)?;
        Ok(Self { client: client.clone(), key, len, bytes: Mutex::new(Some(bytes)), attempt })
    }

    fn refused(&self, what: &str) -> Error {
        Error::invalid(what).with_path(format!("{}/{}", self.client.name(), self.key))
    }
}

impl FileWriting for ObjectFile {
    fn write_at(&self, offset: u64, from: &[u8]) -> Result<()> {
        let mut bytes = lock(&self.bytes);
        let bytes = bytes.as_mut().ok_or_else(|| self.refused("a file was written after it was sealed"))?;
        let start = usize::try_from(offset.min(self.len)).unwrap_or(usize::MAX);
        let room = bytes.len().saturating_sub(start).min(from.len());
        if let (Some(to), Some(from)) = (bytes.get_mut(start..start + room), from.get(..room)) {
            to.copy_from_slice(from);
        }
        Ok(())
    }

    fn seal(&self) -> Result<()> {
        let bytes = lock(&self.bytes).take().ok_or_else(|| self.refused("a file was sealed twice"))?;
        let bytes = Bytes::from_owner(Whole(bytes));
        let put = self.client.put("write the file", &self.key, bytes, self.client.deadline_for(self.len));
        if put.is_ok() {
            self.attempt.sealed()
        } else {
            self.attempt.lost()
        }
        put
    }

    fn mode(&self) -> IoMode {
        IoMode::Buffered
    }
}
