//! A root that a separate process writes. This process survives when the program is killed.
//!
//! The program stages an attempt into shared memory and hands the memory, with the manifest, to a writer
//! process. The writer process copies the attempt to the root, publishes it, and reports the result. The
//! program reads the root itself.
//!
//! **Crash.** After the hand-over a save does not need the program. If the program is killed, the writer
//! finishes the saves that it has and ends. If the writer dies, its saves are `Indeterminate`, and the next
//! save starts a new writer. **Requests** and answers carry numbers. **Deadlines.** Every wait for the writer
//! has a deadline. **Memory.** In addition to the arena, one copy of the state for each save under way, until
//! the save is durable. **Sweeps.** An attempt is memory of this process, and nothing of it is left when it
//! is dropped. So a sweep finds only the attempts of writers. **Fork.** A child shares the socket, and does
//! not use it.

mod attempt;
mod frame;
mod handed;
mod link;
mod serve;

pub(crate) use handed::HandedOver;
pub use serve::serve;

use super::local::Local;
use super::name::check_step;
use super::{Reading, Storage, Sweep, Swept, Writing};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::id::Attempt;
use crate::settings::Settings;
use crate::sync::{Mutex, lock};
use attempt::SharedAttempt;
use frame::{Hello, VERSION};
use link::Link;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// The name of the shared memory, for tools that show the memory of a process.
const NAME: &str = "ashore";

/// The program that becomes a writer process. It has to call [`serve`].
///
/// ```
/// use ashore::storage::process::{Process, Program};
/// use ashore::{ErrorKind, Settings};
/// # let root = tempfile::tempdir().unwrap();
/// let program = Program::default().path("/opt/trainer/absent").arguments(["serve-checkpoints"]);
/// let refused = Process::start(root.path(), &Settings::default(), program).unwrap_err();
/// assert_eq!(refused.kind(), ErrorKind::Invalid); // there is no such program
/// ```
#[derive(Clone, Debug)]
#[must_use = "nothing happens until a process is started"]
pub struct Program {
    path: Option<PathBuf>,
    arguments: Vec<String>,
}

impl Default for Program {
    /// `ashore writer`, with the `ashore` beside the executable of this process, or else in `PATH`.
    fn default() -> Self {
        Self { path: None, arguments: vec!["writer".into()] }
    }
}

impl Program {
    /// Sets the path of the program.
    pub fn path(mut self, path: impl Into<PathBuf>) -> Self {
        self.path = Some(path.into());
        self
    }

    /// Sets the arguments of the program. Default: `writer`.
    pub fn arguments(mut self, arguments: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.arguments = arguments.into_iter().map(Into::into).collect();
        self
    }

    fn find(self) -> Result<(PathBuf, Vec<String>)> {
        let Self { path, arguments } = self;
        if let Some(path) = path {
            let missing = || Error::invalid("the program of the writer process is not there").with_path(&path);
            return if path.is_file() { Ok((path, arguments)) } else { Err(missing()) };
        }
        let beside = std::env::current_exe().ok().and_then(|me| me.parent().map(Path::to_owned));
        let search = std::env::var_os("PATH").unwrap_or_default();
        let places = beside.into_iter().chain(std::env::split_paths(&search)).map(|folder| folder.join("ashore"));
        let found = places.into_iter().find(|path| path.is_file()).ok_or_else(|| {
            let what = "the program of the writer process, `ashore`, is neither beside this executable nor in PATH";
            Error::invalid(what)
        })?;
        Ok((found, arguments))
    }
}

/// A root that this process reads and a writer process writes; see the [module](self). Clones share one
/// writer process, which ends with the last clone.
///
/// ```no_run
/// use ashore::storage::process::{Process, Program};
/// use ashore::{CheckpointExecutor, Settings};
/// use std::sync::Arc;
/// let process = Process::start("runs/a", &Settings::default(), Program::default())?;
/// let executor = CheckpointExecutor::builder("runs/a").storage(Arc::new(process)).build()?;
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Process(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    local: Local,
    program: PathBuf,
    arguments: Vec<String>,
    settings: Settings,
    link: Mutex<Option<Arc<Link>>>,
    handed: Arc<HandedOver>,
    origin: ForkGuard,
}

impl Process {
    /// Starts the writer process of `root` and waits until it is ready. Creates the root if it is missing.
    /// The settings control how the process writes, and how long a publish is waited for.
    ///
    /// # Errors
    /// `Invalid` when there is no such program, or when it is not a writer process of this version; errors of
    /// the root.
    pub fn start(root: impl AsRef<Path>, settings: &Settings, program: Program) -> Result<Self> {
        let (program, arguments) = program.find()?;
        let local = Local::open_with(root, settings.engine)?.direct(settings.direct).locks(settings.locks);
        let (settings, link, handed, origin) = (settings.clone(), Mutex::new(None), Arc::default(), ForkGuard::new());
        let inner = Inner { local, program, arguments, settings, link, handed, origin };
        inner.link()?;
        Ok(Self(Arc::new(inner)))
    }

    /// The process id of the writer. None if the last writer has died and no new one is running.
    pub fn pid(&self) -> Option<u32> {
        lock(&self.0.link).as_ref().and_then(|link| link.pid())
    }

    /// The attempts that were handed to the writer process.
    pub(crate) fn handed(&self) -> &Arc<HandedOver> {
        &self.0.handed
    }
}

impl Inner {
    /// Returns the writer process. Starts a new one if the last has died.
    fn link(&self) -> Result<Arc<Link>> {
        self.origin.check("a writer process cannot be used in a forked child; start a new one there")?;
        let mut slot = lock(&self.link);
        if let Some(link) = slot.as_ref().filter(|link| !link.is_dead()) {
            return Ok(link.clone());
        }
        let hello = Hello {
            version: VERSION,
            root: std::path::absolute(self.local.path()).map_err(|e| Error::io("the root has no path", e))?,
            engine: self.settings.engine,
            direct: self.settings.direct,
            locks: self.settings.locks,
            priority: self.settings.priority,
        };
        let mut command = Command::new(&self.program);
        command.args(&self.arguments);
        let link = Link::start(command, &hello).map_err(|e| e.with_path(&self.program))?;
        Ok(slot.insert(link).clone())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // A forked child shares the socket, and must not close the connection of its parent's writer process.
        if self.origin.is_ours()
            && let Some(link) = lock(&self.link).take()
        {
            link.close();
        }
    }
}

impl Storage for Process {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        check_step(name)?;
        if !overwrite && self.0.local.open(name).is_ok() {
            return Err(Error::new(ErrorKind::Conflict, "the step exists").with_path(self.0.local.describe(name)));
        }
        Ok(Arc::new(SharedAttempt::new(self.0.clone(), name, attempt)?))
    }
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.0.local.open(name)
    }
    fn list(&self) -> Result<Vec<String>> {
        self.0.local.list()
    }
    fn confirm(&self, name: &str) -> Result<()> {
        self.0.local.confirm(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.0.local.remove(name)
    }
    fn remove_opened(&self, name: &str, opened: &dyn Reading) -> Result<()> {
        self.0.local.remove_opened(name, opened)
    }
    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.0.local.sweep(how)
    }
    fn hint(&self, name: &str) -> Result<()> {
        self.0.local.hint(name)
    }
    fn read_marks(&self) -> Result<Option<Vec<u8>>> {
        self.0.local.read_marks()
    }
    fn write_marks(&self, marks: &[u8]) -> Result<()> {
        self.0.local.write_marks(marks)
    }
    fn engine(&self) -> &'static str {
        "a writer process"
    }
    fn describe(&self, name: &str) -> PathBuf {
        self.0.local.describe(name)
    }
}
