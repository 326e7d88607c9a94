//! Shards: safetensors files whose header names their step and attempt.
//!
//! The header of a shard begins with `__metadata__`, in which step and attempt have fixed offsets. So a
//! header is created once per structure and stamped per save, and a reader identifies a shard by its first
//! 4096 bytes.

use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::memory::ALIGNMENT;
use crate::state::{Dtype, Layout};
use serde::Serialize;
use std::collections::BTreeMap;
use std::io::Write;
use std::ops::Range;

/// The file that maps tensors to files. It is written when there are several shards.
pub const INDEX: &str = "model.safetensors.index.json";

/// The limit of the safetensors format for the header of one file, in bytes.
pub const MAX_HEADER: usize = 100_000_000;

/// The length of the prefix. The prefix is the length of the JSON text.
pub(super) const PREFIX: usize = 8;

/// The JSON text before the step.
const BEFORE_STEP: &str = r#"{"__metadata__":{"format":"pt","ashore_step":""#;

/// The JSON text between step and attempt, after the padding of the step.
const BEFORE_ATTEMPT: &str = r#""ashore_attempt":""#;

/// The JSON text after the attempt in a shard of whole tensors.
const WHOLE: &str = r#""}"#;

/// The JSON text after the attempt in a shard of a sharded step, up to the text that has the offsets. These
/// are the keys of `torch.distributed.checkpoint`.
const SHARDED: &str = r#"","DCP_VERSION":"1.0","DCP_SHARDING_INFO":"#;

/// Bytes of the longest step, its closing quote and the comma. Shorter steps are padded with spaces, which
/// JSON allows there.
const STEP_ROOM: usize = 22;

/// The length of an attempt's text.
const ATTEMPT_ROOM: usize = 36;

/// The length of the text that [`stamp`] makes.
const STAMP: usize = BEFORE_STEP.len() + STEP_ROOM + BEFORE_ATTEMPT.len() + ATTEMPT_ROOM;

/// The first JSON text of a header of this step and attempt; always [`STAMP`] bytes.
pub(super) fn stamp(step: u64, attempt: Attempt) -> String {
    let step = format!("{step}\",");
    format!("{BEFORE_STEP}{step:STEP_ROOM$}{BEFORE_ATTEMPT}{attempt}")
}

/// The part of a header that differs between saves.
#[derive(Clone, Debug)]
pub struct Stamp(String);

impl Stamp {
    /// The stamp of this step and attempt.
    pub fn new(step: u64, attempt: Attempt) -> Self {
        Self(stamp(step, attempt))
    }
}

/// The header of a shard without step and attempt.
#[derive(Clone, Debug)]
pub struct HeaderTemplate {
    bytes: Vec<u8>,
}

impl HeaderTemplate {
    /// Creates the header for `tensors`: name, dtype, shape, and the range of bytes in the data section, in
    /// order of their bytes and without holes. The header's length is a multiple of [`ALIGNMENT`], so that
    /// data starts aligned.
    ///
    /// # Errors
    /// `Invalid` when the header is longer than the safetensors format allows; `Internal`, naming the tensor,
    /// when a range does not have the length of the dtype and shape, or does not begin where the previous
    /// range ends.
    pub fn new<'a>(tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], Range<u64>)>) -> Result<Self> {
        Self::with(WHOLE.as_bytes(), tensors)
    }

    /// Creates the header of a shard of a sharded step. It has, for each box of a tensor, the name, dtype and
    /// shape of the box, its range of bytes, and the index in the tensor at which it begins. `__metadata__`
    /// then has the keys by which `torch.distributed.checkpoint` puts boxes of several files together.
    ///
    /// # Errors
    /// As [`HeaderTemplate::new`].
    pub fn sharded<'a>(
        boxes: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], Range<u64>, &'a [usize])> + Clone,
    ) -> Result<Self> {
        #[derive(Serialize)]
        struct Saved<'a> {
            saved_offsets: &'a [usize],
        }
        let mut offsets = String::from("{").into_bytes();
        for (name, .., at) in boxes.clone() {
            if offsets.len() > 1 {
                offsets.push(b',');
            }
            write_json(&mut offsets, name)?;
            offsets.push(b':');
            write_json(&mut offsets, &Saved { saved_offsets: at })?;
            if offsets.len() >= MAX_HEADER {
                return Err(too_long());
            }
        }
        offsets.push(b'}');
        let offsets = String::from_utf8(offsets).map_err(|e| Error::internal("json is not text").with_source(e))?;
        let mut metadata = SHARDED.as_bytes().to_vec();
        write_json(&mut metadata, &offsets)?;
        metadata.push(b'}');
        Self::with(&metadata, boxes.into_iter().map(|(name, dtype, shape, range, _)| (name, dtype, shape, range)))
    }

    /// Creates a header with the text `metadata` after the stamp.
    fn with<'a>(
        metadata: &[u8],
        tensors: impl IntoIterator<Item = (&'a str, Dtype, &'a [usize], Range<u64>)>,
    ) -> Result<Self> {
        let mut bytes = vec![0; PREFIX];
        bytes.extend_from_slice(stamp(0, Attempt::default()).as_bytes());
        bytes.extend_from_slice(metadata);
        let mut end = 0;
        for (name, dtype, shape, range) in tensors {
            let fits =
                Layout::new(dtype, shape).bytes().is_ok_and(|len| range.start.checked_add(len) == Some(range.end));
            if range.start != end || !fits {
                let wrong = format!("the plan puts a tensor in the wrong place tensor={name:?} range={range:?}");
                return Err(Error::internal(wrong));
            }
            end = range.end;
            bytes.push(b',');
            write_json(&mut bytes, name)?;
            bytes.push(b':');
            write_json(&mut bytes, &Info { dtype, shape, data_offsets: (range.start, range.end) })?;
            if bytes.len() >= MAX_HEADER {
                break;
            }
        }
        bytes.push(b'}');
        let len = bytes.len().next_multiple_of(ALIGNMENT);
        if len > MAX_HEADER {
            return Err(too_long());
        }
        bytes.resize(len, b' ');
        bytes[..PREFIX].copy_from_slice(&((len - PREFIX) as u64).to_le_bytes());
        Ok(Self { bytes })
    }

    /// The length of the header with its prefix, which is the offset of the data.
    #[expect(clippy::len_without_is_empty, reason = "a header is never empty")]
    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    /// Fills `to` with the stamped header's bytes from `begin` on. Returns false if the header is shorter.
    pub fn copy(&self, stamp: &Stamp, begin: usize, to: &mut [u8]) -> bool {
        let Some(from) = self.bytes.get(begin..begin + to.len()) else { return false };
        to.copy_from_slice(from);
        let stamped = PREFIX.max(begin)..(PREFIX + STAMP).min(begin + to.len());
        if !stamped.is_empty() {
            to[stamped.start - begin..stamped.end - begin]
                .copy_from_slice(&stamp.0.as_bytes()[stamped.start - PREFIX..stamped.end - PREFIX]);
        }
        true
    }
}

fn too_long() -> Error {
    Error::invalid(format!("the header of a file would be longer than readers accept limit_bytes={MAX_HEADER}"))
}

/// A tensor entry of a header, in the field order of other writers of the format.
#[derive(Serialize)]
struct Info<'a> {
    dtype: Dtype,
    shape: &'a [usize],
    data_offsets: (u64, u64),
}

/// Appends `value` as JSON.
pub(super) fn write_json(bytes: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) -> Result<()> {
    serde_json::to_writer(bytes as &mut dyn Write, value)
        .map_err(|e| Error::internal("cannot write json").with_source(e))
}

/// An upper bound of the bytes that a box adds to the header of its file, if no offset is beyond `end`: at
/// most 8 more than it adds.
pub(crate) fn entry_len(name: &str, dtype: Dtype, shape: &[usize], at: Option<&[usize]>, end: u64) -> u64 {
    let digits = |n: u64| u64::from(n.checked_ilog10().unwrap_or(0)) + 1;
    let list = |list: &[usize]| list.iter().map(|&n| digits(n as u64) + 1).sum::<u64>();
    let json = |plain: u64, short: u64, long: u64, quote: u64| {
        let escaped = name.bytes().map(|byte| match byte {
            b'"' | b'\\' => quote,
            b'\n' | b'\r' | b'\t' | 8 | 12 => short,
            0..0x20 => long,
            _ => plain,
        });
        escaped.sum::<u64>()
    };
    let info = r#","":{"dtype":"","shape":[],"data_offsets":[,]}"#.len() + dtype.name().len();
    let entry = json(1, 2, 6, 2) + info as u64 + list(shape) + 2 * digits(end);
    let saved = r#",\"\":{\"saved_offsets\":[]}"#.len() as u64;
    entry + at.map_or(0, |at| json(1, 3, 7, 4) + saved + list(at))
}

/// The names of `n` shards, as stock tools expect them. `rank` is the rank that writes them, if several ranks
/// write the step.
pub fn shard_names(n: usize, rank: Option<u32>) -> Vec<String> {
    if let Some(rank) = rank {
        return (1..=n).map(|i| format!("shard-{rank:05}-model-{i:05}-of-{n:05}.safetensors")).collect();
    }
    match n {
        1 => vec!["model.safetensors".into()],
        n => (1..=n).map(|i| format!("model-{i:05}-of-{n:05}.safetensors")).collect(),
    }
}

/// The name of the file with the values of a rank that writes no shard.
pub fn values_name(rank: u32) -> String {
    format!("shard-{rank:05}-values.json")
}

/// The rank that wrote a file, found from the file's name. None for a file of a process that saved alone.
pub fn rank_of(name: &str) -> Option<u32> {
    name.strip_prefix("shard-")?.split_once('-')?.0.parse().ok()
}

/// The bytes of [`INDEX`]: `total_size` is the sum of the tensors' bytes, `weight_map` names each tensor's
/// file.
pub fn index_json<'a>(total_size: u64, weight_map: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<Vec<u8>> {
    #[derive(Serialize)]
    struct Index<'a> {
        metadata: Total,
        weight_map: BTreeMap<&'a str, &'a str>,
    }
    #[derive(Serialize)]
    struct Total {
        total_size: u64,
    }
    let mut bytes = Vec::new();
    let index = Index { metadata: Total { total_size }, weight_map: weight_map.into_iter().collect() };
    write_json(&mut bytes, &index)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Reads the step and attempt of a shard from its first [`ALIGNMENT`] bytes, and reads nothing after them.
///
/// # Errors
/// `Corrupt` unless the bytes begin a shard that this library wrote.
pub fn identity(prefix: &[u8]) -> Result<(u64, Attempt)> {
    header_len(prefix)?;
    read_stamp(&prefix[PREFIX..]).ok_or_else(|| Error::corrupt("a shard does not begin with its step and attempt"))
}

fn read_stamp(text: &[u8]) -> Option<(u64, Attempt)> {
    let (text, after) = text.split_at_checked(STAMP)?;
    if !after.starts_with(WHOLE.as_bytes()) && !after.starts_with(SHARDED.as_bytes()) {
        return None;
    }
    let text = std::str::from_utf8(text).ok()?;
    let rest = text.strip_prefix(BEFORE_STEP)?;
    let (step, _) = rest.split_once('"')?;
    let attempt = rest.get(STEP_ROOM + BEFORE_ATTEMPT.len()..)?.get(..ATTEMPT_ROOM)?;
    let (step, attempt) = (step.parse().ok()?, Attempt::parse(attempt)?);
    // A step and attempt have only one spelling, so this comparison refuses any other text.
    (stamp(step, attempt) == text).then_some((step, attempt))
}

/// The length of a shard's header with its prefix, from the first 8 bytes of the file or more.
///
/// # Errors
/// `Corrupt` when there are fewer bytes, or the header would be empty or longer than the safetensors format
/// allows.
pub fn header_len(prefix: &[u8]) -> Result<u64> {
    let Some(length) = prefix.first_chunk::<PREFIX>() else {
        return Err(Error::corrupt(format!("a shard is too short for a header length={}", prefix.len())));
    };
    match u64::from_le_bytes(*length) {
        length @ 2..=100_000_000 => Ok(length + PREFIX as u64),
        length => Err(Error::corrupt(format!("a header cannot have this length length={length}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::super::header::{Header, HeaderTensor};
    use super::*;
    use proptest::prelude::*;
    use safetensors::SafeTensors;

    #[test]
    fn a_header_of_boxes_says_where_each_begins() {
        let (two, six): (&[usize], &[usize]) = (&[2], &[6]);
        let template =
            HeaderTemplate::sharded([("w\"", Dtype::F32, two, 0..8, six), ("scalar", Dtype::I64, &[], 8..16, &[])]);
        let bytes = stamped(&template.unwrap(), 7, Attempt::default());
        let (_, metadata) = SafeTensors::read_metadata(&[&bytes[..], &[0; 16]].concat()).unwrap();
        let strings = metadata.metadata().as_ref().unwrap();
        assert_eq!(strings["DCP_VERSION"], "1.0");
        let info: serde_json::Value = serde_json::from_str(&strings["DCP_SHARDING_INFO"]).unwrap();
        assert_eq!(info, serde_json::json!({"w\"": {"saved_offsets": [6]}, "scalar": {"saved_offsets": []}}));
    }

    /// Copies the header in pieces of many lengths, as chunks may split it.
    fn stamped(template: &HeaderTemplate, step: u64, attempt: Attempt) -> Vec<u8> {
        let (mut bytes, mut at) = (vec![0; template.len() as usize], 0);
        let stamp = Stamp::new(step, attempt);
        for len in (1..).step_by(7) {
            let end = bytes.len().min(at + len);
            assert!(template.copy(&stamp, at, &mut bytes[at..end]));
            at = end;
            if at == bytes.len() {
                break;
            }
        }
        assert!(!template.copy(&stamp, at - 1, &mut [0; 2]));
        bytes
    }

    fn header(tensors: &[(&str, Dtype, &[usize], Range<u64>)]) -> Vec<u8> {
        stamped(&HeaderTemplate::new(tensors.iter().cloned()).unwrap(), 7, Attempt::default())
    }

    #[test]
    fn the_safetensors_crate_reads_a_stamped_header() {
        let bytes = header(&[("b \"\\\u{0}\u{e9}", Dtype::F32, &[2, 3], 0..24), ("a", Dtype::U8, &[], 24..25)]);
        assert_eq!(bytes.len() % ALIGNMENT, 0);
        let (_, metadata) = SafeTensors::read_metadata(&[&bytes[..], &[0; 25]].concat()).unwrap();
        assert_eq!(metadata.offset_keys(), ["b \"\\\u{0}\u{e9}", "a"]);
        let strings = metadata.metadata().as_ref().unwrap();
        assert_eq!((&strings["format"][..], &strings["ashore_step"][..]), ("pt", "7"));
    }

    #[test]
    fn no_tensors_are_a_header_too() {
        let bytes = header(&[]);
        assert!(SafeTensors::read_metadata(&bytes).is_ok());
        assert_eq!(Header::parse(&bytes, bytes.len() as u64).unwrap().tensors, []);
    }

    #[test]
    fn a_plan_with_a_hole_or_a_wrong_size_is_a_bug() {
        let shape: &[usize] = &[4];
        for range in [4..20, 0..15, 0..17] {
            let wrong = HeaderTemplate::new([("w", Dtype::F32, shape, range)]).unwrap_err();
            assert_eq!(wrong.kind(), crate::ErrorKind::Internal, "{wrong}");
        }
    }

    #[test]
    fn a_header_longer_than_the_format_allows_is_refused() {
        let name = "n".repeat(1 << 20);
        let shape: &[usize] = &[0];
        let tensors = std::iter::repeat_n((&name[..], Dtype::U8, shape, 0..0), 1000);
        let refused = HeaderTemplate::new(tensors).unwrap_err();
        assert_eq!(refused.kind(), crate::ErrorKind::Invalid);
        assert!(refused.message().contains("limit_bytes=100000000"), "{refused}");
    }

    #[test]
    fn a_flipped_bit_in_the_stamp_is_another_identity_or_none() {
        let bytes = header(&[("w", Dtype::F32, &[1], 0..4)]);
        let (whose, one): (_, &[usize]) = (identity(&bytes).unwrap(), &[1]);
        let boxes = HeaderTemplate::sharded([("w", Dtype::F32, one, 0..4, one)]).unwrap();
        let boxes = stamped(&boxes, 7, whose.1);
        for (bytes, text) in [(&bytes, WHOLE), (&boxes, SHARDED)] {
            let end = PREFIX + STAMP + text.len();
            for bit in 0..8 * end {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let refused = Header::parse(&flipped, flipped.len() as u64 + 4).is_err();
                assert!(refused || identity(&flipped).unwrap() != whose, "{bit}");
            }
            for cut in 0..end {
                assert!(identity(&bytes[..cut]).is_err(), "{cut}");
            }
            assert_eq!(identity(&bytes[..end]).unwrap(), whose);
        }
    }

    #[test]
    fn step_and_attempt_stand_where_the_specification_says() {
        let attempt = Attempt::default();
        let bytes = stamped(&HeaderTemplate::new([]).unwrap(), u64::MAX, attempt);
        assert_eq!(&bytes[54..76], format!("{}\",", u64::MAX).as_bytes());
        assert_eq!(&bytes[94..130], attempt.to_string().as_bytes());
        assert_eq!((PREFIX, PREFIX + STAMP), (8, 130));
        assert_eq!(&bytes[130..132], b"\"}");
        let bytes = stamped(&HeaderTemplate::sharded([]).unwrap(), 7, attempt);
        assert_eq!(&bytes[130..176], br#"","DCP_VERSION":"1.0","DCP_SHARDING_INFO":"{}""#);
    }

    #[test]
    fn shards_have_the_names_that_stock_tools_look_for() {
        assert_eq!(shard_names(1, None), ["model.safetensors"]);
        assert_eq!(shard_names(2, None), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]);
        assert_eq!(shard_names(1, Some(0)), ["shard-00000-model-00001-of-00001.safetensors"]);
        let index = index_json(12, [("b", "y"), ("a", "x")]).unwrap();
        assert_eq!(index, b"{\"metadata\":{\"total_size\":12},\"weight_map\":{\"a\":\"x\",\"b\":\"y\"}}\n");
    }

    proptest! {
        #[test]
        fn the_length_of_an_entry_is_known_before(
            names in prop::collection::btree_set("[\"a-z\\\\\u{0}-\u{20}\u{e9}]{1,9}", 1..9), dims in prop::collection::vec(1_usize..2000, 0..4),
            sharded in any::<bool>(),
        ) {
            let bytes = Layout::new(Dtype::BF16, &dims).bytes().unwrap_or(1 << 40);
            let names: Vec<_> = names.iter().enumerate().map(|(i, name)| (&name[..], i as u64 * bytes..(i as u64 + 1) * bytes)).collect();
            let boxes = names.iter().map(|(name, range)| (*name, Dtype::BF16, &dims[..], range.clone(), &dims[..]));
            let template = if sharded { HeaderTemplate::sharded(boxes) } else { HeaderTemplate::new(boxes.map(|(n, d, s, r, _)| (n, d, s, r))) };
            let bytes = template.unwrap().bytes;
            let used = bytes.iter().rposition(|b| *b != b' ').unwrap() as u64 + 1;
            let empty = (PREFIX + STAMP + if sharded { SHARDED.len() + 5 } else { WHOLE.len() } + 1) as u64;
            let end = names.last().unwrap().1.end;
            let told: u64 = names.iter().map(|(name, _)| entry_len(name, Dtype::BF16, &dims, sharded.then_some(&dims[..]), end)).sum();
            let slack = (names.len() * 48) as u64;
            prop_assert!((used - empty..=used - empty + slack).contains(&told), "{used} {empty} {told}");
        }

        #[test]
        fn a_stamped_header_is_read_back(
            (step, uuid, sharded) in any::<(u64, u128, bool)>(),
            tensors in prop::collection::btree_map(".{1,20}", 0_usize..9, 0..40),
        ) {
            let attempt = Attempt::from_uuid(uuid::Uuid::from_u128(uuid));
            let mut end = 0;
            let tensors: Vec<_> = tensors.into_iter().map(|(name, n)| {
                let start = end;
                end += 8 * n as u64;
                HeaderTensor { name, dtype: Dtype::I32, shape: vec![n, 2], offsets: start..end, at: sharded.then(|| vec![3, 4]) }
            }).collect();
            let template = if sharded {
                let boxes = tensors.iter().map(|t| (&t.name[..], t.dtype, &t.shape[..], t.offsets.clone(), &[3, 4][..]));
                HeaderTemplate::sharded(boxes)
            } else {
                let whole = tensors.iter().map(|t| (&t.name[..], t.dtype, &t.shape[..], t.offsets.clone()));
                HeaderTemplate::new(whole)
            };
            let template = template.unwrap();
            let bytes = stamped(&template, step, attempt);
            prop_assert_eq!(bytes.len() as u64, template.len());
            prop_assert_eq!(identity(&bytes[..ALIGNMENT]).unwrap(), (step, attempt));
            let mut read = Header::parse(&bytes, template.len() + end).unwrap();
            // Tensors without bytes may come in any order at the same offset.
            read.tensors.sort_by(|a, b| (a.offsets.end, &a.name).cmp(&(b.offsets.end, &b.name)));
            prop_assert_eq!(read, Header { step, attempt, tensors });
        }
    }
}
