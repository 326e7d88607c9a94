//! Storage in an object store: Amazon S3 and servers that speak its protocol, Google Cloud Storage, Azure
//! Blob Storage, or any store that the program has opened with the crate `object_store`.
//!
//! **Names.** `ashore.json` is the *root object*: it names every step, with its attempt. The objects of an
//! attempt lie under `<step>/<generation>-<attempt>/`, a prefix that no other attempt ever has. `.ranks/`
//! holds the notes that the ranks of a session leave for each other. **Consistency.** A step exists if the
//! root object names it. A reader begins with the root object and lists nothing. **Completion.** An object is
//! durable when the store acknowledges its put. A step is durable when the root object that names it is
//! durable. Only the root object is ever put on a condition. **Sessions.** Before it writes, a process *takes
//! the root over*: it raises the generation in the root object, and from then on no older session can change
//! the steps. **Crash.** A sweep deletes attempts of older sessions that the root does not name. **Readers.**
//! A step that is replaced or pruned is deleted while readers may have it open. Their next read returns
//! `NotFound`.
//!
//! Modules from the bottom up: `runtime`, `errors`, `client`, `connect`; then `state`, `root`, `probe`,
//! `file`, `reading`; then `session`, `sweep`, `attempt`, `step`, `shared`; then [`ObjectStore`].

mod attempt;
mod client;
mod connect;
mod errors;
mod file;
mod parts;
#[cfg(all(test, feature = "s3"))]
mod peer;
mod probe;
mod reading;
mod root;
mod runtime;
mod session;
mod shared;
mod state;
mod step;
mod sweep;
#[cfg(all(test, feature = "s3"))]
mod tests;
#[cfg(any(feature = "s3", feature = "gcs", feature = "azure"))]
mod uploads;

use super::name::check_step;
use super::shared::Shared;
use super::{Reading, Storage, Sweep, Swept, Writers, Writing, url};
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use attempt::ObjectAttempt;
use client::Client;
use object_store::multipart::MultipartStore;
use object_store::path::Path as Key;
use root::Edit;
use session::Inner;
use shared::ObjectShared;
use state::{Entry, State};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use step::ObjectStep;

/// Storage of steps in an object store.
///
/// ```
/// use ashore::storage::ObjectStore;
/// use ashore::{Catalog, CheckpointExecutor, StateDict};
/// use object_store::memory::InMemory;
/// use std::{sync::Arc, time::Duration};
/// let storage = Arc::new(ObjectStore::over(Arc::new(InMemory::new()), "memory://bucket/runs/a")?);
/// let builder = CheckpointExecutor::builder("unused").storage(storage.clone());
/// let executor = builder.arena(16 << 20).chunk(1 << 20).build()?;
/// let mut state = StateDict::new();
/// state.tensor("weights", Arc::new(vec![1.0_f32; 4]))?;
/// executor.save(1, state)?.wait(Duration::from_secs(60))?;
/// let newest = Catalog::over(storage).latest()?.expect("step 1");
/// assert_eq!(newest.read_as::<f32>("weights")?, [1.0; 4]);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct ObjectStore(Arc<Inner>);

impl ObjectStore {
    /// The steps below `root` in a store that the program has opened. `root` is a URL. The store gets only
    /// its path. Messages contain the whole URL, so it must not contain a secret.
    ///
    /// # Errors
    /// `Invalid` when `root` is not a URL of the form `scheme://bucket/prefix`.
    pub fn over<S>(store: Arc<S>, root: &str) -> Result<Self>
    where
        S: object_store::ObjectStore + MultipartStore,
    {
        let url = url::Url::parse(root)?;
        Ok(Self::of(Client::new(store, key(&url)?, &url.to_string())))
    }

    /// Opens the store that a URL such as `s3://bucket/prefix` names. Sends no request to the store yet.
    ///
    /// Credentials come from the environment, a web identity, a container or the machine's metadata, and are
    /// renewed as they expire. Files such as `~/.aws/credentials` are not read.
    ///
    /// # Errors
    /// `Invalid` when the URL cannot be used, or this build has no such store.
    pub fn open(url: &str) -> Result<Self> {
        let url = url::Url::parse(url)?;
        let store = connect::connect(&url)?;
        Ok(Self::of(Client::new(store, key(&url)?, &url.to_string())))
    }

    fn of(client: Client) -> Self {
        Self(Arc::new(Inner::new(client)))
    }

    /// Sets the total time for which a request is tried, not counting the time for its bytes: a minute. Call
    /// it before the first use.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self::of(self.0.client.clone().with_patience(patience))
    }

    /// True if there is a root object, that is if a process has saved here before.
    ///
    /// # Errors
    /// Those of the store.
    pub(crate) fn exists(&self) -> Result<bool> {
        Ok(self.0.root.read()?.is_some())
    }

    fn entry(&self, name: &str) -> Result<Entry> {
        check_step(name)?;
        let root = self.0.root.read()?;
        root.as_ref().and_then(|root| root.step(name)).cloned().ok_or_else(|| self.missing(name))
    }

    /// Refuses a session that no longer owns the root. A process without a session, such as `ashore prune`,
    /// acts for the owner.
    fn check_newest(&self, state: &State) -> Result<()> {
        self.0.generation().map_or(Ok(()), |ours| self.0.check_owned(state, ours))
    }

    fn missing(&self, name: &str) -> Error {
        Error::new(ErrorKind::NotFound, "no such step").with_path(self.0.path(name))
    }

    /// Removes the step `name`, if its identity is `wanted` or `wanted` is None.
    fn discard(&self, name: &str, wanted: Option<(u64, u64)>) -> Result<()> {
        check_step(name)?;
        let inner = &self.0;
        let gone = RefCell::new(None);
        let taken = |state: &State| gone.borrow().as_ref().is_some_and(|gone: &Entry| !state.names(&gone.directory()));
        inner.root.change(&taken, &mut |state| {
            let mut state = state.cloned().ok_or_else(|| self.missing(name))?;
            self.check_newest(&state)?;
            let entry = state.take(name).ok_or_else(|| self.missing(name))?;
            if wanted.is_some_and(|wanted| wanted != step::identity(entry.attempt)) {
                let why = "the step was replaced meanwhile; it was not removed";
                return Err(Error::new(ErrorKind::Conflict, why).with_path(inner.path(name)));
            }
            gone.replace(Some(entry));
            Ok(Edit::To(state))
        })?;
        let Some(entry) = gone.into_inner() else { return Ok(()) };
        if let Err(error) = sweep::delete(&inner.client, &entry.directory()) {
            tracing::warn!(error = format_args!("{error:#}"), "the objects of a removed step are left to a sweep");
            inner.live.bury(&entry);
        }
        Ok(())
    }
}

/// The prefix in the store.
fn key(url: &url::Url) -> Result<Key> {
    Key::parse(&url.path)
        .map_err(|e| Error::invalid("the store cannot have such keys").with_path(url.to_string()).with_source(e))
}

/// Refuses names that the store would have to encode.
fn check_key(name: &str) -> Result<()> {
    if object_store::path::PathPart::from(name).as_ref() == name && name != root::ROOT {
        return Ok(());
    }
    Err(Error::invalid(format!("object stores cannot have this name name={name:?}")))
}

impl Storage for ObjectStore {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        let generation = self.0.session()?;
        Ok(ObjectAttempt::begin(&self.0, name, attempt, generation, overwrite)?)
    }

    fn take_over(&self) -> Result<()> {
        self.0.own()
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        Ok(Arc::new(ObjectStep::new(&self.0, self.entry(name)?)))
    }

    fn list(&self) -> Result<Vec<String>> {
        let steps = self.0.root.read()?.map(|root| root.steps).unwrap_or_default();
        Ok(steps.into_iter().map(|step| step.name).collect())
    }

    fn read_marks(&self) -> Result<Option<Vec<u8>>> {
        let marks = self.0.root.read()?.and_then(|root| root.marks);
        let bytes = marks.map(|marks| serde_json::to_vec(&marks)).transpose();
        bytes.map_err(|e| Error::internal("cannot write json").with_source(e))
    }

    fn write_marks(&self, marks: &[u8]) -> Result<()> {
        let marks: serde_json::Value =
            serde_json::from_slice(marks).map_err(|e| Error::invalid("marks of steps are json").with_source(e))?;
        let none = || Error::new(ErrorKind::NotFound, "there is no step to mark").with_path(self.0.client.name());
        self.0.root.change(&|state| state.marks.as_ref() == Some(&marks), &mut |state| {
            let mut state = state.cloned().ok_or_else(none)?;
            self.check_newest(&state)?;
            state.marks = Some(marks.clone());
            Ok(Edit::To(state))
        })
    }

    fn confirm(&self, name: &str) -> Result<()> {
        self.entry(name).map(drop)
    }

    fn remove(&self, name: &str) -> Result<()> {
        self.discard(name, None)
    }

    fn remove_opened(&self, name: &str, opened: &dyn Reading) -> Result<()> {
        let unknown = || Error::internal("a step that another storage has opened is to be removed");
        self.discard(name, Some(opened.identity().ok_or_else(unknown)?))
    }

    fn sweep(&self, how: Sweep) -> Result<Swept> {
        sweep::sweep(&self.0, how)
    }

    /// Writes nothing: the root object says which step is the newest.
    fn hint(&self, name: &str) -> Result<()> {
        check_step(name)
    }

    fn equip(&self, writers: Writers) {
        self.0.equip(Some(writers));
    }

    fn elsewhere(&self, parent: &Path, _create: bool) -> Result<Arc<dyn Storage>> {
        let (Some(there), Ok(here)) = (url::Url::of(parent)?, url::Url::parse(self.0.client.name())) else {
            let why = "the directory of a save is a URL, as the root is";
            return Err(Error::invalid(why).with_path(parent));
        };
        if (&there.scheme, &there.bucket) != (&here.scheme, &here.bucket) {
            let why = "the directory of a save lies in the same bucket as the root";
            return Err(Error::invalid(why).with_path(parent));
        }
        Ok(Arc::new(Self(self.0.at(key(&there)?, &there.to_string()))))
    }

    fn shared(&self) -> Option<Arc<dyn Shared>> {
        Some(Arc::new(ObjectShared::new(&self.0)))
    }

    fn engine(&self) -> &'static str {
        "requests to an object store"
    }

    fn describe(&self, name: &str) -> PathBuf {
        if name.is_empty() { self.0.client.name().into() } else { self.0.path(name).into() }
    }
}
