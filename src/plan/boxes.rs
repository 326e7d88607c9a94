//! The description of one rank's tensors, which ranks exchange before a save of a new structure.

use super::cut::check_name;
use crate::digest::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::format::shard::entry_len;
use crate::state::{Dtype, Layout, Place, Shape, StateDict};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The first bytes of a description: its kind and its version.
const MAGIC: &[u8; 8] = b"ashplan\x01";

/// The bytes of a digest.
const DIGEST: usize = 8;

/// The tensors that one rank holds, and in which boxes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// The number of files that the rank wants to write.
    pub files: u32,
    /// The tensors in ascending order of their names, each name once.
    pub tensors: Vec<Described>,
}

/// A tensor, as one rank sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Described {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The boxes of the tensor that the rank holds.
    pub boxes: Vec<BoxOf>,
    /// The tensor that holds the bytes of this one. This one has no boxes then.
    pub alias_of: Option<String>,
}

/// A box of a tensor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BoxOf {
    /// The index of its first element in the tensor.
    pub at: Vec<usize>,
    /// Its shape.
    pub extent: Vec<usize>,
}

impl Description {
    /// Describes `state`. The second result is the index in `state` of each box, in the order in which the
    /// description lists them.
    ///
    /// # Errors
    /// `Invalid`, naming a tensor that does not fit in any file.
    pub fn of(state: &StateDict<'_>, files: usize) -> Result<(Self, Vec<usize>)> {
        let mut order: Vec<usize> = (0..state.len()).collect();
        let key = |i: usize| state.tensors.get_index(i).map(|(key, tensor)| (&key.name, &tensor.place, key.number));
        order.sort_by(|&a, &b| {
            let ((a, at, number), (b, other, next)) =
                (key(a).expect("an index of it"), key(b).expect("an index of it"));
            let begin = |place: &'_ Option<Place>| place.as_ref().map(|p| p.at.to_vec());
            a.cmp(b).then_with(|| begin(at).cmp(&begin(other))).then(number.cmp(&next))
        });
        let (mut tensors, mut aliases): (Vec<Described>, Vec<Described>) = Default::default();
        for &index in &order {
            let (key, tensor) = state.tensors.get_index(index).expect("an index of this dict");
            let extent = tensor.layout.shape.to_vec();
            let (shape, at) = match &tensor.place {
                None => (extent.clone(), vec![0; extent.len()]),
                Some(place) => (place.global.to_vec(), place.at.to_vec()),
            };
            let dtype = tensor.layout.dtype;
            check_name(key, entry_len(key, dtype, &extent, Some(&at), u64::MAX))?;
            let held = BoxOf { at, extent };
            match tensors.last_mut() {
                Some(last) if last.name == key.name => last.boxes.push(held),
                _ => {
                    tensors.push(Described { name: key.name.clone(), dtype, shape, boxes: vec![held], alias_of: None })
                }
            }
        }
        for (alias, holder) in state.aliases() {
            let held = tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(holder));
            let lost = || Error::internal(format!("an alias has lost its holder tensor={alias:?}"));
            let Described { dtype, shape, .. } = held.map(|i| tensors[i].clone()).map_err(|_| lost())?;
            let (name, boxes, alias_of) = (alias.to_owned(), Vec::new(), Some(holder.to_owned()));
            aliases.push(Described { name, dtype, shape, boxes, alias_of });
        }
        tensors.append(&mut aliases);
        tensors.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((Self { files: u32::try_from(files).unwrap_or(u32::MAX), tensors }, order))
    }

    /// Returns the bytes to send to other ranks, and their digest. Equal structures of a rank have equal
    /// digests.
    ///
    /// # Errors
    /// `Internal` when the description cannot be encoded.
    pub fn encode(&self) -> Result<(Vec<u8>, Digest)> {
        encode(MAGIC, self)
    }

    /// Decodes the bytes that [`Description::encode`] returned, and checks every tensor and box in them. The
    /// memory used is at most a constant times their length.
    ///
    /// # Errors
    /// `Corrupt` for other bytes; `Invalid` for bytes of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let read: Self = decode(MAGIC, bytes)?;
        let mut before: Option<&str> = None;
        for tensor in &read.tensors {
            if tensor.name.is_empty() || tensor.name == "__metadata__" || before.is_some_and(|b| b >= &tensor.name[..])
            {
                return Err(broken(tensor, "a tensor cannot have this name or this place"));
            }
            before = Some(&tensor.name);
            tensor.check().map_err(|e| e.with_kind(ErrorKind::Corrupt))?;
        }
        Ok(read)
    }
}

impl Described {
    fn check(&self) -> Result<()> {
        if self.alias_of.is_some() != self.boxes.is_empty() {
            return Err(broken(self, "a tensor has boxes or is an alias, not both"));
        }
        Layout::new(self.dtype, &self.shape).bytes()?;
        for held in &self.boxes {
            let place = Place { global: Shape::from(&self.shape[..]), at: Shape::from(&held.at[..]) };
            let layout = Layout::new(self.dtype, &held.extent);
            place.check(&layout)?;
            layout.bytes()?;
        }
        Ok(())
    }
}

fn broken(tensor: &Described, why: &str) -> Error {
    Error::corrupt(format!("{why} tensor={:?} shape={:?}", tensor.name, tensor.shape))
}

/// Encodes `value` between `magic` and the digest of both.
pub(super) fn encode(magic: &[u8; 8], value: &impl Serialize) -> Result<(Vec<u8>, Digest)> {
    let fails = |e: postcard::Error| Error::internal("cannot encode a plan").with_source(e);
    let mut bytes = postcard::to_extend(value, magic.to_vec()).map_err(fails)?;
    let digest = Digest::of(&bytes);
    bytes.extend_from_slice(&digest.to_bits().to_le_bytes());
    Ok((bytes, digest))
}

/// Decodes bytes that [`encode`] returned.
pub(super) fn decode<'de, T: Deserialize<'de>>(magic: &[u8; 8], bytes: &'de [u8]) -> Result<T> {
    let corrupt = |why: &str| Error::corrupt(format!("{why} bytes={}", bytes.len()));
    let (text, digest) = bytes.split_last_chunk::<DIGEST>().ok_or_else(|| corrupt("a plan is incomplete"))?;
    if Digest::of(text).to_bits().to_le_bytes() != *digest {
        return Err(corrupt("a plan is damaged: its digest does not fit"));
    }
    let (found, body) = text.split_first_chunk::<8>().ok_or_else(|| corrupt("a plan is incomplete"))?;
    if found != magic {
        let same = found[..7] == magic[..7];
        return Err(if same {
            Error::invalid(format!("ranks use versions of this library that differ version={}", found[7]))
        } else {
            corrupt("not a plan")
        });
    }
    match postcard::take_from_bytes(body) {
        Ok((value, [])) => Ok(value),
        Ok(_) => Err(corrupt("there is something after a plan")),
        Err(e) => Err(corrupt("a plan cannot be read").with_source(e)),
    }
}

/// Formats a box as ranges, for messages.
pub(super) fn ranges(at: &[usize], extent: &[usize]) -> String {
    let ranges: Vec<Range<usize>> = at.iter().zip(extent).map(|(at, extent)| *at..at + extent).collect();
    format!("{ranges:?}")
}
