//! The training program's side: a storage whose attempts are staged in shared memory, and handed to the writer process to be
//! written and published.

use super::super::future::HandedOver;
use super::frame::{Hello, Reply, Request, SharedFile, VERSION, receive, send};
use crate::compat::wire::WireError;
use crate::completion::{Cell, Completion, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::ForkGuard;
use crate::id::Attempt;
use crate::settings::{IoMode, Settings};
use crate::storage::local::Local;
use crate::storage::{FileWriting, Reading, Storage, Sweep, Swept, Writing};
use crate::sync::{Arc as CellArc, Mutex, lock};
use crate::writer::spawn;
use rustix::fs::{MemfdFlags, memfd_create};
use std::collections::HashMap;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a writer process may take to say that it is there, and to end when it is told to.
const PATIENCE: Duration = Duration::from_secs(30);

/// The root, read here and written by the writer process.
#[derive(Debug)]
pub(super) struct Remote {
    local: Local,
    program: PathBuf,
    arguments: Vec<String>,
    settings: Settings,
    link: Mutex<Option<Arc<Link>>>,
    pub handed: Arc<HandedOver>,
    origin: ForkGuard,
}

impl Remote {
    /// Starts the writer process.
    pub fn start(root: PathBuf, settings: Settings, program: PathBuf, arguments: Vec<String>) -> Result<Arc<Self>> {
        let local = Local::open_with(&root, settings.engine)?.direct(settings.direct);
        let (link, handed) = (Mutex::new(None), Arc::default());
        let origin = ForkGuard::new();
        let remote = Self { local, program, arguments, settings, link, handed, origin };
        remote.link()?;
        Ok(Arc::new(remote))
    }

    /// The process, if it lives.
    pub fn pid(&self) -> Option<u32> {
        let link = lock(&self.link);
        link.as_ref().filter(|link| !link.dead.load(Ordering::Acquire)).map(|link| lock(&link.child).id())
    }

    /// The writer process; a new one when the last has died.
    fn link(&self) -> Result<Arc<Link>> {
        let mut slot = lock(&self.link);
        match &*slot {
            Some(link) if !link.dead.load(Ordering::Acquire) => Ok(link.clone()),
            _ => {
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
                Ok(slot.insert(Link::start(command, &hello).map_err(|e| e.with_path(&self.program))?).clone())
            }
        }
    }
}

/// A writer process and what it was asked.
#[derive(Debug)]
struct Link {
    socket: Mutex<UnixStream>,
    child: Mutex<Child>,
    waiting: Mutex<HashMap<u64, Cell<()>>>,
    next: AtomicU64,
    dead: AtomicBool,
}

impl Link {
    fn start(mut command: Command, hello: &Hello) -> Result<Arc<Self>> {
        let busy = |e| Error::io("a writer process cannot be started", e);
        let (mut ours, theirs) = UnixStream::pair().map_err(busy)?;
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let child = command.spawn().map_err(busy)?;
        // The command has the other end of the socket: as long as it is open here, nobody hears that the child is gone.
        drop(command);
        let answers = ours.try_clone().map_err(busy)?;
        ours.set_write_timeout(Some(PATIENCE)).map_err(busy)?;
        let link = |ours| Self {
            socket: Mutex::new(ours),
            child: Mutex::new(child),
            waiting: Mutex::default(),
            next: AtomicU64::new(1),
            dead: AtomicBool::new(false),
        };
        let greeting: Cell<()> = CellArc::new(Completion::new());
        let greeted = send(&mut ours, hello, None);
        let link = Arc::new(link(ours));
        lock(&link.waiting).insert(0, greeting.clone());
        let listening = link.clone();
        spawn("ashore-answers".into(), move || listening.listen(answers))?;
        let silent = || Err(Error::new(ErrorKind::Deadline, format!("a writer process is silent waited={PATIENCE:?}")));
        greeted.and_then(|()| greeting.wait(deadline_after(PATIENCE)).unwrap_or_else(silent)).map_err(|error| {
            // Started, and not what we took it for: it went before or after it was greeted.
            let gone = matches!(error.kind(), ErrorKind::Indeterminate | ErrorKind::Unavailable);
            if gone { error.with_kind(ErrorKind::Invalid) } else { error }
        })?;
        Ok(link)
    }

    /// The thread that hears answers, until the process is gone.
    fn listen(&self, mut answers: UnixStream) {
        while let Ok(Some((reply, _))) = receive::<Reply>(&mut answers) {
            if let Some(cell) = lock(&self.waiting).remove(&reply.id) {
                cell.complete(reply.result.map_err(WireError::into_error));
            }
        }
        self.dead.store(true, Ordering::Release);
        let _ = answers.shutdown(Shutdown::Both);
        let ended = Instant::now() + Duration::from_secs(1);
        let status = loop {
            match lock(&self.child).try_wait() {
                Ok(None) if Instant::now() < ended => {}
                other => break other,
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        for (_, cell) in lock(&self.waiting).drain() {
            let what = format!("the writer process is gone, and nobody knows how the save ended status={status:?}");
            cell.complete(Err(Error::new(ErrorKind::Indeterminate, what)));
        }
    }

    /// Hands over a request, and returns the cell of its answer.
    fn ask(&self, request: &mut Request, shared: &File) -> Result<Cell<()>> {
        let cell: Cell<()> = CellArc::new(Completion::new());
        request.id = self.next.fetch_add(1, Ordering::Relaxed);
        lock(&self.waiting).insert(request.id, cell.clone());
        let mut socket = lock(&self.socket);
        if let Err(error) = send(&mut socket, request, Some(shared.as_fd())) {
            // Half a message is nothing to go on with.
            let _ = socket.shutdown(Shutdown::Both);
            lock(&self.waiting).remove(&request.id);
            return Err(error);
        }
        drop(socket);
        if self.dead.load(Ordering::Acquire) {
            // Whoever listened may have gone before the request was there to be answered.
            let what = "the writer process is gone, and nobody knows how the save ended";
            cell.complete(Err(Error::new(ErrorKind::Indeterminate, what)));
        }
        Ok(cell)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        if !self.origin.is_ours() {
            return; // a forked child shares the socket: the parent's writer process must not hear that it is closed
        }
        let Some(link) = lock(&self.link).take() else { return };
        // The process ends once it has done what it was asked; it is not waited for beyond reason, and never killed.
        let _ = lock(&link.socket).shutdown(Shutdown::Write);
        let deadline = Instant::now() + PATIENCE;
        while matches!(lock(&link.child).try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Storage for Arc<Remote> {
    fn begin(&self, name: &str, attempt: Attempt, overwrite: bool) -> Result<Arc<dyn Writing>> {
        if !overwrite && self.local.open(name).is_ok() {
            return Err(Error::new(ErrorKind::Conflict, "the step exists").with_path(self.local.describe(name)));
        }
        let memory = memfd_create("ashore", MemfdFlags::CLOEXEC);
        let memory = memory.map_err(|e| Error::io("shared memory cannot be made", e.into()))?;
        let staged = Staged { files: Vec::new(), end: 0 };
        let (remote, name) = (self.clone(), name.to_owned());
        let memory = Arc::new(File::from(memory));
        Ok(Arc::new(SharedAttempt { remote, name, attempt, memory, staged: Mutex::new(staged) }))
    }
    fn open(&self, name: &str) -> Result<Arc<dyn Reading>> {
        self.local.open(name)
    }
    fn list(&self) -> Result<Vec<String>> {
        self.local.list()
    }
    fn confirm(&self, name: &str) -> Result<()> {
        self.local.confirm(name)
    }
    fn remove(&self, name: &str) -> Result<()> {
        self.local.remove(name)
    }
    fn remove_opened(&self, name: &str, opened: &dyn Reading) -> Result<()> {
        self.local.remove_opened(name, opened)
    }
    fn sweep(&self, how: Sweep) -> Result<Swept> {
        self.local.sweep(how)
    }
    fn hint(&self, name: &str) -> Result<()> {
        self.local.hint(name)
    }
    fn engine(&self) -> &'static str {
        "a writer process"
    }
    fn describe(&self, name: &str) -> PathBuf {
        self.local.describe(name)
    }
}

/// An attempt in shared memory.
#[derive(Debug)]
struct SharedAttempt {
    remote: Arc<Remote>,
    name: String,
    attempt: Attempt,
    memory: Arc<File>,
    staged: Mutex<Staged>,
}

#[derive(Debug)]
struct Staged {
    files: Vec<SharedFile>,
    end: u64,
}

impl SharedAttempt {
    /// Room for a file.
    fn add(&self, name: &str, length: u64, put: bool) -> Result<u64> {
        let mut staged = lock(&self.staged);
        let offset = staged.end;
        let room = length.checked_next_multiple_of(crate::ALIGNMENT as u64).and_then(|room| offset.checked_add(room));
        let end = room.ok_or_else(|| Error::invalid("a file is too long for shared memory").with_path(name))?;
        self.memory.set_len(end).map_err(|e| Error::io("shared memory cannot be had", e))?;
        staged.end = end;
        staged.files.push(SharedFile { name: name.into(), offset, length, put });
        Ok(offset)
    }
}

impl Writing for SharedAttempt {
    fn create(&self, file: &str, len: u64) -> Result<Arc<dyn FileWriting>> {
        let base = self.add(file, len, false)?;
        Ok(Arc::new(InMemory { memory: self.memory.clone(), base }))
    }

    fn put(&self, file: &str, bytes: &[u8]) -> Result<()> {
        let base = self.add(file, bytes.len() as u64, true)?;
        InMemory { memory: self.memory.clone(), base }.write_at(0, bytes)
    }

    fn publish(&self, overwrite: bool) -> Result<()> {
        let files = lock(&self.staged).files.clone();
        let mut request = Request { id: 0, name: self.name.clone(), attempt: self.attempt, overwrite, files };
        let answer = self.remote.link()?.ask(&mut request, &self.memory)?;
        self.remote.handed.done(self.attempt);
        let timeout = self.remote.settings.save_timeout;
        answer.wait(deadline_after(timeout)).unwrap_or_else(|| {
            let what = format!("the writer process has not answered waited={timeout:?}");
            Err(Error::new(ErrorKind::Indeterminate, what))
        })
    }

    fn settle(&self) -> Result<()> {
        Ok(())
    }

    fn abandon(&self) -> Result<()> {
        Ok(())
    }
}

impl Drop for SharedAttempt {
    fn drop(&mut self) {
        self.remote.handed.forget(self.attempt);
    }
}

/// A file in shared memory.
#[derive(Debug)]
struct InMemory {
    memory: Arc<File>,
    base: u64,
}

impl FileWriting for InMemory {
    fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let written = self.memory.write_all_at(bytes, self.base + offset);
        written.map_err(|e| Error::io("shared memory cannot be written", e))
    }

    fn seal(&self) -> Result<()> {
        Ok(())
    }

    fn mode(&self) -> IoMode {
        IoMode::Buffered
    }
}
