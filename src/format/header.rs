//! Parses the header of a shard, for `verify` and for readers that do not trust the program that wrote the
//! file.

use super::shard::{PREFIX, header_len, identity};
use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::state::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use std::collections::{BTreeMap, btree_map};
use std::fmt;
use std::marker::PhantomData;
use std::ops::Range;

/// The header of a shard, read and checked in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The step that the shard belongs to.
    pub step: u64,
    /// The attempt that the shard belongs to.
    pub attempt: Attempt,
    /// The tensors in order of their bytes.
    pub tensors: Vec<HeaderTensor>,
}

/// A tensor in a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeaderTensor {
    /// The tensor's name.
    pub name: String,
    /// The tensor's dtype.
    pub dtype: Dtype,
    /// The tensor's shape.
    pub shape: Vec<usize>,
    /// The range of the tensor's bytes, counted from the end of the header.
    pub offsets: Range<u64>,
    /// In a shard of a sharded step, the index in the tensor at which this box begins.
    pub at: Option<Vec<usize>>,
}

impl Header {
    /// Parses `bytes`, a whole header with its prefix, of a file of `file_len` bytes.
    ///
    /// # Errors
    /// `Corrupt` for a header that the safetensors format forbids (offsets that overlap, leave holes, or do
    /// not end where the file does; sizes that do not fit dtype and shape; a duplicate key), or that this
    /// library never writes.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Self> {
        let len = header_len(bytes)?;
        if len != bytes.len() as u64 {
            let got = bytes.len();
            return Err(Error::corrupt(format!(
                "a header has the wrong length expected_bytes={len} found_bytes={got}"
            )));
        }
        let (step, attempt) = identity(bytes)?;
        let corrupt = || Error::corrupt("the header of a shard cannot be read");
        let Entries(info, entries) = serde_json::from_slice(&bytes[PREFIX..]).map_err(|e| corrupt().with_source(e))?;
        let mut entries: Vec<_> = entries.into_iter().collect();
        entries.sort_by_key(|(_, entry)| entry.data_offsets);
        let mut tensors: Vec<_> = entries.iter().map(HeaderTensor::new).collect();
        if let Some(info) = info.offsets {
            let Unique(offsets) = serde_json::from_str(&info).map_err(|e| corrupt().with_source(e))?;
            place(&mut tensors, offsets)?;
        }
        let stock = entries.into_iter().map(|(name, entry)| (name, entry.stock())).collect();
        let metadata = Metadata::new(None, stock).map_err(|e| corrupt().with_source(e))?;
        let end = (metadata.data_len() as u64).checked_add(len);
        if end != Some(file_len) {
            return Err(Error::corrupt(format!(
                "a shard does not end where its last tensor does data={len} tensors={} file={file_len}",
                metadata.data_len()
            )));
        }
        Ok(Self { step, attempt, tensors })
    }
}

impl HeaderTensor {
    fn new((name, entry): &(String, Entry)) -> Self {
        let (start, end) = entry.data_offsets;
        let offsets = start as u64..end as u64;
        Self { name: name.clone(), dtype: entry.dtype, shape: entry.shape.clone(), offsets, at: None }
    }
}

/// Gives each tensor the index at which its box begins. The offsets must have one index for each tensor, and
/// no others.
fn place(tensors: &mut [HeaderTensor], mut offsets: BTreeMap<String, Saved>) -> Result<()> {
    let refuse = |why: &str, name: &str| Err(Error::corrupt(format!("{why} tensor={name:?}")));
    for tensor in tensors {
        let Some(Saved { saved_offsets: at }) = offsets.remove(&tensor.name) else {
            return refuse("a shard does not say where the box of a tensor begins", &tensor.name);
        };
        let mut ends = at.iter().zip(&tensor.shape).map(|(at, extent)| at.checked_add(*extent));
        if at.len() != tensor.shape.len() || ends.any(|end| end.is_none()) {
            return refuse("the box of a tensor cannot begin there", &tensor.name);
        }
        tensor.at = Some(at);
    }
    offsets.keys().next().map_or(Ok(()), |name| refuse("a shard places a tensor that it does not hold", name))
}

/// The strings of `__metadata__`. The stamp has been compared byte by byte.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Strings {
    #[serde(rename = "format")]
    _format: IgnoredAny,
    #[serde(rename = "ashore_step")]
    _step: IgnoredAny,
    #[serde(rename = "ashore_attempt")]
    _attempt: IgnoredAny,
    #[serde(rename = "DCP_VERSION")]
    _version: Option<IgnoredAny>,
    /// JSON in a string.
    #[serde(rename = "DCP_SHARDING_INFO")]
    offsets: Option<String>,
}

/// An entry of `DCP_SHARDING_INFO`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    saved_offsets: Vec<usize>,
}

/// A tensor entry of a header.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl Entry {
    /// Converts the entry for the safetensors crate, which checks it.
    fn stock(self) -> TensorInfo {
        TensorInfo { dtype: self.dtype.stock(), shape: self.shape, data_offsets: self.data_offsets }
    }
}

/// `__metadata__`, which comes first, and the tensors of a header.
struct Entries(Strings, BTreeMap<String, Entry>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(EntriesVisitor)
    }
}

struct EntriesVisitor;

impl<'de> Visitor<'de> for EntriesVisitor {
    type Value = Entries;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
        // The first key is `__metadata__`, because the stamp was compared byte by byte.
        let Some((IgnoredAny, strings)) = map.next_entry()? else {
            return Err(A::Error::custom("no metadata"));
        };
        Ok(Entries(strings, distinct(map)?))
    }
}

/// A map in which no key occurs twice. The safetensors crate and serde would take the last duplicate.
struct Unique<T>(BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Unique<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Distinct<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Distinct<T> {
            type Value = Unique<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Unique<T>, A::Error> {
                distinct(map).map(Unique)
            }
        }
        deserializer.deserialize_map(Distinct(PhantomData))
    }
}

/// The rest of a map of tensors.
fn distinct<'de, T: Deserialize<'de>, A: MapAccess<'de>>(mut map: A) -> Result<BTreeMap<String, T>, A::Error> {
    let mut tensors = BTreeMap::new();
    while let Some((name, entry)) = map.next_entry::<String, T>()? {
        match tensors.entry(name) {
            btree_map::Entry::Vacant(free) if free.key() != "__metadata__" => free.insert(entry),
            free_or_taken => {
                return Err(A::Error::custom(format!("duplicate key key={:?}", free_or_taken.key())));
            }
        };
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::super::shard::stamp;
    use super::*;
    use crate::ErrorKind;

    /// A header in which the JSON text `text` follows the stamp.
    fn forged(text: &str) -> Vec<u8> {
        forged_after("\"}", text)
    }

    fn forged_after(metadata: &str, text: &str) -> Vec<u8> {
        let text = format!("{}{metadata}{text}", stamp(7, Attempt::default()));
        [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
    }

    #[test]
    fn hostile_headers_are_refused() {
        let tensor = |name, offsets| format!(r#","{name}":{{"dtype":"U8","shape":[4],"data_offsets":[{offsets}]}}"#);
        let whole = |text: String| Header::parse(&forged(&text), forged(&text).len() as u64 + 8);
        let (a, b) = (tensor("a", "0,4"), tensor("b", "4,8"));
        assert_eq!(whole(format!("{a}{b}}}")).unwrap().tensors.len(), 2);
        assert_eq!(whole(format!("{b}{a}}}  \n")).unwrap().tensors[0].name, "a", "sorted by offset");
        for (why, text) in [
            ("a key twice", format!("{a}{}}}", tensor("a", "4,8"))),
            ("metadata twice", format!(r#"{a}{b},"__metadata__":{{}}}}"#)),
            ("metadata as a tensor", format!("{a}{}}}", tensor("__metadata__", "4,8"))),
            ("an unknown field", format!("{a}{}}}", b.replace("shape", "stride\":[],\"shape"))),
            ("a field twice", format!("{a}{}}}", b.replace("[4]", "[4],\"shape\":[4]"))),
            ("overlap", format!("{a}{}}}", tensor("b", "3,7"))),
            ("a hole", format!("{a}{}}}", tensor("b", "5,9"))),
            ("missing bytes", format!("{a}}}")),
            ("backwards", format!("{a}{}}}", tensor("b", "8,4"))),
            ("a wrong size", format!("{a}{}}}", tensor("b", "4,9"))),
            ("an overflow", format!("{a}{}}}", b.replace("[4]", "[9223372036854775808,2]"))),
            ("a huge number", format!("{a}{}}}", tensor("b", "4,99999999999999999999"))),
            ("a negative number", format!("{a}{}}}", tensor("b", "-4,8"))),
            ("an unknown dtype", format!("{a}{}}}", b.replace("U8", "U9"))),
            ("something after the end", format!("{a}{b}}}{{}}")),
            ("no end", format!("{a}{b}")),
            ("depth", format!(r#"{a},"b":{}"#, "[".repeat(1 << 20))),
        ] {
            let refused = whole(text).expect_err(why);
            assert_eq!(refused.kind(), ErrorKind::Corrupt, "{why}: {refused}");
        }
        for length in [0, 1, 100_000_001, u64::MAX] {
            assert!(header_len(&length.to_le_bytes()).is_err(), "{length}");
        }
        let mut bytes = forged("}");
        *bytes.last_mut().unwrap() = 0xff;
        assert!(Header::parse(&bytes, bytes.len() as u64).is_err(), "not utf-8");
    }

    #[test]
    fn hostile_places_of_boxes_are_refused() {
        let tensor = r#","a":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]}}"#;
        let parse = |info: &str| {
            let quoted = serde_json::to_string(info).unwrap();
            let header = forged_after(&format!(r#"","DCP_VERSION":"1.0","DCP_SHARDING_INFO":{quoted}}}"#), tensor);
            Header::parse(&header, header.len() as u64 + 4)
        };
        let read = parse(r#"{"a":{"saved_offsets":[6,0]}}"#).unwrap();
        assert_eq!(read.tensors[0].at, Some(vec![6, 0]));
        for (why, info) in [
            ("nothing", ""),
            ("no tensor", "{}"),
            ("another tensor", r#"{"b":{"saved_offsets":[6,0]}}"#),
            ("one too many", r#"{"a":{"saved_offsets":[6,0]},"b":{"saved_offsets":[6,0]}}"#),
            ("twice", r#"{"a":{"saved_offsets":[6,0]},"a":{"saved_offsets":[6,0]}}"#),
            ("other dimensions", r#"{"a":{"saved_offsets":[6]}}"#),
            ("an overflow", r#"{"a":{"saved_offsets":[18446744073709551615,0]}}"#),
            ("a negative place", r#"{"a":{"saved_offsets":[-1,0]}}"#),
            ("an unknown key", r#"{"a":{"saved_offsets":[6,0],"x":1}}"#),
            ("something after it", r#"{"a":{"saved_offsets":[6,0]}}{}"#),
        ] {
            let refused = parse(info).expect_err(why);
            assert_eq!(refused.kind(), ErrorKind::Corrupt, "{why}: {refused}");
        }
    }
}
