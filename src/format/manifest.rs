//! `manifest.json`: it identifies the save of a step, and has its values and the list of the tables that have
//! the rest.
//!
//! The manifest is JSON that begins with its version and ends with its own digest. So a reader detects every
//! flipped bit, and can tell a later version from damage.

use super::columns::{FILES_TABLE, TENSORS_TABLE};
use super::seal::{self, VERSION};
use super::table::MAX_TABLE;
use super::{unique, v1};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::id::Attempt;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use uuid::Uuid;

/// The manifest of a step. A manifest of version 1 is converted to this type, without tables, beside its
/// entries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Always "ashore".
    pub format: String,
    /// The version of the format.
    pub version: u32,
    /// The step.
    pub step: u64,
    /// The attempt that was published.
    pub attempt: Attempt,
    /// The session of the ranks that wrote the step; None for a step of one rank.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session: Option<Uuid>,
    /// The number of that session in its root.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// How many ranks wrote the step.
    pub world: u32,
    /// User metadata, encoded by [`crate::state::encode_value`].
    #[serde(deserialize_with = "unique::values")]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// Values that all ranks share, encoded in the same way.
    #[serde(deserialize_with = "unique::values")]
    pub values: BTreeMap<String, serde_json::Value>,
    /// The total length of all files of the step except the manifest itself, tables included.
    pub bytes: u64,
    /// `tensors.table`, and also `files.table` if the tables are split.
    pub tables: Vec<TableEntry>,
}

/// A table that the manifest names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableEntry {
    /// The name of its file.
    pub name: String,
    /// The length of its file.
    pub length: u64,
    /// The digest of its header and of its column `pages`.
    pub digest: Digest,
}

/// A manifest of a known version.
#[derive(Clone, Debug, PartialEq)]
pub enum Sealed {
    /// Version 1.
    One(v1::Manifest),
    /// Version 2.
    Two(Manifest),
}

impl Sealed {
    /// Parses a manifest, and checks its digest and everything that the manifest itself contains. The memory
    /// used is at most a constant times the length of `bytes`.
    ///
    /// # Errors
    /// `Corrupt` for bytes that are not a manifest; `Invalid` for an intact manifest of another version.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        match seal::open(bytes)? {
            (1, json) => v1::Manifest::read(&json).map(Self::One),
            (2, json) => {
                let manifest: Manifest = serde_json::from_slice(&json)
                    .map_err(|e| Error::corrupt("a manifest cannot be read").with_source(e))?;
                manifest.check()?;
                Ok(Self::Two(manifest))
            }
            (version, _) => Err(seal::unknown(version)),
        }
    }

    /// The step.
    pub fn step(&self) -> u64 {
        match self {
            Self::One(old) => old.step,
            Self::Two(manifest) => manifest.step,
        }
    }
}

impl Manifest {
    /// Creates a manifest of a step of one rank, still without tables.
    pub fn new(step: u64, attempt: Attempt) -> Self {
        Self {
            format: "ashore".into(),
            version: VERSION,
            step,
            attempt,
            session: None,
            generation: None,
            world: 1,
            metadata: BTreeMap::new(),
            values: BTreeMap::new(),
            bytes: 0,
            tables: Vec::new(),
        }
    }

    fn check(&self) -> Result<()> {
        let Self { format, version, world, .. } = self;
        if format != "ashore" || *version != VERSION || *world == 0 {
            return Err(Error::corrupt(format!("not a manifest of this library format={format:?} world={world}")));
        }
        if self.session.is_some() != self.generation.is_some() {
            return Err(Error::corrupt("a manifest has a session without a generation, or the reverse"));
        }
        let names: Vec<&str> = self.tables.iter().map(|table| table.name.as_str()).collect();
        if names != [TENSORS_TABLE] && names != [TENSORS_TABLE, FILES_TABLE] {
            return Err(Error::corrupt(format!("a manifest names other tables than it should tables={names:?}")));
        }
        if let Some(long) = self.tables.iter().find(|table| table.length > MAX_TABLE) {
            return Err(Error::corrupt(format!("a table cannot have this length bytes={}", long.length)));
        }
        Ok(())
    }

    /// The bytes of `manifest.json`.
    ///
    /// # Errors
    /// `Internal` when a value is not JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self).map_err(|e| Error::internal("cannot write json").with_source(e))?;
        text.pop();
        Ok(seal::seal(text))
    }
}

impl From<&v1::Manifest> for Manifest {
    fn from(old: &v1::Manifest) -> Self {
        let (metadata, values) = (old.metadata.clone(), old.values.clone());
        let bytes = old.files.iter().map(|file| file.length).sum();
        Self { version: old.version, world: old.world, metadata, values, bytes, ..Self::new(old.step, old.attempt) }
    }
}
