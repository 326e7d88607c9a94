//! What planners make and writers carry out, as data that can go to another rank.

use crate::error::{Error, Result};
use crate::state::{Dtype, Layout, StateDict};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// What one rank writes: torch's `SavePlan`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavePlan {
    /// The items; shared, so that a plan that is kept costs nothing to hand out.
    pub items: Arc<Vec<WriteItem>>,
    /// Whatever a planner wants to tell the metadata.
    pub planner_data: Option<serde_json::Value>,
    /// Whatever a storage writer wants to find again in the plan that it is to carry out.
    pub storage_data: Option<serde_json::Value>,
}

/// One thing to write: torch's `WriteItem`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteItem {
    /// The name in the state dict: torch's fully qualified name.
    pub fqn: String,
    /// What it is.
    pub kind: WriteKind,
}

/// What is written.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WriteKind {
    /// A part of a tensor, or all of it.
    Tensor {
        /// The element type.
        dtype: Dtype,
        /// The shape of the whole tensor.
        size: Vec<usize>,
        /// Where the part begins, and how long it is, in each dimension.
        chunk: ChunkStorageMetadata,
    },
    /// A value: torch's `BYTE_IO`.
    Value,
}

/// A part of a tensor: where it begins and how long it is, in each dimension.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ChunkStorageMetadata {
    /// Where it begins.
    pub offsets: Vec<usize>,
    /// How long it is.
    pub sizes: Vec<usize>,
}

impl ChunkStorageMetadata {
    /// All of a tensor of this shape.
    pub fn whole(size: &[usize]) -> Self {
        Self { offsets: vec![0; size.len()], sizes: size.to_vec() }
    }

    fn overlaps(&self, other: &Self) -> bool {
        let end = |c: &Self, d: usize| c.offsets[d] + c.sizes[d];
        !self.is_empty()
            && !other.is_empty()
            && (0..self.offsets.len()).all(|d| self.offsets[d] < end(other, d) && other.offsets[d] < end(self, d))
    }

    fn is_empty(&self) -> bool {
        self.sizes.contains(&0)
    }

    fn inside(&self, size: &[usize]) -> bool {
        let dims = self.offsets.len() == size.len() && self.sizes.len() == size.len();
        let end = |d: usize| self.offsets[d].checked_add(self.sizes[d]);
        dims && (0..size.len()).all(|d| end(d).is_some_and(|end| end <= size[d]))
    }

    fn elements(&self) -> usize {
        self.sizes.iter().product()
    }
}

impl WriteItem {
    /// The item of a whole tensor.
    pub fn tensor(fqn: impl Into<String>, layout: &Layout) -> Self {
        let (dtype, size) = (layout.dtype, layout.shape.to_vec());
        let chunk = ChunkStorageMetadata::whole(&size);
        Self { fqn: fqn.into(), kind: WriteKind::Tensor { dtype, size, chunk } }
    }

    /// The item of a value.
    pub fn value(fqn: impl Into<String>) -> Self {
        Self { fqn: fqn.into(), kind: WriteKind::Value }
    }

    /// The bytes of the part; 0 for a value, whose length nobody knows before it is written.
    pub fn bytes(&self) -> u64 {
        match &self.kind {
            WriteKind::Tensor { dtype, chunk, .. } => Layout::new(*dtype, &chunk.sizes).bytes().unwrap_or(u64::MAX),
            WriteKind::Value => 0,
        }
    }

    /// What makes two items the same item on different ranks: torch's `MetadataIndex`.
    pub(super) fn index(&self) -> (&str, Option<&[usize]>) {
        match &self.kind {
            WriteKind::Tensor { chunk, .. } => (&self.fqn, Some(&chunk.offsets)),
            WriteKind::Value => (&self.fqn, None),
        }
    }
}

impl SavePlan {
    /// A plan of these items.
    pub fn new(items: Vec<WriteItem>) -> Self {
        Self { items: Arc::new(items), ..Self::default() }
    }

    /// Every tensor and value of `state`, whole.
    pub fn of(state: &StateDict<'_>) -> Self {
        let tensors = state.layouts().map(|(name, layout)| WriteItem::tensor(name, layout));
        Self::new(tensors.chain(state.value_names().map(WriteItem::value)).collect())
    }

    /// Makes sure that `state` is what this plans, all of it whole.
    ///
    /// # Errors
    /// `Invalid`, naming the first item that is not there, or is another there.
    pub(super) fn fits(&self, state: &StateDict<'_>) -> Result<()> {
        for item in self.items.iter() {
            let fits = match &item.kind {
                WriteKind::Value => state.values.contains_key(&item.fqn),
                WriteKind::Tensor { dtype, size, chunk } => state.tensors.get(&item.fqn).is_some_and(|tensor| {
                    (tensor.layout.dtype, &tensor.layout.shape[..]) == (*dtype, &size[..])
                        && *chunk == ChunkStorageMetadata::whole(size)
                }),
            };
            if !fits {
                let what = "a plan says something else than the state: `resolve_data` has to make what is planned";
                return Err(Error::invalid(format!("{what} item={:?} planned={:?}", item.fqn, item.kind)));
            }
        }
        let (planned, found) = (self.items.len(), state.len() + state.value_names().len());
        if planned == found {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "a plan names an item twice, or not all of the state items={planned} state={found}"
        )))
    }
}

/// What `finish` makes of a checkpoint, and the future resolves to: torch's `Metadata`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Every tensor and value that was saved.
    pub state_dict_metadata: BTreeMap<String, StorageMetadata>,
    /// What the planner of the coordinator had to say.
    pub planner_data: Option<serde_json::Value>,
    /// What the writers of all ranks had to say.
    pub storage_data: Vec<WriteResult>,
    /// Where it is, and which attempt it was.
    pub storage_meta: Option<StorageMeta>,
}

/// What a name stands for in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StorageMetadata {
    /// A tensor.
    Tensor(TensorStorageMetadata),
    /// A value: torch's `BytesStorageMetadata`.
    Bytes,
}

/// A tensor in a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TensorStorageMetadata {
    /// The element type.
    pub dtype: Dtype,
    /// The shape.
    pub size: Vec<usize>,
    /// The parts that it was written in.
    pub chunks: Vec<ChunkStorageMetadata>,
}

/// Where a checkpoint is, and which attempt at it was published.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StorageMeta {
    /// The directory.
    pub checkpoint_id: PathBuf,
    /// The attempt; None where a writer has no such thing, or not yet.
    pub save_id: Option<String>,
}

/// What a writer says of one item: torch's `WriteResult`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteResult {
    /// The item.
    pub fqn: String,
    /// How many bytes it has.
    pub size_in_bytes: u64,
    /// Whatever the writer needs to find it again.
    pub storage_data: serde_json::Value,
}

/// The metadata of what these plans write together.
///
/// # Errors
/// `Invalid`, naming the tensor: ranks that disagree on it, parts beyond its bounds, parts that overlap or leave a hole.
pub(super) fn metadata(plans: &[SavePlan]) -> Result<Metadata> {
    let mut found: BTreeMap<String, StorageMetadata> = BTreeMap::new();
    let refuse = |why: &str, fqn: &str| Err(Error::invalid(format!("a plan of a save is wrong: {why} tensor={fqn:?}")));
    for item in plans.iter().flat_map(|plan| plan.items.iter()) {
        let WriteKind::Tensor { dtype, size, chunk } = &item.kind else {
            match found.insert(item.fqn.clone(), StorageMetadata::Bytes) {
                None | Some(StorageMetadata::Bytes) => continue,
                Some(StorageMetadata::Tensor(_)) => return refuse("a name is a tensor and a value", &item.fqn),
            }
        };
        if !chunk.inside(size) {
            return refuse("a part is out of the bounds", &item.fqn);
        }
        let new = || TensorStorageMetadata { dtype: *dtype, size: size.clone(), chunks: Vec::new() };
        match found.entry(item.fqn.clone()).or_insert_with(|| StorageMetadata::Tensor(new())) {
            StorageMetadata::Bytes => return refuse("a name is a tensor and a value", &item.fqn),
            StorageMetadata::Tensor(there) if (&there.dtype, &there.size) != (dtype, size) => {
                return refuse("ranks disagree on dtype or shape", &item.fqn);
            }
            StorageMetadata::Tensor(there) if there.chunks.iter().any(|c| c.overlaps(chunk)) => {
                return refuse("two parts overlap", &item.fqn);
            }
            StorageMetadata::Tensor(there) => there.chunks.push(chunk.clone()),
        }
    }
    for (fqn, entry) in &found {
        if let StorageMetadata::Tensor(tensor) = entry
            && tensor.chunks.iter().map(ChunkStorageMetadata::elements).sum::<usize>()
                != tensor.size.iter().product::<usize>()
        {
            return refuse("its parts do not cover it", fqn);
        }
    }
    let planner_data = plans.first().and_then(|plan| plan.planner_data.clone());
    Ok(Metadata { state_dict_metadata: found, planner_data, ..Metadata::default() })
}
