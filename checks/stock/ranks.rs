//! Saves the step of several ranks that `ranks.json` describes, for the stock readers to read:
//! `cargo run --example stock_ranks -- ROOT`. The safetensors crate reads each shard here. Each rank is a
//! thread with an executor.

use ashore::ranks::{Member, SharedDirectory};
use ashore::{CheckpointExecutor, Dtype, HostTensor, Layout, Result, StateDict};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

#[derive(Deserialize)]
struct Table {
    ranks: u32,
    tensors: Vec<Tensor>,
}

#[derive(Deserialize)]
struct Tensor {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
    /// Rank, begin, extent.
    boxes: Vec<(u32, Vec<usize>, Vec<usize>)>,
}

impl Tensor {
    /// The bytes of a box, cut out of the whole tensor element by element.
    fn bytes(&self, index: usize, at: &[usize], extent: &[usize]) -> Result<Vec<u8>> {
        let modulus = if self.dtype == Dtype::BOOL { 2 } else { 256 };
        let item = self.dtype.bitsize() / 8;
        let mut bytes = vec![0; Layout::new(self.dtype, extent).bytes()? as usize];
        for (element, to) in bytes.chunks_exact_mut(item).enumerate() {
            let (mut left, mut place, mut stride) = (element, 0, 1);
            for ((dim, at), extent) in self.shape.iter().zip(at).zip(extent).rev() {
                place += (at + left % extent) * stride;
                left /= extent;
                stride *= dim;
            }
            for (byte, i) in to.iter_mut().zip(place * item..) {
                *byte = ((i * 31 + index * 17 + 7) % 251 % modulus) as u8;
            }
        }
        Ok(bytes)
    }
}

/// Saves what one rank holds.
fn save(root: &Path, table: &Table, member: Member) -> Result<()> {
    let ranks = Arc::new(SharedDirectory::new(root, member)?);
    let builder = CheckpointExecutor::builder(root).arena(4 << 20).chunk(1 << 20);
    let executor = builder.ranks(ranks).run("stock").build()?;
    let mut state = StateDict::new();
    for (index, tensor) in table.tensors.iter().enumerate() {
        for (_, at, extent) in tensor.boxes.iter().filter(|(holder, ..)| *holder == member.rank) {
            let source = HostTensor::with_dtype(tensor.bytes(index, at, extent)?, tensor.dtype, extent);
            // As a program does: a replica is the whole tensor.
            if *extent == tensor.shape {
                state.tensor(&tensor.name, source)?;
            } else {
                state.tensor_box(&tensor.name, &tensor.shape, at, source)?;
            }
        }
    }
    executor.save(7, state)?.wait(MINUTE)?;
    executor.shutdown(MINUTE)
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let root = std::env::args_os().nth(1).ok_or("usage: stock_ranks ROOT")?;
    let root = Path::new(&root);
    let table: Table = serde_json::from_str(include_str!("ranks.json"))?;
    std::thread::scope(|scope| {
        let (table, world) = (&table, table.ranks);
        let start = |rank| scope.spawn(move || save(root, table, Member { rank, world, local_rank: rank }));
        let ranks: Vec<_> = (0..table.ranks).map(start).collect();
        ranks.into_iter().try_for_each(|rank| rank.join().expect("a rank panicked"))
    })?;
    for entry in std::fs::read_dir(root.join("step-00000007"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let bytes = std::fs::read(&path)?;
            println!("{}: {} tensors, {} bytes", path.display(), SafeTensors::deserialize(&bytes)?.len(), bytes.len());
        }
    }
    Ok(())
}
