//! Plans, items and metadata, as data that can be sent to another rank.

use crate::error::{Error, Result};
use crate::state::{BoxInfo, Dtype, Layout, StateDict};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

/// What one rank writes: torch's `SavePlan`.
///
/// ```
/// use ashore::compat::torch::{SavePlan, WriteItem};
/// use ashore::{Dtype, Layout, StateDict};
/// let mut state = StateDict::new();
/// state.tensor("weights", vec![0.5_f32; 4])?.value("epoch", &3)?;
/// let tensor = WriteItem::tensor("weights", &Layout::new(Dtype::F32, [4]));
/// assert_eq!(SavePlan::of(&state), SavePlan::new(vec![tensor, WriteItem::value("epoch")]));
/// # Ok::<(), ashore::Error>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavePlan {
    /// The items; shared, so that copying a cached plan is cheap.
    pub items: Arc<Vec<WriteItem>>,
    /// Data of the planner, for the metadata.
    pub planner_data: Option<serde_json::Value>,
    /// Data of the storage writer, for the plan that it carries out.
    pub storage_data: Option<serde_json::Value>,
}

/// One thing to write: torch's `WriteItem`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct WriteItem {
    /// The name in the state dict: torch's fully qualified name.
    pub fqn: String,
    /// What it is.
    pub kind: WriteKind,
}

/// What is written.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
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

    /// The item of a part that begins at a given place in a tensor of shape `size`. `layout` is the layout of
    /// the part.
    pub fn part(
        fqn: impl Into<String>,
        layout: &Layout,
        size: impl Into<Vec<usize>>,
        offsets: impl Into<Vec<usize>>,
    ) -> Self {
        let chunk = ChunkStorageMetadata { offsets: offsets.into(), sizes: layout.shape.to_vec() };
        Self { fqn: fqn.into(), kind: WriteKind::Tensor { dtype: layout.dtype, size: size.into(), chunk } }
    }

    /// The item of a value.
    pub fn value(fqn: impl Into<String>) -> Self {
        Self { fqn: fqn.into(), kind: WriteKind::Value }
    }

    /// The bytes of the part; 0 for a value, whose length is unknown before it is written.
    pub fn bytes(&self) -> u64 {
        match &self.kind {
            WriteKind::Tensor { dtype, chunk, .. } => Layout::new(*dtype, &chunk.sizes).bytes().unwrap_or(u64::MAX),
            WriteKind::Value => 0,
        }
    }

    /// The item of one entry of a state dict.
    fn of(held: BoxInfo<'_>) -> Self {
        let BoxInfo { name, dtype, shape, at, extent } = held;
        let offsets = at.map_or_else(|| vec![0; extent.len()], <[usize]>::to_vec);
        Self::part(name, &Layout::new(dtype, extent), shape, offsets)
    }

    /// False for an empty box of a tensor that has elements: the box that begins at the same place has the
    /// same index.
    fn is_written(&self) -> bool {
        let WriteKind::Tensor { size, chunk, .. } = &self.kind else { return true };
        !chunk.is_empty() || size.contains(&0)
    }

    /// The identity of an item across ranks: torch's `MetadataIndex`.
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

    /// A plan of every tensor and value of `state`. Of a tensor in boxes, it has the boxes that have
    /// elements.
    pub fn of(state: &StateDict<'_>) -> Self {
        let tensors = state.held().map(WriteItem::of).filter(WriteItem::is_written);
        Self::new(tensors.chain(state.value_names().map(WriteItem::value)).collect())
    }

    /// Checks that `state` has exactly the planned items.
    ///
    /// # Errors
    /// `Invalid`, naming the first item that is missing or differs.
    pub(super) fn fits(&self, state: &StateDict<'_>) -> Result<()> {
        let held: HashSet<WriteItem> = state.held().map(WriteItem::of).filter(WriteItem::is_written).collect();
        for item in self.items.iter() {
            let fits = match &item.kind {
                WriteKind::Value => state.values.contains_key(&item.fqn),
                WriteKind::Tensor { .. } => held.contains(item),
            };
            if !fits {
                let what = "the plan does not fit the state: `resolve_data` must return what is planned";
                return Err(Error::invalid(format!("{what} item={:?} planned={:?}", item.fqn, item.kind)));
            }
        }
        let (planned, found) = (self.items.len(), held.len() + state.value_names().len());
        if planned == found {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "the plan names an item twice, or does not name all of the state items={planned} state={found}"
        )))
    }
}

/// The metadata that `finish` completes and the future resolves to: torch's `Metadata`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Every tensor and value that was saved.
    pub state_dict_metadata: BTreeMap<String, StorageMetadata>,
    /// Data of the coordinator's planner.
    pub planner_data: Option<serde_json::Value>,
    /// The results of the writers of all ranks.
    pub storage_data: Vec<WriteResult>,
    /// Where the checkpoint is, and which attempt was published.
    pub storage_meta: Option<StorageMeta>,
}

/// What a name refers to in a checkpoint.
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
    /// The attempt; None if the writer has no attempts, or none yet.
    pub save_id: Option<String>,
}

/// What a writer reports about one item: torch's `WriteResult`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriteResult {
    /// The item.
    pub fqn: String,
    /// Its length in bytes.
    pub size_in_bytes: u64,
    /// Data that the writer needs to find the item again.
    pub storage_data: serde_json::Value,
}

/// The combined metadata of these plans.
///
/// # Errors
/// `Invalid`, naming the tensor: ranks that disagree on it, parts beyond its bounds, parts that overlap or
/// leave a hole.
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
            return refuse("a part is out of bounds", &item.fqn);
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
