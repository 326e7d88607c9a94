//! The socket to a writer process. Callers send requests, and a thread receives the answers.

use super::frame::{Hello, Reply, Request, Stage, receive, send};
use crate::completion::{Cell, Completion, deadline_after};
use crate::error::{Error, ErrorKind, Result};
use crate::sync::{Arc, Mutex, lock};
use crate::thread::spawn;
use crate::wire::WireError;
use std::collections::HashMap;
use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a writer process may take to report that it is ready, and to end when it is told to.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// A writer process, and the requests that it was sent.
#[derive(Debug)]
pub(super) struct Link {
    socket: Mutex<UnixStream>,
    child: Mutex<Child>,
    waiting: Mutex<HashMap<(u64, Stage), Cell<()>>>,
    next: AtomicU64,
    dead: AtomicBool,
}

impl Link {
    /// Starts the process, and waits until it is ready.
    ///
    /// # Errors
    /// `Invalid` when the program is not a writer process of this version.
    pub fn start(mut command: Command, hello: &Hello) -> Result<std::sync::Arc<Self>> {
        let busy = |e| Error::io("a writer process cannot be started", e);
        let (mut ours, theirs) = UnixStream::pair().map_err(busy)?;
        command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
        let child = command.spawn().map_err(busy)?;
        // The command holds the other end of the socket. As long as this process has that end open, no thread
        // notices that the child is gone.
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
        let greeting: Cell<()> = Arc::new(Completion::new());
        let greeted = send(&mut ours, hello, None);
        let link = std::sync::Arc::new(link(ours));
        lock(&link.waiting).insert((0, Stage::Published), greeting.clone());
        let listening = link.clone();
        spawn("ashore-answers".into(), move || listening.listen(answers))?;
        let silent = || Err(Error::new(ErrorKind::Deadline, format!("a writer process is silent waited={PATIENCE:?}")));
        greeted.and_then(|()| greeting.wait(deadline_after(PATIENCE)).unwrap_or_else(silent)).map_err(|error| {
            // The program started and is not a writer process: it ended before or after the hello was sent.
            let gone = matches!(error.kind(), ErrorKind::Indeterminate | ErrorKind::Unavailable);
            if gone { error.with_kind(ErrorKind::Invalid) } else { error }
        })?;
        Ok(link)
    }

    /// The body of the thread that receives answers until the process is gone.
    fn listen(&self, mut answers: UnixStream) {
        while let Ok(Some((reply, _))) = receive::<Reply>(&mut answers) {
            if let Some(cell) = lock(&self.waiting).remove(&(reply.id, reply.of)) {
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
            let what = format!("the writer process is gone, and it is unknown how the save ended status={status:?}");
            cell.complete(Err(Error::new(ErrorKind::Indeterminate, what)));
        }
    }

    /// The number of the process, while it lives.
    pub fn pid(&self) -> Option<u32> {
        if self.is_dead() { None } else { Some(lock(&self.child).id()) }
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    /// Sends a request, and returns the cells of its answers.
    pub fn ask(&self, request: &mut Request, shared: &File) -> Result<(Cell<()>, Cell<()>)> {
        let (published, settled): (Cell<()>, Cell<()>) = (Arc::new(Completion::new()), Arc::new(Completion::new()));
        request.id = self.next.fetch_add(1, Ordering::Relaxed);
        let stages = [(Stage::Published, &published), (Stage::Settled, &settled)];
        lock(&self.waiting).extend(stages.map(|(stage, cell)| ((request.id, stage), cell.clone())));
        let mut socket = lock(&self.socket);
        if let Err(error) = send(&mut socket, request, Some(shared.as_fd())) {
            // After half a message the socket cannot be used any more.
            let _ = socket.shutdown(Shutdown::Both);
            self.forget(request.id);
            return Err(error);
        }
        drop(socket);
        if self.dead.load(Ordering::Acquire) {
            // The listening thread may have ended before the request was added.
            let what = "the writer process is gone, and it is unknown how the save ended";
            let gone = Error::new(ErrorKind::Indeterminate, what);
            [&published, &settled].into_iter().for_each(|cell| _ = cell.complete(Err(gone.clone())));
        }
        Ok((published, settled))
    }

    /// Stops waiting for further answers to this request.
    pub fn forget(&self, id: u64) {
        lock(&self.waiting).retain(|(there, _), _| *there != id);
    }

    /// Tells the process to end once it has carried out its requests. Waits only for a limited time, and
    /// never kills it.
    pub fn close(&self) {
        let _ = lock(&self.socket).shutdown(Shutdown::Write);
        let deadline = Instant::now() + PATIENCE;
        while matches!(lock(&self.child).try_wait(), Ok(None)) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
