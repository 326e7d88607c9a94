//! The executor whose writer is a process of its own: torch's `_ProcessBasedAsyncCheckpointExecutor`.
//!
//! The engine of the training program stages into shared memory and hands that over, with the manifest, to a writer process,
//! which brings it to storage, publishes it, and says so. **Crash.** From the hand-over on the save does not need the training
//! program: if that is killed, the writer finishes what it has and ends. If the writer dies, saves that it had are
//! `Indeterminate`, and the next one starts a new writer. **Requests** carry numbers, and so do answers. **Deadlines.** Every wait
//! for the writer has one. **Memory.** Beside the arena, one copy of the state for each save under way, until it is durable.

mod frame;
mod remote;
mod serve;

pub use serve::serve;

use super::thread::ThreadExecutor;
use super::{AsyncCheckpointExecutor, CheckpointFuture, ExecuteOptions, StagedState};
use crate::error::{Error, Result};
use crate::executor::CheckpointExecutor;
use crate::settings::Settings;
use remote::Remote;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Collects what a [`ProcessExecutor`] needs.
#[derive(Debug)]
#[must_use = "nothing happens until `build`"]
pub struct ProcessBuilder {
    root: PathBuf,
    settings: Settings,
    program: Option<PathBuf>,
    arguments: Vec<String>,
}

impl ProcessBuilder {
    /// Replaces the settings of the engine.
    pub fn settings(mut self, settings: Settings) -> Self {
        self.settings = settings;
        self
    }

    /// The program of the writer process. Unless set, `ashore` beside the executable of this process, then in `PATH`.
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = Some(program.into());
        self
    }

    /// The arguments by which the program becomes a writer that [serves](serve): `writer`.
    pub fn arguments(mut self, arguments: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.arguments = arguments.into_iter().map(Into::into).collect();
        self
    }

    /// Finds the program, starts the writer process and waits until it is ready.
    ///
    /// # Errors
    /// `Invalid` when there is no such program, or it is no writer of this version; as
    /// [`Builder::build`](crate::Builder::build).
    pub fn build(self) -> Result<ProcessExecutor> {
        let Self { root, settings, program, arguments } = self;
        settings.check()?;
        let program = find(program)?;
        let remote = Remote::start(root.clone(), settings.clone(), program, arguments)?;
        let engine = CheckpointExecutor::builder(root).settings(settings).storage(Arc::new(remote.clone())).build()?;
        let executor = ThreadExecutor::new(Arc::new(engine))?.handing_over(remote.handed.clone());
        Ok(ProcessExecutor { executor, remote })
    }
}

/// Where the program is.
fn find(set: Option<PathBuf>) -> Result<PathBuf> {
    if let Some(program) = set {
        let there = program.is_file();
        let missing = || Error::invalid("the program of the writer process is not there").with_path(&program);
        return if there { Ok(program.clone()) } else { Err(missing()) };
    }
    let beside = std::env::current_exe().ok().and_then(|me| me.parent().map(Path::to_owned));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = beside.into_iter().chain(std::env::split_paths(&path)).map(|dir| dir.join("ashore"));
    found.into_iter().find(|program| program.is_file()).ok_or_else(|| {
        Error::invalid("the program of the writer process, `ashore`, is neither beside this executable nor in PATH")
    })
}

/// Saves by a writer process. Everything else is as with a [`ThreadExecutor`]; a future's staging is complete when the state has
/// been handed over.
#[derive(Debug)]
pub struct ProcessExecutor {
    executor: ThreadExecutor,
    remote: Arc<Remote>,
}

impl ProcessExecutor {
    /// Begins to build an executor for checkpoints under `root`.
    pub fn builder(root: impl Into<PathBuf>) -> ProcessBuilder {
        let arguments = vec!["writer".into()];
        ProcessBuilder { root: root.into(), settings: Settings::default(), program: None, arguments }
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

    /// The writer process; None while there is none, because the last has died.
    pub fn writer(&self) -> Option<u32> {
        self.remote.pid()
    }

    /// [`ThreadExecutor::close`]; the writer process ends, too.
    ///
    /// # Errors
    /// As there.
    pub fn close(self, timeout: Duration) -> Result<()> {
        self.executor.close(timeout)
    }
}

impl AsyncCheckpointExecutor for ProcessExecutor {
    fn execute_save(&self, state: StagedState, options: ExecuteOptions) -> Result<CheckpointFuture> {
        self.executor.execute_save(state, options)
    }
}
