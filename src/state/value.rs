//! Values: any serde type as JSON, exactly.

use crate::error::{Error, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Encodes a value as JSON.
pub fn encode(value: &(impl Serialize + ?Sized)) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::invalid("cannot be written as json").with_source(e))
}

/// Decodes what [`encode`] wrote.
pub fn decode<T: DeserializeOwned>(value: &serde_json::Value) -> Result<T> {
    T::deserialize(value).map_err(|e| Error::invalid("is not of this type").with_source(e))
}
