//! Version 1 of the format, which this library reads but no longer writes. Its `manifest.json` has every
//! file, tensor, value and digest of a step.

use super::entries::{FileEntry, TensorEntry};
use super::{invariants, seal, unique};
use crate::error::{Error, Result};
use crate::id::Attempt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The manifest of a step. Only [`Manifest::parse`] checks it in full.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always "ashore".
    pub format: String,
    /// The version of the format: 1.
    pub version: u32,
    /// The step.
    pub step: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// How many ranks wrote the step.
    pub world: u32,
    /// User metadata, encoded by [`crate::state::encode_value`].
    #[serde(deserialize_with = "unique::values")]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Values, encoded by [`crate::state::encode_value`].
    #[serde(deserialize_with = "unique::values")]
    pub values: BTreeMap<String, serde_json::Value>,
    /// Every file of the step except the manifest.
    pub files: Vec<FileEntry>,
    /// Every tensor, sorted by name.
    pub tensors: Vec<TensorEntry>,
}

impl Manifest {
    /// Parses a manifest, and checks its digest and all [`invariants`]. The memory used is at most a constant
    /// times the length of `bytes`.
    ///
    /// # Errors
    /// `Corrupt` for bytes that are not a manifest; `Invalid` for an intact manifest of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        match seal::open(bytes)? {
            (1, json) => Self::read(&json),
            (version, _) => Err(seal::unknown(version)),
        }
    }

    /// Reads the JSON text of a manifest whose digest matches.
    pub(super) fn read(json: &[u8]) -> Result<Self> {
        let manifest: Self =
            serde_json::from_slice(json).map_err(|e| Error::corrupt("a manifest cannot be read").with_source(e))?;
        manifest.check()?;
        Ok(manifest)
    }

    /// Checks the manifest's own fields, and all [`invariants`] of its files and tensors.
    ///
    /// # Errors
    /// `Corrupt`, with file, tensor and range of the violation.
    fn check(&self) -> Result<()> {
        if self.format != "ashore" || self.version != 1 || self.world == 0 {
            let (format, world) = (&self.format, self.world);
            return Err(Error::corrupt(format!("not a manifest of this library format={format:?} world={world}")));
        }
        invariants::check_layout(&self.files, &self.tensors)
    }

    /// The bytes of `manifest.json`, unchecked.
    ///
    /// # Errors
    /// `Internal` when a value is not JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self).map_err(|e| Error::internal("cannot write json").with_source(e))?;
        text.pop();
        Ok(seal::seal(text))
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        let at = self.tensors.binary_search_by(|t| t.name.as_str().cmp(name)).ok()?;
        self.tensors.get(at)
    }
}
