//! Paths that are not known yet.

use crate::completion::{Cell, Completion, Waiter, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::Arc;
use std::future::Future;
use std::ops::Div;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// The sending end of a deferred path. Dropping it before the path is set fails every waiter.
///
/// ```
/// use ashore::compat::orbax::DeferredPath;
/// use ashore::ErrorKind;
/// use std::{path::Path, time::Duration};
/// let deferred = DeferredPath::new();
/// let item = deferred.awaiting().join("model")?;
/// assert_eq!(item.path().unwrap_err().kind(), ErrorKind::Busy);
/// assert!(deferred.set_path("runs/a/100"));
/// assert_eq!(item.wait(Duration::from_secs(60))?, Path::new("runs/a/100/model"));
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Debug)]
pub struct DeferredPath(Cell<PathBuf>);

impl DeferredPath {
    /// A path that is not known yet.
    pub fn new() -> Self {
        Self(Arc::new(Completion::new()))
    }

    /// Sets the path. False when it was set or failed before.
    pub fn set_path(&self, path: impl Into<PathBuf>) -> bool {
        self.0.complete(Ok(path.into()))
    }

    /// Fails every waiter with `why`: there will be no path. False when it was set or failed before.
    pub fn fail(&self, why: Error) -> bool {
        self.0.complete(Err(why))
    }

    /// Returns the waiting end, for a handler.
    pub fn awaiting(&self) -> PathAwaitingCreation {
        PathAwaitingCreation { root: self.0.clone(), below: PathBuf::new() }
    }
}

impl Default for DeferredPath {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for DeferredPath {
    fn drop(&mut self) {
        self.0.complete(Err(Error::new(ErrorKind::Cancelled, "a deferred path was dropped before it was set")));
    }
}

/// A path that can be joined and waited for before it exists. Its methods never touch the file system.
#[derive(Clone, Debug)]
pub struct PathAwaitingCreation {
    root: Cell<PathBuf>,
    below: PathBuf,
}

impl PathAwaitingCreation {
    /// Returns a path below this one.
    ///
    /// # Errors
    /// `Invalid` for a name that leads elsewhere: an absolute path, or one that contains `..`.
    pub fn join(&self, name: impl AsRef<Path>) -> Result<Self> {
        let name = name.as_ref();
        if !name.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir)) {
            return Err(Error::invalid("a deferred path can only be joined with names below it").with_path(name));
        }
        Ok(Self { root: self.root.clone(), below: self.below.join(name) })
    }

    /// Returns the path.
    ///
    /// # Errors
    /// `Busy` while the path is not known; the reason when there will be no path.
    pub fn path(&self) -> Result<PathBuf> {
        let unknown = || Error::new(ErrorKind::Busy, "the path has not been created yet");
        self.root.get().ok_or_else(unknown)?.map(|root| self.under(root))
    }

    /// Returns a future of the path.
    pub fn await_creation(&self) -> impl Future<Output = Result<PathBuf>> + Send + 'static + use<> {
        let (waiter, this) = (Waiter::new(self.root.clone()), self.clone());
        async move { waiter.await.map(|root| this.under(root)) }
    }

    /// Waits for the path on this thread.
    ///
    /// # Errors
    /// The reason why there will be no path; `Deadline` after `timeout`.
    pub fn wait(&self, timeout: Duration) -> Result<PathBuf> {
        let late = || Error::new(ErrorKind::Deadline, format!("the path was not created in time waited={timeout:?}"));
        self.root.wait(deadline_after(timeout)).ok_or_else(late)?.map(|root| self.under(root))
    }

    fn under(&self, root: PathBuf) -> PathBuf {
        if self.below.as_os_str().is_empty() { root } else { root.join(&self.below) }
    }
}

impl Div<&str> for &PathAwaitingCreation {
    type Output = Result<PathAwaitingCreation>;

    fn div(self, name: &str) -> Self::Output {
        self.join(name)
    }
}
