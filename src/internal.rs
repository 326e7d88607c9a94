//! Items that tests, programs and fuzz targets of this repository need beyond the API: not part of it, and
//! free to change.

pub mod device {
    #[cfg(all(feature = "cuda", not(any(loom, miri))))]
    pub use crate::device::Cuda;
    pub use crate::device::{CopyQueue, Dependency, Device, Host, choose};
}
pub mod digest {
    pub use crate::digest::Digest;
}
pub mod format {
    pub use crate::format::{
        agreement, columns, entries, header, index, invariants, manifest, seal, shard, split, table, template, v1,
    };
}
pub mod plan {
    pub use crate::plan::{
        BoxOf, Described, Description, Merge, Part, Replica, Share, Whole, WholeTensor, Written, share_out,
    };

    use crate::format::shard::HeaderTemplate;
    use crate::plan::{Plan, SegmentSource, Shape};
    use crate::{Result, StateDict};

    /// A file that a rank writes.
    #[derive(Debug)]
    pub struct PlannedFile {
        /// Its name.
        pub name: String,
        /// Its header.
        pub header: HeaderTemplate,
        /// The tensors whose bytes follow: for each the index in the state dict, and the number of the
        /// tensor in the step.
        pub tensors: Vec<(usize, u32)>,
    }

    /// The files in which a rank writes its share of `state`.
    ///
    /// # Errors
    /// Why there is no plan.
    pub fn files_of_share(
        state: &StateDict<'_>,
        files: usize,
        order: &[usize],
        share: &Share,
    ) -> Result<Vec<PlannedFile>> {
        let plan = Plan::of_share(state, Shape { chunk: 1 << 20, files, rank: Some(share.rank) }, order, share)?;
        let mut planned = Vec::new();
        for (number, shard) in plan.shards.iter().enumerate() {
            let mut tensors: Vec<_> = plan.tensors.iter().filter(|t| t.shard == number).collect();
            tensors.sort_by_key(|t| t.offset);
            let source = |t: &&crate::plan::Planned| match plan.segments.get(t.segments.start)?.source {
                SegmentSource::Tensor(index) if t.bytes > 0 => Some((index, t.number)),
                _ => None,
            };
            let tensors = tensors.iter().filter_map(source).collect();
            planned.push(PlannedFile { name: shard.name.clone(), header: shard.header.clone(), tensors });
        }
        Ok(planned)
    }
}
pub mod state {
    pub use crate::state::{decode_value, encode_value};
}
