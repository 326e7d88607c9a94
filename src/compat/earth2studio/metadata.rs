//! Metadata of a row: named values of any serde type, kept exactly.

use super::errors::CheckpointSerializationError;
use crate::error::{Error, ErrorKind, Result};
use crate::state::{decode_value, encode_value};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;

/// Named values.
///
/// ```
/// use ashore::compat::earth2studio::Metadata;
/// let metadata = Metadata::new().set("lead_time", &6)?.set("model", "fcn")?;
/// assert_eq!(metadata.get::<u32>("lead_time")?, 6);
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metadata(pub(super) BTreeMap<String, Value>);

impl Metadata {
    /// Empty metadata.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a value, replacing an earlier one of this name.
    ///
    /// # Errors
    /// `Invalid` from a [`CheckpointSerializationError`]: the name is empty, or the value cannot be kept
    /// exactly.
    pub fn set(mut self, name: impl Into<String>, value: &(impl Serialize + ?Sized)) -> Result<Self> {
        let name = name.into();
        let refuse = |why: String| CheckpointSerializationError { name: name.clone(), why }.error();
        if name.is_empty() {
            return Err(refuse("metadata needs a name".into()));
        }
        let encoded = encode_value(value).map_err(|e| refuse(format!("{e:#}")))?;
        self.0.insert(name, encoded);
        Ok(self)
    }

    /// The value of this name.
    ///
    /// # Errors
    /// `NotFound` when there is none, `Invalid` when it is not a `T`.
    pub fn get<T: DeserializeOwned>(&self, name: &str) -> Result<T> {
        let missing = || Error::new(ErrorKind::NotFound, format!("no such metadata name={name:?}"));
        decode_value(self.0.get(name).ok_or_else(missing)?)
    }

    /// Every name, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// True when there are no values.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
