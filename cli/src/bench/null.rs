//! Replacements for half of a save, to measure the other half: a storage that discards its data, and a device
//! that makes no copies.

use ashore::internal::device::{CopyQueue, Device};
use ashore::internal::digest::Digest;
use ashore::internal::format::columns::TENSORS_TABLE;
use ashore::internal::format::entries::MANIFEST;
use ashore::memory::{Pages, Register};
use ashore::storage::{FileWriting, IoMode, Reading, Storage, Sweep, Swept, Writing};
use ashore::{Attempt, Error, ErrorKind, Result};
use std::any::Any;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// A storage that discards everything, except manifests and tables if they are requested. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct Sink {
    kept: Option<Arc<Mutex<Vec<Vec<u8>>>>>,
}

impl Sink {
    /// Makes a storage that keeps tables and manifests: they contain the digests of the discarded data.
    pub fn with_tables() -> Self {
        Self { kept: Some(Arc::default()) }
    }

    /// Returns the table and the manifest of each save since the last call, in turn.
    pub fn taken(&self) -> Vec<Vec<u8>> {
        let kept = self.kept.as_ref().map(|kept| kept.lock().unwrap_or_else(PoisonError::into_inner));
        kept.map(|mut kept| std::mem::take(&mut *kept)).unwrap_or_default()
    }
}

impl Storage for Sink {
    fn begin(&self, _: &str, _: Attempt, _: bool) -> Result<Arc<dyn Writing>> {
        Ok(Arc::new(self.clone()))
    }

    fn open(&self, _: &str) -> Result<Arc<dyn Reading>> {
        Err(Error::new(ErrorKind::NotFound, "nothing is kept"))
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn confirm(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn remove(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn sweep(&self, _: Sweep) -> Result<Swept> {
        Ok(Swept::default())
    }

    fn hint(&self, _: &str) -> Result<()> {
        Ok(())
    }

    fn describe(&self, name: &str) -> PathBuf {
        name.into()
    }
}

impl Writing for Sink {
    fn create(&self, _: &str, _: u64) -> Result<Arc<dyn FileWriting>> {
        Ok(Arc::new(self.clone()))
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        if let (TENSORS_TABLE | MANIFEST, Some(kept)) = (file, &self.kept) {
            kept.lock().unwrap_or_else(PoisonError::into_inner).push(bytes.to_vec());
        }
        Ok(())
    }

    fn publish(&self, _: bool) -> Result<()> {
        Ok(())
    }

    fn settle(&self) -> Result<()> {
        Ok(())
    }

    fn abandon(&self) -> Result<()> {
        Ok(())
    }
}

impl FileWriting for Sink {
    fn write_at(&self, _: u64, _: &[u8]) -> Result<()> {
        Ok(())
    }

    fn seal(&self) -> Result<()> {
        Ok(())
    }

    fn mode(&self) -> IoMode {
        IoMode::Direct
    }
}

/// A device that reports copies without making them. Writers digest and write the old contents of the arena,
/// as they do for a GPU.
#[derive(Debug)]
pub struct Absent;

impl Register for Absent {
    fn register(&self, _: Pages<'_>) -> Result<Box<dyn Any + Send + Sync>> {
        Ok(Box::new(()))
    }
}

impl Device for Absent {
    fn name(&self) -> String {
        "null".into()
    }

    fn queue(&self) -> Result<Box<dyn CopyQueue>> {
        Ok(Box::new(Events(0)))
    }
}

struct Events(u64);

impl CopyQueue for Events {
    #[expect(unsafe_code, reason = "the contract of a copy that is never made asks for nothing")]
    unsafe fn copy(&mut self, _: *const u8, _: *mut u8, _: usize) -> Result<Option<Digest>> {
        Ok(None)
    }

    fn event(&mut self) -> Result<u64> {
        self.0 += 1;
        Ok(self.0)
    }

    fn reached(&mut self) -> Result<u64> {
        Ok(self.0)
    }

    fn quiesce(&mut self, _: Instant) -> bool {
        true
    }
}
