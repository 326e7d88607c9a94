//! Errors in a form that can be sent to another rank or process.

use crate::error::{Error, ErrorKind};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

const KINDS: [ErrorKind; 12] = [
    ErrorKind::Invalid,
    ErrorKind::NotFound,
    ErrorKind::Conflict,
    ErrorKind::Busy,
    ErrorKind::NoSpace,
    ErrorKind::Unavailable,
    ErrorKind::Corrupt,
    ErrorKind::Device,
    ErrorKind::Cancelled,
    ErrorKind::Deadline,
    ErrorKind::Indeterminate,
    ErrorKind::Internal,
];

/// An [`Error`] as data. Its message includes the messages of its sources.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WireError {
    kind: String,
    message: String,
    step: Option<u64>,
    ranks: Vec<u32>,
    path: Option<PathBuf>,
}

impl From<&Error> for WireError {
    fn from(error: &Error) -> Self {
        let sources = std::iter::successors(std::error::Error::source(error), |error| error.source());
        let message = sources.fold(error.message().to_owned(), |message, source| format!("{message}: {source}"));
        Self {
            kind: format!("{:?}", error.kind()),
            message,
            step: error.step(),
            ranks: error.ranks().to_vec(),
            path: error.path().map(Into::into),
        }
    }
}

/// Limits of the text and the path of an error, so that it fits a message between ranks however the text is
/// escaped.
const MAX_TEXT: usize = 400;
const MAX_PATH: usize = 100;
const MAX_RANKS: usize = 64;

// There is no `From` for `Error`: a second `From` implementation would break type inference where users rely
// on there being one.
impl WireError {
    /// An error that names `rank`, unless it names other ranks already. It is cut to fit a message between
    /// ranks.
    pub fn of_rank(error: &Error, rank: u32) -> Self {
        let mut this = Self::from(&error.clone().with_rank(rank));
        let end = (0..=MAX_TEXT.min(this.message.len())).rev().find(|end| this.message.is_char_boundary(*end));
        this.message.truncate(end.unwrap_or(0));
        this.ranks.truncate(MAX_RANKS);
        this.path = this.path.filter(|path| path.as_os_str().len() <= MAX_PATH);
        this
    }

    /// Whether `rank` is one of the ranks that the error names.
    pub fn names(&self, rank: u32) -> bool {
        self.ranks.contains(&rank)
    }

    /// Converts back to an [`Error`].
    pub fn into_error(self) -> Error {
        let kind = KINDS.into_iter().find(|kind| format!("{kind:?}") == self.kind).unwrap_or(ErrorKind::Internal);
        let mut error = Error::new(kind, self.message).with_ranks(self.ranks);
        if let Some(step) = self.step {
            error = error.with_step(step);
        }
        if let Some(path) = self.path { error.with_path(path) } else { error }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_the_same_on_the_other_side() {
        for kind in KINDS {
            let error = Error::new(kind, "it failed file=7").with_step(3).with_ranks([2, 5]).with_path("/a/b");
            let text = serde_json::to_string(&WireError::from(&error)).unwrap();
            let back = serde_json::from_str::<WireError>(&text).unwrap().into_error();
            assert_eq!((back.kind(), back.to_string()), (kind, error.to_string()));
        }
    }
}
