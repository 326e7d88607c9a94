//! The executor with a separate writer process: torch's `_ProcessBasedAsyncCheckpointExecutor`. It is a
//! [`ThreadExecutor`] whose engine has a [`Process`] as its storage.

use super::thread::ThreadExecutor;
use super::{AsyncCheckpointExecutor, CheckpointFuture, ExecuteOptions, StagedState};
use crate::error::Result;
use crate::executor::CheckpointExecutor;
use crate::settings::Settings;
use crate::storage::process::{Process, Program};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// Collects what a [`ProcessExecutor`] needs.
#[derive(Debug)]
#[must_use = "nothing happens until `build`"]
pub struct ProcessBuilder {
    root: PathBuf,
    settings: Settings,
    program: Program,
}

impl ProcessBuilder {
    /// Replaces the settings of the engine.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// Sets the program of the writer process. The default is `ashore` beside the executable of this process,
    /// or else in `PATH`.
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = self.program.path(program);
        self
    }

    /// Sets the arguments that make the program a writer, which [serves](super::serve). The default is
    /// `writer`.
    pub fn arguments(mut self, arguments: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.program = self.program.arguments(arguments);
        self
    }

    /// Finds the program, starts the writer process and waits until it is ready.
    ///
    /// # Errors
    /// `Invalid` when there is no such program, or when it is not a writer of this version; as
    /// [`Builder::build`](crate::Builder::build).
    pub fn build(self) -> Result<ProcessExecutor> {
        let Self { root, settings, program } = self;
        settings.check()?;
        let process = Process::start(&root, &settings, program)?;
        let storage = Arc::new(process.clone());
        let engine =
            CheckpointExecutor::builder(root).settings(settings).storage(storage).alone().no_tier_from_env().build()?;
        let executor = ThreadExecutor::new(Arc::new(engine))?.handing_over(process.handed().clone());
        Ok(ProcessExecutor { executor, process })
    }
}

/// Saves through a writer process. A future's staging is complete when the state has been handed over to that
/// process. Everything else is as with a [`ThreadExecutor`].
///
/// ```
/// use ashore::compat::torch::ProcessExecutor;
/// use ashore::ErrorKind;
/// # let root = tempfile::tempdir().unwrap();
/// // Finds the program `ashore` beside this executable or in `PATH`, unless it is given:
/// let refused = ProcessExecutor::builder(root.path()).program("/opt/trainer/absent").build().unwrap_err();
/// assert_eq!(refused.kind(), ErrorKind::Invalid);
/// ```
#[derive(Debug)]
pub struct ProcessExecutor {
    executor: ThreadExecutor,
    process: Process,
}

impl ProcessExecutor {
    /// Begins to build an executor for checkpoints under `root`.
    pub fn builder(root: impl Into<PathBuf>) -> ProcessBuilder {
        ProcessBuilder { root: root.into(), settings: Settings::default(), program: Program::default() }
    }

    /// [`ThreadExecutor::retry`].
    #[must_use]
    pub fn retry(mut self, times: u32) -> Self {
        self.executor = self.executor.retry(times);
        self
    }

    /// The engine that stages.
    pub fn executor(&self) -> &Arc<CheckpointExecutor> {
        self.executor.executor()
    }

    /// The process id of the writer process. None while there is no writer process, because the last one has
    /// died.
    pub fn writer(&self) -> Option<u32> {
        self.process.pid()
    }

    /// [`ThreadExecutor::close`], which also ends the writer process.
    ///
    /// # Errors
    /// As [`ThreadExecutor::close`].
    pub fn close(self, timeout: Duration) -> Result<()> {
        self.executor.close(timeout)
    }
}

impl AsyncCheckpointExecutor for ProcessExecutor {
    fn execute_save(&self, state: StagedState, options: ExecuteOptions) -> Result<CheckpointFuture> {
        self.executor.execute_save(state, options)
    }
}
