//! The writer process: receives attempts whose bytes are in shared memory, and publishes them as steps.

use super::frame::{Hello, Reply, Request, Stage, VERSION, receive, send};
use crate::error::{Error, Result};
use crate::memory::AlignedBuffer;
use crate::storage::local::Local;
use crate::storage::{Storage, Writing};
use crate::thread::adopt;
use crate::wire::WireError;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::fs::File;
use std::io::stdin;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// Bytes that are copied at once from shared memory to the medium.
const PIECE: usize = 8 << 20;

/// Serves the program that started this process, over the socket that is the standard input of this process.
/// Returns when that program is gone and all attempts that it handed over are done. `ashore writer` only
/// calls this function.
///
/// # Errors
/// When standard input is not a socket, or the program speaks another version of the protocol. The results of
/// saves go to the program.
pub fn serve() -> Result<()> {
    stand_apart();
    let socket = stdin().as_fd().try_clone_to_owned();
    let mut socket = UnixStream::from(socket.map_err(|e| Error::io("a writer process has no standard input", e))?);
    let Some((hello, _)) = receive::<Hello>(&mut socket)? else { return Ok(()) };
    let opened = open(&hello);
    let result = opened.as_ref().map(|_| ()).map_err(WireError::from);
    send(&mut socket, &Reply { id: 0, of: Stage::Published, result }, None)?;
    let storage = opened?;
    adopt(hello.priority);
    let mut buffer = AlignedBuffer::new(PIECE);
    while let Some((request, shared)) = receive::<Request>(&mut socket)? {
        let shared = shared.map(File::from).ok_or_else(|| Error::invalid("a request without shared memory"));
        let written = shared.and_then(|shared| write(&storage, &request, &shared, &mut buffer));
        let result = written.as_ref().map(|_| ()).map_err(WireError::from);
        if let Err(error) = send(&mut socket, &Reply { id: request.id, of: Stage::Published, result }, None) {
            tracing::warn!(
                error = format_args!("{error:#}"),
                name = request.name,
                "the program has ended and cannot be told how a save ended"
            );
        }
        if let Ok(attempt) = written {
            let tidied = attempt.settle().and_then(|()| storage.hint(&request.name));
            if let Err(error) = &tidied {
                tracing::warn!(error = format_args!("{error:#}"), name = request.name, "could not tidy up");
            }
            let result = tidied.as_ref().map(|_| ()).map_err(WireError::from);
            // Ignore the error: if the program is gone, the step is still there for later programs.
            let _ = send(&mut socket, &Reply { id: request.id, of: Stage::Settled, result }, None);
        }
    }
    Ok(())
}

/// Detaches this process, so that neither its terminal nor a signal to the process group ends it. Only the
/// end of the program does.
fn stand_apart() {
    if let Err(error) = rustix::process::setsid() {
        tracing::warn!(error = format_args!("{error:#}"), "the writer process stays in the session of its program");
    }
    for signal in [SIGTERM, SIGINT] {
        // No code reads the flag, because the served program decides what happens to saves.
        if let Err(error) = signal_hook::flag::register(signal, Arc::default()) {
            tracing::warn!(error = format_args!("{error:#}"), signal, "the writer process would end at a signal");
        }
    }
}

fn open(hello: &Hello) -> Result<Local> {
    if hello.version != VERSION {
        let theirs = hello.version;
        return Err(Error::invalid(format!("the writer process is of another version theirs={theirs} ours={VERSION}")));
    }
    Ok(Local::open_with(&hello.root, hello.engine)?.direct(hello.direct).locks(hello.locks))
}

fn write(storage: &Local, request: &Request, shared: &File, buffer: &mut AlignedBuffer) -> Result<Arc<dyn Writing>> {
    let attempt = storage.begin(&request.name, request.attempt, request.overwrite)?;
    let filled = fill(attempt.as_ref(), request, shared, buffer);
    if let Err(error) = filled {
        if let Err(left) = attempt.abandon() {
            tracing::warn!(error = format_args!("{left:#}"), name = request.name, "an attempt is left for a sweep");
        }
        return Err(error);
    }
    attempt.publish(request.overwrite)?;
    Ok(attempt)
}

fn fill(attempt: &dyn Writing, request: &Request, shared: &File, buffer: &mut AlignedBuffer) -> Result<()> {
    let unreadable = |e| Error::io("shared memory cannot be read", e);
    for file in &request.files {
        if file.put {
            let mut bytes = vec![0; file.length as usize];
            shared.read_exact_at(&mut bytes, file.offset).map_err(unreadable)?;
            attempt.put(&file.name, &bytes)?;
            continue;
        }
        let writing = attempt.create(&file.name, file.length)?;
        let mut at = 0;
        while at < file.length {
            // Rounded up: the bytes behind the end are shared memory, too, and the seal cuts them off.
            let piece = (file.length - at).min(PIECE as u64).next_multiple_of(crate::ALIGNMENT as u64) as usize;
            let bytes = &mut buffer[..piece];
            shared.read_exact_at(bytes, file.offset + at).map_err(unreadable)?;
            writing.write_at(at, bytes)?;
            at += piece as u64;
        }
        writing.seal()?;
    }
    Ok(())
}
