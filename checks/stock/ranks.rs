//! Writes the shards of several ranks that `ranks.json` describes, for the stock readers to read:
//! `cargo run --example stock_ranks -- FOLDER`. The safetensors crate reads each shard here.

use ashore::internal::format::shard::Stamp;
use ashore::internal::plan::{Description, Share, files_of_share, share_out};
use ashore::{Attempt, Dtype, HostTensor, Layout, StateDict};
use safetensors::SafeTensors;
use serde::Deserialize;
use std::error::Error;
use std::path::Path;

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
    let folder = std::env::args_os().nth(1).ok_or("usage: stock_ranks FOLDER")?;
    let folder = Path::new(&folder);
    let table: Table = serde_json::from_str(include_str!("ranks.json"))?;
    let mut states = Vec::new();
    for rank in 0..table.ranks {
        let (mut state, mut contents) = (StateDict::new(), Vec::new());
        for (index, tensor) in table.tensors.iter().enumerate() {
            for (_, at, extent) in tensor.boxes.iter().filter(|(holder, ..)| *holder == rank) {
                let bytes = tensor.bytes(index, at, extent)?;
                let source = HostTensor::with_dtype(bytes.clone(), tensor.dtype, extent);
                // As a program does: a replica is the whole tensor.
                if *extent == tensor.shape {
                    state.tensor(&tensor.name, source)?;
                } else {
                    state.tensor_box(&tensor.name, &tensor.shape, at, source)?;
                }
                contents.push(bytes);
            }
        }
        let (description, order) = Description::of(&state, 1)?;
        states.push((state, contents, description.encode()?.0, order));
    }
    let (whole, shares) = share_out(states.iter().map(|(_, _, described, _)| described.clone()))?;
    let stamp = Stamp::new(7, Attempt::new());
    std::fs::create_dir_all(folder)?;
    for ((state, contents, _, order), share) in states.iter().zip(&shares) {
        let share = Share::decode(share)?;
        for file in files_of_share(state, 1, order, &share)? {
            let mut bytes = vec![0; file.header.len() as usize];
            assert!(file.header.copy(&stamp, 0, &mut bytes));
            for (tensor, _) in &file.tensors {
                bytes.extend_from_slice(&contents[*tensor]);
            }
            let read = SafeTensors::deserialize(&bytes)?;
            for (tensor, number) in &file.tensors {
                assert_eq!(read.tensor(&whole.tensors[*number as usize].name)?.data(), contents[*tensor]);
            }
            std::fs::write(folder.join(&file.name), bytes)?;
        }
    }
    for name in &whole.files {
        println!("{name}: {} bytes", std::fs::metadata(folder.join(name))?.len());
    }
    Ok(())
}
