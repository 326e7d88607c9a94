//! The files of a version that is a delta: `manifest.json`, and the columns in a plain safetensors file.

use super::pack::SUFFIX;
use super::{Form, How, Numbers, longest};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::format::shard::HeaderTemplate;
use crate::format::{seal, unique};
use crate::id::Attempt;
use crate::state::{Dtype, Layout};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The name of the file with the columns.
pub const FILE: &str = "delta.safetensors";

/// The version of the format of deltas.
const VERSION: u32 = 1;
const FORMAT: &str = "ashore-delta";

/// The first bytes of the manifest of a delta.
const BEGIN: &[u8] = br#"{"format":"ashore-delta","version":"#;

/// Returns true when these are the first bytes of the manifest of a delta.
pub fn is_delta(bytes: &[u8]) -> bool {
    bytes.starts_with(BEGIN)
}

/// The version that a delta is applied to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    pub version: u64,
    pub attempt: Attempt,
    /// The digest of the whole state.
    pub state: Digest,
}

/// The manifest of a delta.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    format: String,
    version: u32,
    /// The number of the version.
    pub number: u64,
    /// The attempt that wrote the version.
    pub attempt: Attempt,
    /// The version that the delta is applied to.
    pub base: Base,
    /// The digest of the whole state that results.
    pub state: Digest,
    /// The form of its columns.
    pub form: Form,
    /// The length of the file with the columns.
    pub bytes: u64,
    /// The metadata of the program.
    #[serde(deserialize_with = "unique::values")]
    pub metadata: BTreeMap<String, serde_json::Value>,
    /// The values of the state.
    #[serde(deserialize_with = "unique::values")]
    pub values: BTreeMap<String, serde_json::Value>,
    /// The tensors that changed, in ascending order of their names.
    pub tensors: Vec<Entry>,
}

/// A tensor that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub how: How,
    /// How many elements changed.
    pub changed: u64,
    /// The digest of the tensor before.
    pub base: Digest,
    /// The digest of the tensor after.
    pub result: Digest,
    pub columns: Vec<Column>,
}

/// A column of a tensor that changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Column {
    /// Its name in the safetensors file.
    pub name: String,
    /// The range of its bytes in the file.
    pub begin: u64,
    pub length: u64,
    /// Its length before compression.
    pub plain: u64,
    /// The digest of its bytes in the file.
    pub digest: Digest,
}

impl Entry {
    /// Returns the numbers of its elements, and the count of elements.
    pub fn numbers(&self) -> Result<(Numbers, u64)> {
        let numbers = Numbers::of(self.dtype);
        let bytes = Layout::new(self.dtype, &self.shape).bytes().map_err(|_| {
            Error::corrupt(format!("a tensor of a delta cannot have this shape tensor={:?}", self.name))
        })?;
        Ok((numbers, bytes / numbers.width as u64))
    }
}

impl Manifest {
    /// Makes the manifest of a delta without tensors.
    pub fn new(number: u64, attempt: Attempt, base: Base, state: Digest, form: Form) -> Self {
        let (format, version, bytes, tensors) = (FORMAT.into(), VERSION, 0, Vec::new());
        let (metadata, values) = Default::default();
        Self { format, version, number, attempt, base, state, form, bytes, metadata, values, tensors }
    }

    /// Names the columns and places them one after the other. Returns the header of the file.
    ///
    /// # Errors
    /// `Invalid` when the header would be longer than readers accept.
    pub fn lay_out(&mut self) -> Result<HeaderTemplate> {
        let mut taken: BTreeSet<String> = BTreeSet::new();
        // A whole tensor keeps its name. Columns of other tensors get names that do not collide with it.
        let whole = self.tensors.iter().filter(|entry| entry.how == How::Whole).map(|entry| entry.name.clone());
        let kept: BTreeSet<String> = whole.collect();
        let mut end = 0;
        for entry in &mut self.tensors {
            for (column, suffix) in entry.columns.iter_mut().zip(entry.how.columns()) {
                let packed = if self.form == Form::Zstd { SUFFIX } else { "" };
                let mut name = format!("{}{suffix}{packed}", entry.name);
                let whole = entry.how == How::Whole && packed.is_empty();
                while !whole && kept.contains(&name) || taken.contains(&name) {
                    name.push('~');
                }
                taken.insert(name.clone());
                (column.name, column.begin) = (name, end);
                end += column.length;
            }
        }
        let described = self.described();
        let columns = described.iter().map(|(name, dtype, shape, range)| (*name, *dtype, &shape[..], range.clone()));
        let header = HeaderTemplate::new(columns)?;
        for column in self.tensors.iter_mut().flat_map(|entry| &mut entry.columns) {
            column.begin += header.len();
        }
        self.bytes = header.len() + end;
        Ok(header)
    }

    /// Returns the header entry of each column. Offsets count from the start of the data.
    fn described(&self) -> Vec<(&str, Dtype, Vec<usize>, Range<u64>)> {
        let mut described = Vec::new();
        for entry in &self.tensors {
            for (number, column) in entry.columns.iter().enumerate() {
                let changed = entry.changed as usize;
                let plain = (Dtype::U8, vec![column.length as usize]);
                let (dtype, shape) = match (entry.how, number) {
                    _ if self.form == Form::Zstd => plain,
                    (How::Whole, _) => (entry.dtype, entry.shape.clone()),
                    (How::Indices, 0) if column.length == entry.changed * 4 => (Dtype::I32, vec![changed]),
                    (How::Indices, 0) => (Dtype::I64, vec![changed]),
                    (How::Indices, _) => (entry.dtype, vec![changed]),
                    _ => plain,
                };
                described.push((&*column.name, dtype, shape, column.begin..column.begin + column.length));
            }
        }
        described
    }

    /// Returns the sealed bytes of the manifest.
    ///
    /// # Errors
    /// `Internal` when the manifest cannot be encoded as JSON.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self).map_err(|e| Error::internal("cannot write json").with_source(e))?;
        text.pop();
        Ok(seal::seal(text))
    }

    /// Reads and checks a manifest. After that, every length in the manifest is possible for its tensors, and
    /// every column lies in the file.
    ///
    /// # Errors
    /// `Corrupt` when the manifest is damaged or contradicts itself; `Invalid` when its version is unknown.
    pub fn parse(bytes: &[u8]) -> Result<Self> {
        let Some(text) = seal::unseal(bytes) else {
            let why = "the manifest of a delta is damaged or incomplete: its digest does not fit";
            return Err(Error::corrupt(format!("{why} bytes={}", bytes.len())));
        };
        let version = text.strip_prefix(BEGIN).and_then(|rest| {
            let digits = rest.get(..rest.iter().position(|byte| !byte.is_ascii_digit())?)?;
            std::str::from_utf8(digits).ok()?.parse::<u64>().ok()
        });
        match version {
            None => return Err(Error::corrupt("the manifest of a delta does not begin with its format and version")),
            Some(version) if version != u64::from(VERSION) => {
                let why = "the delta has a version that this library does not read";
                return Err(Error::invalid(format!("{why} version={version} supported={VERSION}")));
            }
            Some(_) => {}
        }
        let json = [text, b"}"].concat();
        let manifest: Self = serde_json::from_slice(&json)
            .map_err(|e| Error::corrupt("the manifest of a delta cannot be read").with_source(e))?;
        manifest.check()?;
        Ok(manifest)
    }

    fn check(&self) -> Result<()> {
        let (number, base) = (self.number, self.base.version);
        if self.format != FORMAT || base >= number {
            return Err(Error::corrupt(format!("a delta must follow its base version={number} base={base}")));
        }
        if !self.tensors.is_sorted_by(|a, b| a.name < b.name) {
            return Err(Error::corrupt("the tensors of a delta are not in ascending order"));
        }
        let mut end = 0;
        for entry in &self.tensors {
            end = entry.check(self.form, end, self.bytes).map_err(|error| {
                Error::corrupt(format!("{} tensor={:?}", error.message(), entry.name)).with_step(number)
            })?;
        }
        Ok(())
    }
}

impl Entry {
    /// Checks that the columns of the entry lie behind `end`, one after the other, in a file of the length
    /// `file`. Returns the end of the last column.
    fn check(&self, form: Form, mut end: u64, file: u64) -> Result<u64> {
        let (numbers, elements) = self.numbers()?;
        if self.changed == 0 || self.changed > elements {
            return Err(Error::corrupt("a delta cannot change as many elements as it says"));
        }
        if self.columns.len() != self.how.columns().len() || self.how == How::Indices && !numbers.whole {
            return Err(Error::corrupt("a delta has other columns than it says"));
        }
        for (number, column) in self.columns.iter().enumerate() {
            let most = longest(self.how, number, elements, numbers.width as u64, self.changed);
            // The most bytes that zstd adds to bytes that it cannot compress.
            let most_stored = if form == Form::Zstd { most.saturating_add(most / 128 + 512) } else { column.plain };
            if column.begin < end {
                return Err(Error::corrupt("the columns of a delta overlap, or are not in order"));
            }
            end = column.begin.saturating_add(column.length);
            if column.plain > most || column.length > most_stored || end > file {
                return Err(Error::corrupt("a column of a delta is longer than it can be"));
            }
            if form != Form::Zstd && column.length != column.plain {
                return Err(Error::corrupt("a column of a delta has two lengths"));
            }
        }
        Ok(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn columns_that_overlap_or_cannot_be_so_long_are_refused() {
        let attempt = Attempt::new();
        let state = Digest::of(b"");
        let entry = |name: &str| Entry {
            name: name.into(),
            dtype: Dtype::U8,
            shape: vec![1000],
            how: How::Whole,
            changed: 1000,
            base: state,
            result: state,
            columns: vec![Column { name: String::new(), begin: 0, length: 1000, plain: 1000, digest: state }],
        };
        let made = |change: &dyn Fn(&mut Manifest)| {
            let mut manifest = Manifest::new(2, attempt, Base { version: 1, attempt, state }, state, Form::Zstd);
            manifest.tensors = vec![entry("a"), entry("b")];
            manifest.lay_out().unwrap();
            change(&mut manifest);
            Manifest::parse(&manifest.to_bytes().unwrap()).map_err(|error| error.kind())
        };
        made(&|_| {}).unwrap();
        let overlapping = made(&|manifest| manifest.tensors[1].columns[0].begin -= 1);
        assert_eq!(overlapping, Err(ErrorKind::Corrupt));
        let huge = made(&|manifest| {
            let entry = &mut manifest.tensors[1];
            (entry.shape, entry.changed) = (vec![usize::MAX / 2, 2], u64::MAX - 1);
            (entry.columns[0].plain, entry.columns[0].length) = (u64::MAX, u64::MAX);
        });
        assert_eq!(huge, Err(ErrorKind::Corrupt));
    }
}
