//! An attempt: objects under a prefix that no other attempt has. One change of the root object makes it a
//! step.

use super::check_key;
use super::client::Client;
use super::file::{Counted, ObjectFile, expired};
use super::root::{Edit, Root};
use super::session::Inner;
use super::state::{Entry, State, Whole, directory};
use super::sweep;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::entries::MANIFEST;
use crate::id::Attempt;
use crate::storage::shared::{SharedWriting, Vetoed};
use crate::storage::{FileWriting, Writers, Writing, name};
use crate::sync::{Mutex, MutexGuard, lock};
use bytes::Bytes;
use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// Whole files of this length and more are written like shards.
const WORTHWHILE: usize = 8 << 20;

/// The state of the files that this process writes.
#[derive(Default)]
struct Progress {
    made: BTreeSet<String>,
    sealed: usize,
    lost: bool,
    manifest: Option<Whole>,
    writers: Option<Writers>,
    expires: Option<Instant>,
}

impl Counted for Mutex<Progress> {
    fn sealed(&self) {
        lock(self).sealed += 1;
    }

    fn lost(&self) {
        lock(self).lost = true;
    }

    fn writers(&self) -> Option<Writers> {
        lock(self).writers
    }

    fn expires(&self) -> Option<Instant> {
        lock(self).expires
    }
}

#[derive(Debug)]
enum Phase {
    Open,
    Published {
        /// The step that it replaced.
        displaced: Option<Entry>,
    },
    /// The publish failed: as far as is known, the attempt is not a step.
    Failed,
    /// The publish may have happened.
    Unclear,
    Over,
}

/// An attempt in an object store; see the module.
pub(super) struct ObjectAttempt {
    inner: Arc<Inner>,
    name: String,
    attempt: Attempt,
    generation: u64,
    progress: Arc<Mutex<Progress>>,
    phase: Mutex<Phase>,
    /// Keeps the attempt alive. None on ranks other than 0, which neither publish nor delete.
    leads: Option<Arc<()>>,
}

impl fmt::Debug for ObjectAttempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.inner.client.name(), self.directory())
    }
}

impl ObjectAttempt {
    /// Begins an attempt, and records that it is alive.
    pub fn begin(
        inner: &Arc<Inner>,
        step: &str,
        attempt: Attempt,
        generation: u64,
        overwrite: bool,
    ) -> Result<Arc<Self>> {
        name::check_step(step)?;
        check_key(step)?;
        let directory = directory(step, generation, attempt);
        let allow = |state: &State| {
            inner.check_owned(state, generation)?;
            // Its objects would be written over, and deleted if the attempt failed.
            if state.names(&directory) {
                return Err(conflict("the attempt is the step already: give another attempt", inner.path(step)));
            }
            let taken = !overwrite && state.step(step).is_some();
            if taken { Err(conflict("the step exists", inner.path(step))) } else { Ok(()) }
        };
        // The root as it was last seen is enough to begin, but not to refuse.
        if inner.root.last_seen().is_none_or(|state| allow(&state).is_err()) {
            allow(&inner.root.read()?.ok_or_else(|| inner.vanished())?)?;
        }
        let alive = inner.live.add(step, generation, attempt)?;
        Ok(Arc::new(Self::new(inner, step, attempt, generation, Some(alive))))
    }

    /// Opens an attempt that rank 0 has begun.
    pub fn join(inner: &Arc<Inner>, step: &str, attempt: Attempt, generation: u64) -> Result<Arc<Self>> {
        name::check_step(step)?;
        check_key(step)?;
        Ok(Arc::new(Self::new(inner, step, attempt, generation, None)))
    }

    fn new(inner: &Arc<Inner>, step: &str, attempt: Attempt, generation: u64, leads: Option<Arc<()>>) -> Self {
        let (inner, name, phase) = (inner.clone(), step.to_owned(), Mutex::new(Phase::Open));
        let progress = Arc::new(Mutex::new(Progress { writers: inner.writers(), ..Progress::default() }));
        Self { inner, name, attempt, generation, progress, phase, leads }
    }

    fn client(&self) -> &Client {
        &self.inner.client
    }

    fn root(&self) -> &Root {
        &self.inner.root
    }

    fn directory(&self) -> String {
        directory(&self.name, self.generation, self.attempt)
    }

    fn path(&self) -> String {
        self.inner.path(&self.name)
    }

    /// Takes the name of a file. An attempt has each name only once.
    fn take(&self, file: &str) -> Result<String> {
        name::check_file(file).map_err(|error| error.with_kind(ErrorKind::Invalid).with_path(self.path()))?;
        if !matches!(*self.phase(), Phase::Open) {
            return Err(Error::invalid("the attempt is over").with_path(self.path()));
        }
        let key = format!("{}/{file}", self.directory());
        if lock(&self.progress).made.insert(file.to_owned()) {
            return Ok(key);
        }
        Err(conflict("the file was made before", format!("{}/{key}", self.client().name())))
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        lock(&self.phase)
    }

    /// Refuses to go on unless every file of this process is sealed; it may have none.
    fn check_sealed(&self) -> Result<()> {
        let progress = lock(&self.progress);
        let why = if progress.lost {
            "a file of the attempt is lost"
        } else if progress.sealed < progress.made.len() {
            "a file of the attempt is not sealed"
        } else {
            return Ok(());
        };
        Err(Error::invalid(why).with_path(self.path()))
    }

    /// Makes the state of the root in which this attempt is the step.
    fn edit(&self, state: &State, overwrite: bool, displaced: &mut Option<Entry>) -> Result<Edit> {
        self.inner.check_owned(state, self.generation)?;
        if state.vetoed.contains(&self.attempt) {
            let why = "a rank has withdrawn the attempt, because the outcome did not reach it in time";
            return Err(Error::new(ErrorKind::Cancelled, why).with_path(self.path()));
        }
        if !overwrite && state.step(&self.name).is_some() {
            return Err(conflict("another attempt at the step won", self.path()));
        }
        let manifest = lock(&self.progress).manifest;
        let (name, attempt, generation) = (self.name.clone(), self.attempt, self.generation);
        let mut state = state.clone();
        *displaced = state.put(Entry { name, attempt, generation, manifest });
        Ok(Edit::To(state))
    }
}

impl Writing for ObjectAttempt {
    fn expires(&self, at: Instant) {
        lock(&self.progress).expires = Some(at);
    }

    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        let key = self.take(file)?;
        let made = ObjectFile::create(self.client(), key, len, self.progress.clone());
        Ok(Arc::new(made.inspect_err(|_| self.progress.lost())?))
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        if bytes.len() >= WORTHWHILE && bytes.as_ptr().addr().is_multiple_of(crate::memory::ALIGNMENT) {
            let long = self.create(file, bytes.len() as u64)?;
            long.write_at(0, bytes).and_then(|()| long.seal())?;
        } else {
            let key = self.take(file)?;
            let (client, length) = (self.client(), bytes.len() as u64);
            let (deadline, expires) = (client.deadline_for(length), lock(&self.progress).expires);
            let deadline = expires.map_or(deadline, |expires| deadline.min(expires));
            let put = client.put("write the file", &key, Bytes::copy_from_slice(bytes), deadline);
            let put = put.map_err(|error| expired(error, expires));
            if put.is_ok() {
                self.progress.sealed()
            } else {
                self.progress.lost()
            }
            put?;
        }
        if file == MANIFEST {
            let manifest = Whole { length: bytes.len() as u64, digest: Digest::of(bytes) };
            lock(&self.progress).manifest = Some(manifest);
        }
        Ok(())
    }

    fn publish(&self, overwrite: bool) -> Result<()> {
        let mut phase = self.phase();
        if !matches!(*phase, Phase::Open) {
            return Err(Error::invalid("an attempt is published once").with_path(self.path()));
        }
        if self.leads.is_none() {
            return Err(Error::internal("only rank 0 publishes").with_path(self.path()));
        }
        self.check_sealed()?;
        if lock(&self.progress).made.is_empty() {
            return Err(Error::invalid("an attempt without files is not published").with_path(self.path()));
        }
        let (mut displaced, until) = (None, lock(&self.progress).expires);
        let directory = self.directory();
        let done = self.root().change_until(until, &|state| state.names(&directory), &mut |state| {
            self.edit(state.ok_or_else(|| self.inner.vanished())?, overwrite, &mut displaced)
        });
        match &done {
            Ok(()) => *phase = Phase::Published { displaced },
            Err(error) if error.kind() == ErrorKind::Indeterminate => {
                *phase = Phase::Unclear;
                // The attempt may become a step yet. Only a later session can know.
                self.inner.live.forget(self.attempt);
            }
            Err(_) => *phase = Phase::Failed,
        }
        done
    }

    fn settle(&self) -> Result<()> {
        let mut phase = self.phase();
        let Phase::Published { displaced } = &*phase else {
            return Err(Error::invalid("only a published attempt is settled").with_path(self.path()));
        };
        if let Some(old) = displaced.as_ref().map(Entry::directory).filter(|old| *old != self.directory()) {
            sweep::delete(self.client(), &old)?;
        }
        self.inner.live.forget(self.attempt);
        *phase = Phase::Over;
        Ok(())
    }

    fn abandon(&self) -> Result<()> {
        let mut phase = self.phase();
        match &*phase {
            Phase::Over => Ok(()),
            Phase::Published { .. } => {
                Err(Error::invalid("a published attempt cannot be abandoned").with_path(self.path()))
            }
            Phase::Unclear => {
                Err(Error::new(ErrorKind::Indeterminate, "an attempt that may be published is left alone")
                    .with_path(self.path()))
            }
            // Never delete objects of a step, whatever result its publish had, or that of an earlier publish
            // of the same attempt.
            Phase::Open | Phase::Failed
                if self.leads.is_some() && self.root().read()?.is_some_and(|root| root.names(&self.directory())) =>
            {
                *phase = Phase::Unclear;
                self.inner.live.forget(self.attempt);
                Err(Error::new(ErrorKind::Indeterminate, "an attempt that the root names is left alone")
                    .with_path(self.path()))
            }
            Phase::Open | Phase::Failed => {
                if self.leads.is_some() {
                    sweep::delete(self.client(), &self.directory())?;
                    self.inner.live.forget(self.attempt);
                }
                *phase = Phase::Over;
                Ok(())
            }
        }
    }
}

impl SharedWriting for ObjectAttempt {
    /// Does nothing: an object has its name when it is put.
    fn sync_names(&self) -> Result<()> {
        self.check_sealed()
    }

    /// Does nothing: of a publish and a veto, the one that changes the root first wins.
    fn claim(&self) -> Result<()> {
        self.check_sealed()
    }

    fn veto(&self) -> Result<Vetoed> {
        let mut vetoed = Vetoed::Done;
        self.root().change(&|state| state.vetoed.contains(&self.attempt), &mut |state| {
            let state = state.ok_or_else(|| self.inner.vanished())?;
            // This attempt may have been a step that a newer session has replaced.
            if state.names(&self.directory()) || state.generation != self.generation {
                vetoed = Vetoed::TooLate;
                return Ok(Edit::Nothing);
            }
            vetoed = Vetoed::Done;
            if state.vetoed.contains(&self.attempt) {
                return Ok(Edit::Nothing);
            }
            let mut state = state.clone();
            state.vetoed.push(self.attempt);
            Ok(Edit::To(state))
        })?;
        Ok(vetoed)
    }
}

fn conflict(what: &str, path: String) -> Error {
    Error::new(ErrorKind::Conflict, what).with_path(path)
}
