//! The interface of a storage for several processes that write one step together.
//!
//! **Protocol.** A *session* is one set of living processes; the newest session recorded in a root owns it.
//! Rank 0 begins an attempt, the other ranks join it, and each rank writes its own files and makes their
//! names durable. Rank 0 then *claims* the attempt, which takes the attempt out of reach of vetoes. It checks
//! that its session still is the newest, and publishes. Only rank 0 begins or publishes an attempt.
//! **Crash.** A new session records itself, removes the attempts of older sessions, and only then lists
//! steps. A process of an older session that goes on later finds that its session is not the newest, or that
//! its attempt is gone. **Cancellation.** A rank that has promised its files and does not learn the outcome
//! *vetoes*: once its veto is durable, the attempt can never be published.

use super::Writing;
use crate::error::Result;
use crate::id::Attempt;
use serde::{Deserialize, Serialize};
use std::fmt::Debug;
use std::sync::Arc;
use uuid::Uuid;

/// The record of a session in a root.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRecord {
    /// The session.
    pub session: Uuid,
    /// The run that its processes are part of.
    pub token: String,
    /// The host of rank 0, for messages.
    pub host: String,
    /// The process id of rank 0, for messages.
    pub pid: u32,
    /// The nonce of every rank.
    pub nonces: Vec<Uuid>,
}

/// An attempt that several ranks write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedAttempt<'a> {
    /// The name of the step.
    pub name: &'a str,
    /// Its identity, the same on all ranks.
    pub attempt: Attempt,
    /// The generation of the session.
    pub generation: u64,
}

/// A storage that several processes share.
///
/// Every process sees the operations on names in the same order, and a listing shows what returned before it
/// began.
pub trait Shared: Send + Sync + Debug {
    /// Records a session as the newest owner of the root, durably, and returns its generation. Two sessions
    /// never have the same generation.
    fn open_session(&self, record: &SessionRecord) -> Result<u64>;

    /// The newest generation, and its record if it can be read; None if there is no session.
    fn newest(&self) -> Result<Option<(u64, Option<SessionRecord>)>>;

    /// Takes the root over: durably renames away every attempt of sessions before `generation`, so that none
    /// of these attempts can be published any more, and deletes the notes of these sessions.
    fn take_over(&self, generation: u64) -> Result<()>;

    /// Begins an attempt on rank 0.
    ///
    /// # Errors
    /// `Conflict` when the step exists and `overwrite` is false.
    fn begin(&self, attempt: SharedAttempt<'_>, overwrite: bool) -> Result<Arc<dyn SharedWriting>>;

    /// Opens the attempt that rank 0 began.
    ///
    /// # Errors
    /// `NotFound` when there is no such attempt: rank 0 withdrew it, or this process sees another directory.
    fn join(&self, attempt: SharedAttempt<'_>) -> Result<Arc<dyn SharedWriting>>;

    /// Writes a note of the session with this generation, atomically: other ranks read all of it or nothing.
    /// The note need not survive a crash.
    fn put_note(&self, generation: u64, name: &str, bytes: &[u8]) -> Result<()>;

    /// Reads a note of at most `limit` bytes; None if there is none.
    fn note(&self, generation: u64, name: &str, limit: u64) -> Result<Option<Vec<u8>>>;

    /// Deletes a note, if it exists.
    fn delete_note(&self, generation: u64, name: &str) -> Result<()>;
}

/// An attempt that several ranks write, as one of these ranks has it open.
pub trait SharedWriting: Writing {
    /// Makes the names of the files that this process created durable.
    fn sync_names(&self) -> Result<()>;

    /// On rank 0, before the publish: makes the names of this rank's files durable, and takes the attempt out
    /// of reach of vetoes.
    ///
    /// # Errors
    /// `Cancelled` when the attempt is gone, because a rank vetoed it or another session took the root over.
    fn claim(&self) -> Result<()>;

    /// Forbids the publish, durably, if the attempt has not been claimed.
    fn veto(&self) -> Result<Vetoed>;
}

/// The effect of a veto.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vetoed {
    /// The attempt will never be published.
    Done,
    /// The veto came too late: the attempt was claimed, published or removed, and its outcome is unknown
    /// here.
    TooLate,
}
