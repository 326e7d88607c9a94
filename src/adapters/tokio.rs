//! Blocking calls as futures: they run on the blocking pool of the tokio runtime that polls them.
//!
//! Saves need none of this: [`Save`](crate::Save), [`Save::staged`](crate::Save::staged),
//! [`CheckpointExecutor::fenced`] and [`Sigterm::reported`](crate::sigterm::Sigterm::reported) are futures
//! for every runtime.
//!
//! **Dropping** one of these futures early does not stop the call, which ends on its thread of the pool.
//! **Panics**: when polled outside a tokio runtime. **Errors**: as the call of the same name without
//! `_async`, and `Cancelled` when the runtime shuts down before the call has begun.

use crate::catalog::Found;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, ErrorKind, Result};
use crate::executor::{Builder, CheckpointExecutor};
use crate::restore::{Report, Targets};
use crate::state::Element;
use std::path::PathBuf;
use std::time::Duration;

async fn blocking<T: Send + 'static>(call: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(ended) if ended.is_panic() => std::panic::resume_unwind(ended.into_panic()),
        Err(_) => Err(Error::new(ErrorKind::Cancelled, "the tokio runtime shut down before the call began")),
    }
}

impl Builder {
    /// [`build`](Self::build) on the blocking pool.
    ///
    /// ```
    /// # use ashore::{Catalog, CheckpointExecutor, StateDict};
    /// # use std::{sync::Arc, time::Duration};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let root = dir.path().to_owned();
    /// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
    /// let executor = CheckpointExecutor::builder(&root).arena(16 << 20).chunk(1 << 20).build_async().await?;
    /// let mut state = StateDict::new();
    /// state.tensor("weights", Arc::new(vec![1.0_f32; 6]))?;
    /// let save = executor.save(1, state)?;
    /// executor.fenced().await?; // the tensors may be written
    /// save.await?; // durable
    /// let newest = executor.latest_async().await?.expect("a step was saved");
    /// assert_eq!(newest.read_as_async::<f32>("weights").await?, [1.0; 6]);
    /// executor.shutdown_async(Duration::from_secs(60)).await?;
    /// # Ok::<(), ashore::Error>(())
    /// # }).unwrap();
    /// ```
    ///
    /// # Errors
    /// As [`build`](Self::build); see the [module](crate::adapters::tokio).
    pub async fn build_async(self) -> Result<CheckpointExecutor> {
        blocking(move || self.build()).await
    }
}

impl CheckpointExecutor {
    /// [`latest`](Self::latest) on the blocking pool.
    ///
    /// # Errors
    /// As [`latest`](Self::latest); see the [module](crate::adapters::tokio).
    pub async fn latest_async(&self) -> Result<Option<Checkpoint>> {
        self.alive()?;
        let catalog = self.catalog().clone();
        let newest = blocking(move || catalog.latest()).await?;
        Ok(newest.map(|checkpoint| self.lend_device(checkpoint)))
    }

    /// [`latest_valid`](Self::latest_valid) on the blocking pool.
    ///
    /// # Errors
    /// As [`latest_valid`](Self::latest_valid); see the [module](crate::adapters::tokio).
    pub async fn latest_valid_async(&self) -> Result<Option<Found>> {
        self.alive()?;
        let catalog = self.catalog().clone();
        let found = blocking(move || catalog.latest_valid()).await?;
        Ok(found.map(|found| Found { checkpoint: self.lend_device(found.checkpoint), ..found }))
    }

    /// [`shutdown`](Self::shutdown) on the blocking pool.
    ///
    /// # Errors
    /// As [`shutdown`](Self::shutdown); see the [module](crate::adapters::tokio).
    pub async fn shutdown_async(&self, timeout: Duration) -> Result<()> {
        self.alive()?;
        let threads = self.threads().clone();
        blocking(move || threads.shut_down(timeout)).await
    }
}

impl Checkpoint {
    /// [`open`](Self::open) on the blocking pool.
    ///
    /// # Errors
    /// As [`open`](Self::open); see the [module](crate::adapters::tokio).
    pub async fn open_async(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        blocking(move || Self::open(path)).await
    }

    /// [`verify`](Self::verify) on the blocking pool.
    ///
    /// # Errors
    /// As [`verify`](Self::verify); see the [module](crate::adapters::tokio).
    pub async fn verify_async(&self) -> Result<Report> {
        let this = self.clone();
        blocking(move || this.verify()).await
    }

    /// [`read_as`](Self::read_as) on the blocking pool.
    ///
    /// # Errors
    /// As [`read_as`](Self::read_as); see the [module](crate::adapters::tokio).
    pub async fn read_as_async<T: Element + Send>(&self, name: impl Into<String>) -> Result<Vec<T>> {
        let (this, name) = (self.clone(), name.into());
        blocking(move || this.read_as(&name)).await
    }

    /// [`read_into`](Self::read_into) on the blocking pool, for targets in GPU memory or in host memory that
    /// is never freed: the call goes on writing to them even if its future is dropped.
    /// [`read_as_async`](Self::read_as_async) returns memory of its own.
    ///
    /// # Errors
    /// As [`read_into`](Self::read_into); see the [module](crate::adapters::tokio).
    pub async fn read_into_async(&self, targets: Targets<'static>) -> Result<()> {
        let this = self.clone();
        blocking(move || this.read_into(targets)).await
    }
}
