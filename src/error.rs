//! The crate's error type: what the caller can do about it, what was attempted, and where.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What the caller can do about an [`Error`]. A new kind is added only if callers would act differently.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request is wrong: change the call, the setting or the input.
    Invalid,
    /// The requested step, tensor or file does not exist.
    NotFound,
    /// The step exists already, or another attempt at it won.
    Conflict,
    /// Too much is in flight at present; the same call can succeed later.
    Busy,
    /// The medium or the quota is full. Older steps are intact; a later save works once there is space.
    NoSpace,
    /// The medium failed (an I/O error, a read-only mount). Retry later, or check the machine.
    Unavailable,
    /// Stored bytes are not what was written.
    Corrupt,
    /// The device failed. Saves that were staged still commit.
    Device,
    /// The save was cancelled, or its executor was dropped before it was done.
    Cancelled,
    /// The deadline passed first.
    Deadline,
    /// The publish began and its outcome is unknown: the step may or may not survive a crash. Never counted
    /// as durable.
    Indeterminate,
    /// A bug in this crate.
    Internal,
}

/// A cloneable error: kind, what was attempted, step, rank, path and source.
///
/// Every future and waiter of one save gets the same error. Messages are lower case, variables last as
/// `key=value`. `{}` prints this error, [`source`](std::error::Error::source) returns its cause; `{:#}` and
/// `{:?}` print both in one line:
/// ```
/// use ashore::{Error, ErrorKind};
/// let full = std::io::Error::from_raw_os_error(28);
/// let error = Error::new(ErrorKind::NoSpace, "cannot write a chunk chunk=3").with_step(7).with_source(full);
/// assert_eq!(error.to_string(), "cannot write a chunk chunk=3 step=7");
/// assert_eq!(format!("{error:#}"), "cannot write a chunk chunk=3 step=7: No space left on device (os error 28)");
/// ```
#[derive(Clone)]
pub struct Error(Arc<Inner>);

#[derive(Clone)]
struct Inner {
    kind: ErrorKind,
    message: String,
    step: Option<u64>,
    ranks: Vec<u32>,
    path: Option<PathBuf>,
    source: Option<Arc<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Creates an error. `message` says in lower case what was attempted and what was wrong.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Arc::new(Inner { kind, message: message.into(), step: None, ranks: Vec::new(), path: None, source: None }))
    }

    /// Creates an error from the error of a system call. The error code decides the kind.
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => ErrorKind::NoSpace,
            Some(libc::ENOENT | libc::ESTALE) => ErrorKind::NotFound,
            Some(libc::EEXIST | libc::ENOTEMPTY) => ErrorKind::Conflict,
            Some(
                libc::EACCES
                | libc::EPERM
                | libc::ENOTDIR
                | libc::ENAMETOOLONG
                | libc::ELOOP
                | libc::EINVAL
                | libc::EISDIR,
            ) => ErrorKind::Invalid,
            _ => ErrorKind::Unavailable,
        };
        Self::new(kind, message).with_source(source)
    }

    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    pub(crate) fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal, message)
    }

    /// Returns what the caller can do about the error.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns true if the same call may succeed later: `Busy`, `NoSpace` and `Unavailable`.
    pub fn is_transient(&self) -> bool {
        matches!(self.kind(), ErrorKind::Busy | ErrorKind::NoSpace | ErrorKind::Unavailable)
    }

    /// Returns what was attempted and what was wrong, without step, path and source.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The step that was being saved or restored.
    pub fn step(&self) -> Option<u64> {
        self.0.step
    }

    /// The rank on which the error occurred. None if no rank is known, or several are.
    pub fn rank(&self) -> Option<u32> {
        if let [rank] = self.ranks() { Some(*rank) } else { None }
    }

    /// The ranks concerned, in ascending order: ranks that failed, or that are missing at a deadline. Empty
    /// if the ranks are not known.
    pub fn ranks(&self) -> &[u32] {
        &self.0.ranks
    }

    /// The file or directory concerned.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Replaces the kind.
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        Arc::make_mut(&mut self.0).kind = kind;
        self
    }

    /// Adds the step, unless one is known.
    pub fn with_step(mut self, step: u64) -> Self {
        Arc::make_mut(&mut self.0).step.get_or_insert(step);
        self
    }

    /// Adds the rank, unless one is known.
    pub fn with_rank(self, rank: u32) -> Self {
        self.with_ranks([rank])
    }

    /// Adds the ranks concerned, unless some are known.
    pub fn with_ranks(mut self, ranks: impl IntoIterator<Item = u32>) -> Self {
        if self.0.ranks.is_empty() {
            let mut ranks: Vec<u32> = ranks.into_iter().collect();
            ranks.sort_unstable();
            ranks.dedup();
            Arc::make_mut(&mut self.0).ranks = ranks;
        }
        self
    }

    /// Adds the path, unless one is known. The innermost caller adds its path first, and that path is the
    /// most exact.
    pub fn with_path(mut self, path: impl Into<PathBuf>) -> Self {
        Arc::make_mut(&mut self.0).path.get_or_insert_with(|| path.into());
        self
    }

    /// Logs that a save failed with this error, which no call has returned.
    pub(crate) fn log_unseen(&self) {
        tracing::error!(error = format_args!("{self:#}"), "a save failed, and no call has returned its error");
    }

    /// Adds the cause of `error`, for callers whose message replaces that of `error`.
    pub(crate) fn with_source_of(mut self, error: &Self) -> Self {
        Arc::make_mut(&mut self.0).source = error.0.source.clone();
        self
    }

    /// Adds the cause.
    pub fn with_source(mut self, source: impl std::error::Error + Send + Sync + 'static) -> Self {
        Arc::make_mut(&mut self.0).source = Some(Arc::new(source));
        self
    }
}

/// Returns None instead of the error that something does not exist.
pub(crate) fn found<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        result => result.map(Some),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(step) = self.0.step {
            write!(f, " step={step}")?;
        }
        write_ranks(f, &self.0.ranks)?;
        if let Some(path) = &self.0.path {
            write!(f, " path={}", path.display())?;
        }
        if !f.alternate() {
            return Ok(());
        }
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Writes ` rank=3`, or runs as in ` ranks=1,4..7`, where both ends are included.
fn write_ranks(f: &mut fmt::Formatter<'_>, ranks: &[u32]) -> fmt::Result {
    if ranks.is_empty() {
        return Ok(());
    }
    f.write_str(if ranks.len() == 1 { " rank=" } else { " ranks=" })?;
    let runs = ranks.chunk_by(|a, b| a.checked_add(1) == Some(*b));
    for (i, run) in runs.enumerate() {
        let comma = if i > 0 { "," } else { "" };
        match run {
            [first, .., last] => write!(f, "{comma}{first}..{last}")?,
            [only] => write!(f, "{comma}{only}")?,
            [] => {}
        }
    }
    Ok(())
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self:#}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_deref().map(|e| e as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_printed_as_runs() {
        let error = |ranks: &[u32]| Error::invalid("late").with_ranks(ranks.iter().copied()).to_string();
        assert_eq!(error(&[]), "late");
        assert_eq!(error(&[3]), "late rank=3");
        assert_eq!(error(&[7, 5, 1, 6, 4, 4]), "late ranks=1,4..7");
        assert_eq!(error(&[u32::MAX, 0]), "late ranks=0,4294967295");
        let named = Error::invalid("late").with_ranks([1, 2]).with_rank(9);
        assert_eq!((named.rank(), named.ranks()), (None, &[1, 2][..]), "the first one to name ranks knows best");
    }
}
