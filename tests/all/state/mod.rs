//! The state dict: tensors and values.

mod kinds;
mod sources;
mod values;
mod values_refused;

use ashore::Result;
use ashore::internal::format::v1::Manifest;
use ashore::internal::state::{decode_value, encode_value};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Puts a value through a manifest and returns what is read back.
fn saved_and_restored<T: Serialize + DeserializeOwned>(value: &T) -> Result<T> {
    let manifest = Manifest {
        format: "ashore".into(),
        version: 1,
        step: 0,
        attempt: ashore::Attempt::new(),
        world: 1,
        metadata: [].into(),
        values: [("value".into(), encode_value(value)?)].into(),
        files: vec![],
        tensors: vec![],
    };
    decode_value(&Manifest::parse(&manifest.to_bytes()?)?.values["value"])
}
