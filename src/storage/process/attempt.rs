//! An attempt in shared memory, which is later handed to the writer process.

use super::frame::{Request, SharedFile};
use super::link::PATIENCE;
use super::{Inner, NAME};
use crate::completion::{Cell, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::settings::IoMode;
use crate::storage::name::check_file;
use crate::storage::{FileWriting, Writing};
use crate::sync::{Mutex, lock};
use rustix::fs::{MemfdFlags, memfd_create};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An attempt in shared memory.
#[derive(Debug)]
pub(super) struct SharedAttempt {
    process: Arc<Inner>,
    name: String,
    attempt: Attempt,
    memory: Arc<File>,
    stage: Mutex<Stage>,
}

#[derive(Debug)]
enum Stage {
    Open {
        files: Vec<Arc<Staged>>,
        end: u64,
    },
    /// The attempt is published. The cell completes when everything of the attempt except its step is
    /// deleted.
    Published(Cell<()>),
    Abandoned,
}

/// A file in shared memory.
#[derive(Debug)]
struct Staged {
    file: SharedFile,
    memory: Arc<File>,
    sealed: AtomicBool,
}

fn refused(why: &str, name: &str) -> Error {
    Error::invalid(why).with_path(name)
}

impl SharedAttempt {
    pub fn new(process: Arc<Inner>, name: &str, attempt: Attempt) -> Result<Self> {
        let memory = memfd_create(NAME, MemfdFlags::CLOEXEC);
        let memory = memory.map_err(|e| Error::io("shared memory cannot be made", e.into()))?;
        let stage = Mutex::new(Stage::Open { files: Vec::new(), end: 0 });
        Ok(Self { process, name: name.into(), attempt, memory: Arc::new(File::from(memory)), stage })
    }

    /// Adds space for a file.
    fn add(&self, name: &str, length: u64, put: bool) -> Result<Arc<Staged>> {
        check_file(name).map_err(|e| e.with_kind(ErrorKind::Invalid))?;
        let mut stage = lock(&self.stage);
        let Stage::Open { files, end } = &mut *stage else {
            return Err(refused("a file was added to an attempt that is over", name));
        };
        if files.iter().any(|there| there.file.name == name) {
            return Err(Error::new(ErrorKind::Conflict, "the file was made before").with_path(name));
        }
        let offset = *end;
        let space = length.checked_next_multiple_of(crate::ALIGNMENT as u64);
        let after = space.and_then(|space| offset.checked_add(space));
        let after = after.ok_or_else(|| refused("a file is too long for shared memory", name))?;
        self.memory.set_len(after).map_err(|e| Error::io("shared memory cannot be had", e))?;
        *end = after;
        let file = SharedFile { name: name.into(), offset, length, put };
        let staged = Arc::new(Staged { file, memory: self.memory.clone(), sealed: AtomicBool::new(false) });
        files.push(staged.clone());
        Ok(staged)
    }

    /// The files, all of them sealed.
    fn files(&self) -> Result<Vec<SharedFile>> {
        let stage = lock(&self.stage);
        let Stage::Open { files, .. } = &*stage else {
            return Err(refused("an attempt was published that is over", &self.name));
        };
        if files.is_empty() || files.iter().any(|there| !there.sealed.load(Ordering::Acquire)) {
            return Err(refused("an attempt was published without files, or before all were sealed", &self.name));
        }
        Ok(files.iter().map(|there| there.file.clone()).collect())
    }
}

impl Writing for SharedAttempt {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        Ok(self.add(file, len, false)?)
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let staged = self.add(file, bytes.len() as u64, true)?;
        staged.write_at(0, bytes)?;
        staged.seal()
    }

    fn publish(&self, overwrite: bool) -> Result<()> {
        let files = self.files()?;
        let mut request = Request { id: 0, name: self.name.clone(), attempt: self.attempt, overwrite, files };
        let link = self.process.link()?;
        let (published, settled) = link.ask(&mut request, &self.memory)?;
        self.process.handed.done(self.attempt);
        let timeout = self.process.settings.save_timeout;
        let published = published.wait(deadline_after(timeout)).unwrap_or_else(|| {
            let what = format!("the writer process has not answered waited={timeout:?}");
            Err(Error::new(ErrorKind::Indeterminate, what))
        });
        match &published {
            Ok(()) => *lock(&self.stage) = Stage::Published(settled),
            Err(_) => link.forget(request.id),
        }
        published
    }

    fn settle(&self) -> Result<()> {
        let settled = match &*lock(&self.stage) {
            Stage::Published(settled) => settled.clone(),
            _ => return Err(refused("an attempt was settled that was not published", &self.name)),
        };
        settled.wait(deadline_after(PATIENCE)).unwrap_or_else(|| {
            let what = format!("the writer process has not tidied up waited={PATIENCE:?}");
            Err(Error::new(ErrorKind::Deadline, what))
        })
    }

    fn abandon(&self) -> Result<()> {
        let mut stage = lock(&self.stage);
        if matches!(*stage, Stage::Published(_)) {
            return Err(refused("a published attempt was abandoned", &self.name));
        }
        *stage = Stage::Abandoned;
        Ok(())
    }
}

impl Drop for SharedAttempt {
    fn drop(&mut self) {
        self.process.handed.forget(self.attempt);
    }
}

impl FileWriting for Staged {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        if self.sealed.load(Ordering::Acquire) {
            return Err(refused("a file was written after it was sealed", &self.file.name));
        }
        let written = self.memory.write_all_at(bytes, self.file.offset + offset);
        written.map_err(|e| Error::io("shared memory cannot be written", e))
    }

    fn seal(&self) -> Result<()> {
        if self.sealed.swap(true, Ordering::AcqRel) {
            return Err(refused("a file was sealed twice", &self.file.name));
        }
        Ok(())
    }

    fn mode(&self) -> IoMode {
        IoMode::Buffered
    }
}
