//! The messages of a save by several ranks. Each is one line of JSON, at most 256 bytes unless it carries an
//! error.

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::ranks::MAX_MESSAGE;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Maximum length of an error's message on the wire, so that a message with one fits [`MAX_MESSAGE`] however
/// its text is escaped.
const MAX_TEXT: usize = 512;

/// What a rank wants to save: the message of [`Phase::Agree`](crate::ranks::Phase::Agree).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Vote {
    pub step: u64,
    /// The name of the step.
    pub name: String,
    pub overwrite: bool,
    /// The digest of the rank's description of its state.
    pub structure: Digest,
    /// Why the rank cannot save.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireError>,
}

/// What rank 0 decides about a save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Decision {
    /// The attempt has begun; every rank writes by the plan with this digest.
    Go { plan: Digest },
    /// The ranks exchange descriptions first.
    Plan,
    /// The save does not begin, because the save of step `by` was unfinished.
    Skipped { by: u64 },
    /// The save does not begin, because the save of step `by` replaced it.
    Superseded { by: u64 },
    /// The save fails on every rank.
    Failed(WireError),
}

/// What a rank has made durable: the message of [`Phase::Receipt`](crate::ranks::Phase::Receipt).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Receipt {
    pub step: u64,
    pub attempt: Attempt,
    /// The digest of the plan that it wrote by.
    pub plan: Digest,
    /// Bytes of its files.
    pub bytes: u64,
    /// The length of its note with the rows of its files.
    pub rows: u64,
    /// The digest of that note.
    pub digest: Digest,
}

/// A rank's receipt, or the reason why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Report {
    Written(Receipt),
    Failed(WireError),
}

/// How a save ended, as rank 0 tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The step is durable.
    Durable,
    /// The save failed; the attempt will never be published.
    Failed(WireError),
    /// It is unknown whether the step is durable.
    Unknown(WireError),
}

impl Verdict {
    /// The outcome on a rank whose files are part of the step.
    pub fn into_result(self) -> Result<()> {
        match self {
            Self::Durable => Ok(()),
            Self::Failed(error) => Err(error.into_error()),
            Self::Unknown(error) => Err(error.into_error().with_kind(ErrorKind::Indeterminate)),
        }
    }
}

/// An error on its way between ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct WireError {
    kind: String,
    message: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    ranks: Vec<u32>,
}

impl WireError {
    /// An error of `rank`, unless the error names others.
    pub fn of(error: &Error, rank: u32) -> Self {
        /// Named at most; the others are as many as the ranks of a job.
        const RANKS: usize = 64;
        let mut message = error.message().to_owned();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            message = format!("{message}: {error}");
            cause = error.source();
        }
        let end = (0..=MAX_TEXT.min(message.len())).rev().find(|end| message.is_char_boundary(*end)).unwrap_or(0);
        message.truncate(end);
        let ranks = if error.ranks().is_empty() { vec![rank] } else { error.ranks().to_vec() };
        Self { kind: name(error.kind()).into(), message, ranks: ranks.into_iter().take(RANKS).collect() }
    }

    /// Whether `rank` is one of the ranks concerned.
    pub fn names(&self, rank: u32) -> bool {
        self.ranks.contains(&rank)
    }

    /// The error, on the rank that received it.
    pub fn into_error(self) -> Error {
        let kind = KINDS.iter().find(|kind| name(**kind) == self.kind).copied().unwrap_or(ErrorKind::Unavailable);
        Error::new(kind, self.message).with_ranks(self.ranks)
    }
}

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

fn name(kind: ErrorKind) -> &'static str {
    match kind {
        ErrorKind::Invalid => "invalid",
        ErrorKind::NotFound => "not_found",
        ErrorKind::Conflict => "conflict",
        ErrorKind::Busy => "busy",
        ErrorKind::NoSpace => "no_space",
        ErrorKind::Unavailable => "unavailable",
        ErrorKind::Corrupt => "corrupt",
        ErrorKind::Device => "device",
        ErrorKind::Cancelled => "cancelled",
        ErrorKind::Deadline => "deadline",
        ErrorKind::Indeterminate => "indeterminate",
        ErrorKind::Internal => "internal",
    }
}

/// Encodes a message.
///
/// # Errors
/// `Invalid` when it is too long: a step's name is.
pub(crate) fn encode(message: &impl Serialize) -> Result<Vec<u8>> {
    let bytes = serde_json::to_vec(message).map_err(|e| Error::internal("cannot write a message").with_source(e))?;
    if bytes.len() <= MAX_MESSAGE {
        return Ok(bytes);
    }
    Err(Error::invalid(format!("a message between ranks is too long bytes={} limit={MAX_MESSAGE}", bytes.len())))
}

/// Decodes a message of `rank`.
///
/// # Errors
/// `Corrupt`, naming the rank.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8], rank: u32) -> Result<T> {
    serde_json::from_slice(bytes).map_err(|error| {
        Error::corrupt("a message of a rank cannot be read: do all ranks run the same version?")
            .with_source(error)
            .with_ranks([rank])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_keeps_kind_text_and_ranks() {
        for kind in KINDS {
            let error = Error::new(kind, "cannot write").with_step(3).with_ranks([4, 5]);
            let wire: WireError = decode(&encode(&WireError::of(&error, 1)).unwrap(), 1).unwrap();
            let read = wire.into_error().with_step(3);
            assert_eq!((read.kind(), read.to_string()), (kind, error.to_string()));
        }
        let own = WireError::of(&Error::invalid("x"), 7).into_error();
        assert_eq!(own.ranks(), [7]);
    }

    #[test]
    fn every_message_fits() {
        let long = Error::invalid("\u{1}\u{e9}".repeat(4000)).with_ranks(0..100_000);
        let wire = WireError::of(&long, 0);
        assert!(encode(&Report::Failed(wire.clone())).unwrap().len() <= MAX_MESSAGE);
        let vote = Vote {
            step: u64::MAX,
            name: "step-18446744073709551615".into(),
            overwrite: false,
            structure: Digest::of(b"x"),
            error: None,
        };
        let receipt = Receipt {
            step: u64::MAX,
            attempt: Attempt::new(),
            plan: Digest::of(b"x"),
            bytes: u64::MAX,
            rows: u64::MAX,
            digest: Digest::of(b"y"),
        };
        assert!(encode(&vote).unwrap().len() <= 256);
        assert!(encode(&Report::Written(receipt)).unwrap().len() <= 256);
        let named = Vote { name: "n".repeat(5000), ..vote };
        assert_eq!(encode(&named).unwrap_err().kind(), ErrorKind::Invalid);
        assert_eq!(decode::<Vote>(b"[]", 3).unwrap_err().ranks(), [3]);
    }
}
