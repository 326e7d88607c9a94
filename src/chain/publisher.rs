//! The publisher: it takes state dicts, and returns futures of durable versions.

use super::recover::recover;
use super::settings::{Published, PublisherBuilder};
use super::shared::Shared;
use super::writing::VersionStorage;
use crate::completion::deadline_after;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::CheckpointExecutor;
use crate::id::{Attempt, version_name};
use crate::outcome::Outcome;
use crate::save::{Save, SaveOptions, Staged};
use crate::settings::Overlap;
use crate::state::StateDict;
use crate::storage::{self, Storage};
use crate::sync::{Mutex, lock};
use std::fmt;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

/// Publishes versions to a chain. One publisher at a time writes a chain. If two publishers publish the same
/// number, the second gets `Conflict` and ends.
///
/// The publisher keeps the newest version in host memory, and during a publish also the next one: twice the
/// bytes of the weights.
pub struct Publisher {
    shared: Arc<Shared>,
    arena: u64,
    /// The number of the last version that was begun.
    last: Mutex<u64>,
    /// The publisher's own executor. It is made at the first publish without an executor of the program.
    own: Mutex<Option<Arc<CheckpointExecutor>>>,
}

impl Publisher {
    /// Returns a builder of a publisher to `root`: a directory, which is created if it is missing, or a URL
    /// as accepted by [`storage::open`](crate::storage::open). The root should contain nothing else.
    ///
    /// # Errors
    /// Errors of [`storage::open`](crate::storage::open).
    pub fn open(root: impl AsRef<Path>) -> Result<PublisherBuilder> {
        Ok(Self::over(storage::open(root)?))
    }

    /// Returns a builder of a publisher to `storage`.
    pub fn over(storage: Arc<dyn Storage>) -> PublisherBuilder {
        PublisherBuilder::new(storage)
    }

    pub(super) fn start(builder: PublisherBuilder) -> Result<Self> {
        // This comes before anything is listed. After it an older publisher changes nothing, if the storage
        // can ensure that.
        builder.storage.take_over()?;
        let state = recover(&builder.storage, builder.from_full)?;
        let last = Mutex::new(state.newest);
        let shared = Arc::new(Shared::new(builder.storage, builder.settings, state));
        Ok(Self { shared, arena: builder.arena, last, own: Mutex::new(None) })
    }

    /// The newest version that is known to be durable and held in memory.
    pub fn newest(&self) -> Option<u64> {
        lock(&self.shared.state).held.as_ref().map(|held| held.holding.version)
    }

    /// Publishes `state` as the next version and returns at once. Its tensors are read until
    /// [`Publish::staged`] resolves.
    ///
    /// A failed publish loses nothing: the next version is built on the newest durable one, or is a full.
    ///
    /// # Errors
    /// Errors of [`CheckpointExecutor::save`]; `Conflict` once another publisher has taken the chain over.
    pub fn publish(&self, state: StateDict<'static>) -> Result<Publish> {
        let executor = {
            let mut own = lock(&self.own);
            match &*own {
                Some(executor) => executor.clone(),
                None => own.insert(Arc::new(self.executor()?)).clone(),
            }
        };
        self.save(&executor, state, false)
    }

    /// Removes versions that no follower needs, and returns their names. The same happens after each publish.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn prune(&self) -> Result<Vec<String>> {
        self.shared.prune()
    }

    fn executor(&self) -> Result<CheckpointExecutor> {
        let storage = Arc::new(VersionStorage { shared: self.shared.clone(), brought: false });
        let chunk = (self.arena / 4).next_power_of_two().clamp(1 << 20, 8 << 20).min(self.arena / 2);
        let builder =
            CheckpointExecutor::builder(self.shared.storage.describe("")).alone().no_tier_from_env().storage(storage);
        builder.arena(self.arena).chunk(chunk).overlap(Overlap::Block).build()
    }

    fn save(&self, executor: &CheckpointExecutor, state: StateDict<'static>, elsewhere: bool) -> Result<Publish> {
        if let Some(ended) = &lock(&self.shared.state).ended {
            return Err(ended.clone());
        }
        let mut last = lock(&self.last);
        let full =
            || Error::invalid("no number is left for another version").with_path(self.shared.storage.describe(""));
        let version = last.checked_add(1).ok_or_else(full)?;
        let (attempt, slot) = (Attempt::new(), Arc::new(OnceLock::new()));
        {
            let mut slots = lock(&self.shared.slots);
            // Those of saves that never began.
            slots.retain(|_, slot| slot.strong_count() > 0);
            slots.insert(attempt, Arc::downgrade(&slot));
        }
        let mut options = SaveOptions::default().attempt(attempt).name(version_name(version, false));
        if elsewhere {
            options.storage = Some(Arc::new(VersionStorage { shared: self.shared.clone(), brought: true }));
        }
        let save = executor
            .save_with(version, state, options)
            .inspect_err(|_| drop(lock(&self.shared.slots).remove(&attempt)))?;
        *last = version;
        Ok(Publish { save, slot })
    }
}

impl PublisherBuilder {
    /// Reads the chain and makes the versions that it builds on durable.
    ///
    /// # Errors
    /// Errors of the storage. A chain that cannot be read is no error: then the first version is a full.
    pub fn build(self) -> Result<Publisher> {
        Publisher::start(self)
    }
}

impl fmt::Debug for Publisher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Publisher");
        out.field("storage", &self.shared.storage).field("newest", &self.newest()).finish_non_exhaustive()
    }
}

impl CheckpointExecutor {
    /// Publishes `state` as the next version of `publisher`, through this executor's arena and device, queued
    /// after its saves, and with its fence. No step of the executor is written.
    ///
    /// # Errors
    /// Errors of [`save`](Self::save); `Invalid` with several ranks; `Conflict` once another publisher has
    /// taken the chain over.
    pub fn publish_delta(&self, publisher: &Publisher, state: StateDict<'static>) -> Result<Publish> {
        publisher.save(self, state, true)
    }
}

/// A publish in progress: a future of the durable version. Dropping it detaches the publish, which goes on.
#[must_use = "dropping the handle detaches the publish; keep it to learn when the version is durable"]
pub struct Publish {
    save: Save,
    slot: Arc<OnceLock<Published>>,
}

impl Publish {
    /// The number of the version.
    pub fn version(&self) -> u64 {
        self.save.step()
    }

    /// The save that carries the version, for its progress and for functions that are called at its end. Its
    /// outcome is that of the version. The step of the save is the number of the version.
    pub fn save(&self) -> &Save {
        &self.save
    }

    /// Blocks the thread until the version is durable.
    ///
    /// # Errors
    /// Errors of [`Save::wait`], which name the version as step; `Cancelled` when the overlap policy of the
    /// program's executor left the version out.
    pub fn wait(&self, timeout: Duration) -> Result<Published> {
        let deadline = deadline_after(timeout);
        let outcome = self.save.wait(deadline.saturating_duration_since(Instant::now()))?;
        self.published(outcome)
    }

    /// Returns a future that resolves when the tensors may be written.
    pub fn staged(&self) -> Staged {
        self.save.staged()
    }

    fn published(&self, outcome: Outcome) -> Result<Published> {
        let left_out = || {
            let what = format!("the version was not published, as the executor's overlap policy says: {outcome:?}");
            Error::new(ErrorKind::Cancelled, what).with_step(self.version())
        };
        self.slot.get().cloned().ok_or_else(left_out)
    }
}

impl Future for Publish {
    type Output = Result<Published>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let outcome = ready!(Pin::new(&mut self.save).poll(cx))?;
        Poll::Ready(self.published(outcome))
    }
}

impl fmt::Debug for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Publish(version {})", self.version())
    }
}
