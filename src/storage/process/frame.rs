//! The messages between a training program and its writer process: frames of JSON over a socket, some with a
//! descriptor.

use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::settings::{Engine, Locks, Priority};
use crate::wire::WireError;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

/// The version of the protocol, which must be the same on both sides.
pub(super) const VERSION: u32 = 2;
/// Maximum length of a message.
const LONGEST: u32 = 64 << 20;

/// The first message.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub version: u32,
    pub root: PathBuf,
    pub engine: Engine,
    pub direct: bool,
    pub locks: Locks,
    pub priority: Priority,
}

/// An attempt to be written and published. Its bytes are in the shared memory whose descriptor is sent with
/// this message.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Request {
    pub id: u64,
    pub name: String,
    pub attempt: Attempt,
    pub overwrite: bool,
    /// The files, in the order in which they are written.
    pub files: Vec<SharedFile>,
}

/// The stage of a request that a reply reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(super) enum Stage {
    /// The publish. If it failed, this is the only reply.
    Published,
    /// The tidying after the publish: everything of the attempt except its step is deleted.
    Settled,
}

/// A file in shared memory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SharedFile {
    pub name: String,
    pub offset: u64,
    pub length: u64,
    /// The file is written whole, by [`Writing::put`](crate::storage::Writing::put).
    pub put: bool,
}

/// The result of a request. The hello has the number 0.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    pub id: u64,
    pub of: Stage,
    pub result: Result<(), WireError>,
}

/// Sends a message, and a descriptor with it.
pub(super) fn send(socket: &mut UnixStream, message: &impl Serialize, with: Option<BorrowedFd<'_>>) -> Result<()> {
    let lost = |e| Error::io("a message to or from the writer process was lost", e).with_kind(ErrorKind::Unavailable);
    let body = serde_json::to_vec(message).map_err(|e| Error::internal("a message has no json").with_source(e))?;
    let length = u32::try_from(body.len()).ok().filter(|length| *length <= LONGEST);
    let header = length.ok_or_else(|| Error::invalid(format!("a message is too long bytes={}", body.len())))?;
    let header = header.to_le_bytes();
    let mut space = [const { MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let descriptors: Vec<_> = with.into_iter().collect();
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Error::internal("no room for a descriptor"));
    }
    let sent =
        sendmsg(&*socket, &[IoSlice::new(&header)], &mut control, SendFlags::NOSIGNAL).map_err(|e| lost(e.into()))?;
    socket.write_all(&header[sent..]).map_err(lost)?;
    socket.write_all(&body).map_err(lost)
}

/// Receives the next message, and the descriptor that was sent with it. None if the other side is gone.
pub(super) fn receive<T: DeserializeOwned>(socket: &mut UnixStream) -> Result<Option<(T, Option<OwnedFd>)>> {
    let lost = |e| Error::io("a message to or from the writer process was lost", e).with_kind(ErrorKind::Unavailable);
    let mut header = [0; 4];
    let mut space = [const { MaybeUninit::uninit() }; rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        match recvmsg(&*socket, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other.map_err(|e| lost(e.into()))?.bytes,
        }
    };
    if got == 0 {
        return Ok(None);
    }
    let mut with = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(descriptors) = message {
            with = descriptors.last().or(with);
        }
    }
    socket.read_exact(&mut header[got..]).map_err(lost)?;
    let length = u32::from_le_bytes(header);
    if length > LONGEST {
        return Err(Error::invalid(format!("a message is too long bytes={length}")));
    }
    let mut body = vec![0; length as usize];
    socket.read_exact(&mut body).map_err(lost)?;
    let message = serde_json::from_slice(&body);
    Ok(Some((message.map_err(|e| Error::invalid("a message cannot be read").with_source(e))?, with)))
}
