//! What all ranks write together, and each of them.

use super::boxes::{BoxOf, decode, encode, ranges};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::state::Dtype;
use serde::{Deserialize, Serialize};

/// The begin of a share: what it is, and its version.
const MAGIC: &[u8; 8] = b"ashpart\x01";

/// A step of all ranks.
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

impl Whole {
    /// Compares the digests that ranks took of their replicas: for each rank the number of the replica and
    /// its digest. A replica of which no other rank took the digest is not compared.
    ///
    /// # Errors
    /// `Invalid`, with the tensor, its box and the ranks that differ from most others, or from the lowest
    /// rank where no value is that of most.
    pub fn compare(&self, digests: &[(u32, Vec<(u32, Digest)>)]) -> Result<()> {
        let flat = digests.iter().flat_map(|(rank, of)| of.iter().map(|&(replica, digest)| (replica, *rank, digest)));
        let mut flat: Vec<(u32, u32, Digest)> = flat.collect();
        flat.sort_unstable_by_key(|&(replica, rank, _)| (replica, rank));
        for same in flat.chunk_by(|a, b| a.0 == b.0) {
            if same.iter().all(|s| s.2 == same[0].2) {
                continue;
            }
            let votes = |digest: Digest| same.iter().filter(|s| s.2 == digest).count();
            let usual = same.iter().rev().map(|s| s.2).max_by_key(|digest| votes(*digest));
            let drifted = same.iter().filter(|s| Some(s.2) != usual).map(|s| s.1);
            let replica = self.replicas.get(same[0].0 as usize);
            let tensor = replica.and_then(|replica| self.tensors.get(replica.tensor as usize));
            let written = tensor.zip(replica).and_then(|(tensor, replica)| tensor.boxes.get(replica.index as usize));
            let (Some(tensor), Some(written)) = (tensor, written) else {
                return Err(Error::internal("a rank took the digest of a replica that is none").with_ranks(drifted));
            };
            let place = ranges(&written.place.at, &written.place.extent);
            let text = format!("ranks hold different values of one tensor tensor={:?} box={place}", tensor.name);
            return Err(Error::invalid(text).with_ranks(drifted));
        }
        Ok(())
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
    /// The number of the tensor that has its bytes; it has no boxes then.
    pub alias_of: Option<u32>,
    /// Its boxes in ascending order of where they begin.
    pub boxes: Vec<Written>,
}

/// A box as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Where it lies.
    pub place: BoxOf,
    /// The rank that writes it.
    pub rank: u32,
    /// Its file, an index into [`Whole::files`].
    pub file: u32,
}

/// What one rank writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The rank.
    pub rank: u32,
    /// How many ranks save together.
    pub world: u32,
    /// True if shards say where in their tensors boxes lie: for several ranks, or a tensor in several boxes.
    pub sharded: bool,
    /// The number of its first file among those of all ranks.
    pub first_file: u32,
    /// Each box of its description, in that order.
    pub boxes: Vec<Part>,
}

/// What a rank does with a box that it holds.
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
    /// The bytes to hand to the rank.
    ///
    /// # Errors
    /// `Internal` when it cannot be encoded.
    pub fn encode(&self) -> Result<Vec<u8>> {
        Ok(encode(MAGIC, self)?.0)
    }

    /// Reads what [`Share::encode`] made.
    ///
    /// # Errors
    /// `Corrupt` for other bytes; `Invalid` for those of another version.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        decode(MAGIC, bytes)
    }
}
