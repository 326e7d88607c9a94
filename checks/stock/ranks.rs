//! One rank of a job that saves the tensors of `ranks.json` as step 7, for the stock readers to read:
//! `stock_ranks ROOT`, started once for each rank with the variables of a launcher. It saves by the interface
//! that torch's executor has.

use ashore::compat::torch::{AsyncCheckpointExecutor, ExecuteOptions, ThreadExecutor};
use ashore::ranks::{SharedDirectory, launcher};
use ashore::{CheckpointExecutor, Dtype, HostTensor, Layout, StateDict};
use serde::Deserialize;
use std::error::Error;
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
    fn bytes(&self, index: usize, at: &[usize], extent: &[usize]) -> Result<Vec<u8>, Box<dyn Error>> {
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

fn main() -> Result<(), Box<dyn Error>> {
    let root = std::env::args_os().nth(1).ok_or("usage: stock_ranks ROOT")?;
    let table: Table = serde_json::from_str(include_str!("ranks.json"))?;
    let member = launcher::detect()?.ok_or("start it as one of several ranks")?;
    assert_eq!(member.world, table.ranks);
    let coordinator = Arc::new(SharedDirectory::new(&root, member)?);
    let builder = CheckpointExecutor::builder(&root).arena(4 << 20).chunk(1 << 20).save_timeout(MINUTE);
    let executor = ThreadExecutor::new(Arc::new(builder.ranks(coordinator).build()?))?;
    let mut state = StateDict::new();
    state.value("epoch", &3)?.rank_value("seed", &member.rank)?;
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
    let future = executor.execute_save(state.into(), ExecuteOptions::new().checkpoint_id("step-7"))?;
    let metadata = future.result(2 * MINUTE)?.ok_or("no other save was under way")?;
    let tensors = metadata.state_dict_metadata.len();
    println!("rank {}: saved {tensors} tensors and values in {} boxes", member.rank, metadata.storage_data.len());
    executor.close(MINUTE)?;
    Ok(())
}
