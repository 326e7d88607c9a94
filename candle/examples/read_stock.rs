//! Reads the step directories under ROOT with candle alone, and compares every byte with the expected values
//! in `checks/stock/expected.json`.

#![expect(unsafe_code, reason = "files that are mapped; nothing writes them meanwhile")]

use candle_core::safetensors::{MmapedSafetensors, load};
use candle_core::{DType, Device, Result, Tensor, bail};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
struct Table {
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    step: u64,
    readers: Vec<String>,
    /// Name, dtype, shape.
    tensors: Vec<(String, String, Vec<usize>)>,
}

fn main() -> Result<()> {
    let Some(root) = std::env::args_os().nth(1).map(PathBuf::from) else { bail!("usage: read_stock ROOT") };
    let table: Table =
        serde_json::from_str(include_str!("../../checks/stock/expected.json")).map_err(candle_core::Error::wrap)?;
    let steps: Vec<_> = table.steps.iter().filter(|s| s.readers.iter().any(|r| r == "candle")).collect();
    for Step { step, tensors, .. } in &steps {
        let files = shards(&root.join(format!("step-{step:08}")))?;

        let mut whole = HashMap::new();
        for file in &files {
            for (name, tensor) in load(file, &Device::Cpu)? {
                if whole.insert(name.clone(), tensor).is_some() {
                    bail!("{name:?} was read twice");
                }
            }
        }
        if whole.len() != tensors.len() {
            bail!("{} tensors were read, {} were saved", whole.len(), tensors.len());
        }
        // SAFETY: nothing writes the files while they are mapped.
        let mapped = unsafe { MmapedSafetensors::multi(&files)? };
        for (index, saved) in tensors.iter().enumerate() {
            match whole.get(&saved.0) {
                Some(tensor) => check(index, saved, tensor)?,
                None => bail!("{:?} is missing", saved.0),
            }
            check(index, saved, &mapped.load(&saved.0, &Device::Cpu)?)?;
        }
        println!("step {step}: candle: {} tensors in {} files: equal", tensors.len(), files.len());
    }
    println!("{} passed, 0 failed", steps.len());
    Ok(())
}

fn shards(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "safetensors") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

fn check(index: usize, (name, dtype, shape): &(String, String, Vec<usize>), tensor: &Tensor) -> Result<()> {
    let got_dtype = tensor.dtype().as_str();
    if !got_dtype.eq_ignore_ascii_case(dtype) || tensor.dims() != shape {
        bail!("{name:?} is {got_dtype} {:?}, not {dtype} {shape:?}", tensor.dims());
    }
    let got = bytes(tensor)?;
    let size = shape.iter().product::<usize>() * tensor.dtype().size_in_bytes();
    let want: Vec<u8> = (0..size).map(|i| ((i * 31 + index * 17 + 7) % 251) as u8).collect();
    if got != want {
        let place = got.iter().zip(&want).position(|(a, b)| a != b).unwrap_or(got.len().min(want.len()));
        bail!("{name:?} differs from byte {place}, {} bytes of {}", got.len(), want.len());
    }
    Ok(())
}

/// The elements' bits, as bytes. NaNs keep their payloads, because no code here computes with them.
fn bytes(tensor: &Tensor) -> Result<Vec<u8>> {
    macro_rules! elements {
        ($type:ty) => {
            tensor.flatten_all()?.to_vec1::<$type>()?.into_iter().flat_map(|e| e.to_le_bytes()).collect()
        };
    }
    Ok(match tensor.dtype() {
        DType::U8 => elements!(u8),
        DType::I16 => elements!(i16),
        DType::I32 => elements!(i32),
        DType::I64 => elements!(i64),
        DType::F16 => elements!(half::f16),
        DType::BF16 => elements!(half::bf16),
        DType::F32 => elements!(f32),
        DType::F64 => elements!(f64),
        other => bail!("no tensor of {other:?} was saved"),
    })
}
