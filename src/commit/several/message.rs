//! The messages of a save by several ranks. Each is one line of JSON, at most 256 bytes unless it carries an
//! error.

use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::id::Attempt;
use crate::ranks::MAX_MESSAGE;
use crate::wire::WireError;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// What a rank wants to save: the message of [`Phase::Agree`](crate::ranks::Phase::Agree).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Vote {
    /// The rank has no part of a plan for its structure, and waits for one.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fresh: bool,
    pub step: u64,
    /// The name of the step.
    pub name: String,
    pub overwrite: bool,
    /// The digest of the rank's description of its state.
    pub structure: Digest,
    /// The reason, if the rank cannot save.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<WireError>,
}

/// The decision of rank 0 about a save.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Decision {
    /// The attempt has begun. Every rank writes according to the plan with this digest.
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
    /// The digest of the plan that the rank followed.
    pub plan: Digest,
    /// The length of its files in bytes.
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

/// The outcome of a save, as rank 0 tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The step is durable.
    Durable,
    /// The save failed, and the attempt will never be published.
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

/// Encodes a message.
///
/// # Errors
/// `Invalid` when the message is too long, because the name of the step is too long.
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

/// Reads bytes as each kind of message. Panics if an accepted message changes when it is written and read
/// again.
pub(crate) fn read_any(bytes: &[u8]) {
    fn read<T: DeserializeOwned + Serialize + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
        let Ok(message) = decode::<T>(bytes, 0) else { return };
        let again = serde_json::to_vec(&message).expect("what was read can be written");
        assert_eq!(decode::<T>(&again, 0).ok(), Some(message));
    }
    read::<Vote>(bytes);
    read::<Decision>(bytes);
    read::<Report>(bytes);
    read::<Verdict>(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_fits() {
        let long = Error::invalid("\u{1}\u{e9}".repeat(4000)).with_step(u64::MAX).with_path("\u{1}".repeat(100));
        let long = long.with_ranks(u32::MAX - 100_000..u32::MAX);
        assert!(encode(&Report::Failed(WireError::of_rank(&long, 0))).unwrap().len() <= MAX_MESSAGE);
        assert!(WireError::of_rank(&Error::invalid("x"), 7).names(7));
        let vote = Vote {
            fresh: true,
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
