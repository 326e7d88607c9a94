//! Names, dtypes, shapes and digests of the tensors of a version, without their bytes.

use crate::checkpoint::Checkpoint;
use crate::delta;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::id::Attempt;
use crate::state::{Dtype, Layout};
use std::collections::HashMap;

/// The identity of the version that weights hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holding {
    pub version: u64,
    pub attempt: Attempt,
    pub state: Digest,
}

/// A tensor of a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    pub digest: Digest,
    /// The number of the tensor that holds the bytes: its own number, or for an alias the number of another
    /// tensor.
    pub holder: usize,
}

impl Tensor {
    /// Its length in bytes. Zero if the length does not fit in memory.
    pub fn len(&self) -> usize {
        let bytes = Layout::new(self.dtype, &self.shape).bytes().unwrap_or_default();
        usize::try_from(bytes).unwrap_or_default()
    }

    /// Whether dtype and shape are these.
    pub fn is_like(&self, dtype: Dtype, shape: &[usize]) -> bool {
        self.dtype == dtype && self.shape == shape
    }
}

/// The tensors of a version, in ascending order of their names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Inventory {
    pub tensors: Vec<Tensor>,
}

impl Inventory {
    /// Returns the inventory of an open step, and for each tensor its file and offset.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, when a tensor lies in several boxes; errors of the tables.
    pub fn of(checkpoint: &Checkpoint) -> Result<(Self, Vec<(usize, u64)>)> {
        let contents = checkpoint.contents()?;
        let mut places = HashMap::new();
        let (mut tensors, mut found) = (Vec::with_capacity(contents.tensors.len()), Vec::new());
        for (number, entry) in contents.tensors.iter().enumerate() {
            let [slice] = &entry.slices[..] else {
                let what = "a published version has whole tensors, each in one file";
                let boxes = entry.slices.len();
                let error = Error::invalid(format!("{what} tensor={:?} boxes={boxes}", entry.name));
                return Err(checkpoint.located(error));
            };
            let place = (slice.file, slice.offset);
            // Tensors at the same offset of a file share their bytes, unless they have none.
            let holder = if slice.length > 0 { *places.entry(place).or_insert(number) } else { number };
            let (name, dtype, shape) = (entry.name.clone(), entry.dtype, entry.shape.clone());
            tensors.push(Tensor { name, dtype, shape, digest: slice.digest, holder });
            found.push(place);
        }
        Ok((Self { tensors }, found))
    }

    /// The digest of all names, dtypes, shapes and tensor digests. A delta calls it the digest of the state.
    pub fn digest(&self) -> Digest {
        let mut text = Vec::with_capacity(self.tensors.len() * 64);
        let number = |text: &mut Vec<u8>, n: usize| text.extend_from_slice(&(n as u64).to_le_bytes());
        for tensor in &self.tensors {
            for word in [tensor.name.as_str(), tensor.dtype.name()] {
                number(&mut text, word.len());
                text.extend_from_slice(word.as_bytes());
            }
            number(&mut text, tensor.shape.len());
            tensor.shape.iter().for_each(|dim| number(&mut text, *dim));
            text.extend_from_slice(&tensor.digest.to_bits().to_le_bytes());
        }
        Digest::of(&text)
    }

    /// The number of the tensor `name`.
    pub fn find(&self, name: &str) -> Option<usize> {
        self.tensors.binary_search_by(|tensor| tensor.name.as_str().cmp(name)).ok()
    }

    /// Whether `other` has the same names, dtypes, shapes and aliases.
    pub fn is_like(&self, other: &Self) -> bool {
        let same = |a: &Tensor, b: &Tensor| a.name == b.name && a.holder == b.holder && b.is_like(a.dtype, &a.shape);
        self.tensors.len() == other.tensors.len() && self.tensors.iter().zip(&other.tensors).all(|(a, b)| same(a, b))
    }

    /// The length of all tensors in bytes. The bytes of aliases are counted once.
    pub fn bytes(&self) -> u64 {
        let own = self.tensors.iter().enumerate().filter(|(number, tensor)| tensor.holder == *number);
        own.map(|(_, tensor)| tensor.len() as u64).sum()
    }

    /// Returns the inventory that results when the tensors of a delta get their new digests.
    ///
    /// # Errors
    /// `Invalid`, naming the tensor, when the delta changes a tensor that is missing here, or that has
    /// another dtype, another shape or other bytes.
    pub fn after(&self, manifest: &delta::Manifest) -> Result<Self> {
        let mut results = vec![None; self.tensors.len()];
        for entry in &manifest.tensors {
            let refuse = |what: &str| {
                let error = format!("{what} tensor={:?} base_version={}", entry.name, manifest.base.version);
                Err(Error::invalid(error).with_step(manifest.number))
            };
            let Some(number) = self.find(&entry.name).filter(|number| self.tensors[*number].holder == *number) else {
                return refuse("a delta changes a tensor that its base here does not have");
            };
            let old = &self.tensors[number];
            if !old.is_like(entry.dtype, &entry.shape) {
                let (here, shape) = (old.dtype, &old.shape);
                let there = format!("delta={}{:?} here={here}{shape:?}", entry.dtype, entry.shape);
                return refuse(&format!("a delta was made for a tensor of another dtype or shape {there}"));
            }
            if old.digest != entry.base && !super::blind() {
                return refuse("a delta was made for other bytes of a tensor");
            }
            results[number] = Some(entry.result);
        }
        // In one pass, because any number of tensors may be aliases.
        let mut tensors = self.tensors.clone();
        for tensor in &mut tensors {
            tensor.digest = results[tensor.holder].unwrap_or(tensor.digest);
        }
        Ok(Self { tensors })
    }
}
