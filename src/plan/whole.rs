//! The step that all ranks write together, and the share of each rank.

use super::boxes::{BoxOf, decode, encode, ranges};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::state::Dtype;
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;
use std::collections::BTreeMap;

/// The maximum number of ranks that an error names.
pub(super) const NAMED: usize = 64;

/// The first bytes of a share: its kind and its version.
const MAGIC: &[u8; 8] = b"ashpart\x01";

/// A step that all ranks write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// The names of the shards, those of rank 0 first.
    pub files: Vec<String>,
    /// The tensors in ascending order of their names.
    pub tensors: Vec<WholeTensor>,
    /// The share of each rank.
    pub shares: Vec<Share>,
    /// The boxes that several ranks hold.
    pub replicas: Vec<Replica>,
}

/// The digests that ranks computed of their replicas, merged as they arrive. A digest that many ranks share
/// is kept once.
#[derive(Debug, Default)]
pub struct Comparison {
    /// The digests of each replica, in the order of the lowest rank that has each.
    seen: BTreeMap<u32, SmallVec<[Seen; 1]>>,
}

/// A digest of a replica.
#[derive(Debug)]
struct Seen {
    digest: Digest,
    count: usize,
    /// The first ranks that computed it.
    ranks: SmallVec<[u32; 4]>,
}

impl Comparison {
    /// Adds the digests that `rank` computed: the number of each replica and its digest. Ranks are added in
    /// ascending order.
    pub fn add(&mut self, rank: u32, digests: &[(u32, Digest)]) {
        for &(replica, digest) in digests {
            let seen = self.seen.entry(replica).or_default();
            match seen.iter_mut().find(|seen| seen.digest == digest) {
                Some(same) => {
                    same.count += 1;
                    if same.ranks.len() < NAMED {
                        same.ranks.push(rank);
                    }
                }
                None => seen.push(Seen { digest, count: 1, ranks: [rank].into_iter().collect() }),
            }
        }
    }

    /// True if no rank computed a digest.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }

    /// Compares the digests. A replica whose digest only one rank computed is not compared.
    ///
    /// # Errors
    /// `Invalid`, with the tensor, its box and the ranks whose digest differs from the most frequent one, or
    /// from that of the lowest rank where none is the most frequent.
    pub fn finish(&self, whole: &Whole) -> Result<()> {
        let Some((replica, seen)) = self.seen.iter().find(|(_, seen)| seen.len() > 1) else { return Ok(()) };
        let usual = seen.iter().rev().max_by_key(|seen| seen.count).map(|seen| seen.digest);
        let mut drifted: Vec<u32> =
            seen.iter().filter(|seen| Some(seen.digest) != usual).flat_map(|seen| seen.ranks.iter().copied()).collect();
        drifted.sort_unstable();
        drifted.truncate(NAMED);
        let replica = whole.replicas.get(*replica as usize);
        let tensor = replica.and_then(|replica| whole.tensors.get(replica.tensor as usize));
        let written = tensor.zip(replica).and_then(|(tensor, replica)| tensor.boxes.get(replica.index as usize));
        let (Some(tensor), Some(written)) = (tensor, written) else {
            return Err(Error::internal("a rank sent the digest of a replica that does not exist").with_ranks(drifted));
        };
        let place = ranges(&written.place.at, &written.place.extent);
        let what = "ranks hold different values of one tensor, and only one would be kept: find out why they differ, \
                    or add it on one rank only";
        Err(Error::invalid(format!("{what} tensor={:?} box={place}", tensor.name)).with_ranks(drifted))
    }
}

/// A tensor of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WholeTensor {
    /// Its name.
    pub name: String,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<usize>,
    /// The number of the tensor that holds its bytes. It has no boxes then.
    pub alias_of: Option<u32>,
    /// Its boxes in ascending order of their begin.
    pub boxes: Vec<Written>,
}

/// A box and the file that it is written to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Its position in the tensor.
    pub place: BoxOf,
    /// The rank that writes it.
    pub rank: u32,
    /// Its file, an index into [`Whole::files`].
    pub file: u32,
}

/// The part of a step that one rank writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The rank.
    pub rank: u32,
    /// How many ranks save together.
    pub world: u32,
    /// True if shards say where boxes lie in their tensors: for several ranks, or for a tensor in several
    /// boxes.
    pub sharded: bool,
    /// The number of its first file among those of all ranks.
    pub first_file: u32,
    /// One entry for each box of its description, in that order.
    pub boxes: Vec<Part>,
}

/// The role of a rank for a box that it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The number of its tensor in the step.
    pub tensor: u32,
    /// True if this rank writes it.
    pub writes: bool,
    /// The number of the box among those that several ranks hold, an index into [`Whole::replicas`].
    pub replica: Option<u32>,
}

/// A box that several ranks hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replica {
    /// The number of its tensor.
    pub tensor: u32,
    /// Its index among the boxes of the tensor.
    pub index: u32,
    /// The ranks that hold it, in ascending order.
    pub ranks: Vec<u32>,
}

impl Share {
    /// Returns the bytes to send to the rank.
    ///
    /// # Errors
    /// `Internal` when the share cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>> {
        Ok(encode(MAGIC, self)?.0)
    }

    /// Decodes the bytes that [`Share::encode`] returned.
    ///
    /// # Errors
    /// `Corrupt` for other bytes; `Invalid` for bytes of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        decode(MAGIC, bytes)
    }
}
