//! The data to compress: the state of a trained model from two checkpoints of the demo, and noise that has no
//! structure except its distribution.

use half::bf16;
use safetensors::SafeTensors;
use std::error::Error;
use std::f64::consts::TAU;
use std::path::{Path, PathBuf};

/// One kind of data.
pub struct Kind {
    pub name: &'static str,
    /// Bytes of an element.
    pub width: usize,
    pub bytes: Vec<u8>,
    /// The same tensors ten steps earlier.
    pub last: Option<Vec<u8>>,
}

const NOISE_ELEMENTS: usize = 8 << 20;

/// Weights, first moments and second moments as the demo trained them, from the newest two steps in `root`.
pub fn trained(root: &Path) -> Result<Vec<Kind>, Box<dyn Error>> {
    let [last, newest] = newest_two(root)?;
    let (last, newest) = (std::fs::read(last)?, std::fs::read(newest)?);
    let (last, newest) = (SafeTensors::deserialize(&last)?, SafeTensors::deserialize(&newest)?);
    let kind = |name, group| {
        let last = Some(tensors(&last, group));
        Kind { name, width: 4, bytes: tensors(&newest, group), last }
    };
    let weights = kind("trained fp32 weights", "parameters.");
    let rounded = Kind {
        name: "trained bf16 weights",
        width: 2,
        bytes: rounded(&weights.bytes),
        last: weights.last.as_deref().map(rounded),
    };
    let (first, second) = (kind("trained fp32 m", "adamw.first."), kind("trained fp32 v", "adamw.second."));
    Ok(vec![rounded, weights, first, second])
}

/// Gaussian weights and moments.
pub fn noise() -> Vec<Kind> {
    let mut noise = Noise(1);
    let weights = (0..NOISE_ELEMENTS).flat_map(|_| bf16::from_f64(0.02 * noise.next()).to_le_bytes()).collect();
    let first = (0..NOISE_ELEMENTS).flat_map(|_| ((1e-3 * noise.next()) as f32).to_le_bytes()).collect();
    let second = (0..NOISE_ELEMENTS).flat_map(|_| ((1e-3 * noise.next()).powi(2) as f32).to_le_bytes()).collect();
    let kind = |name, width, bytes| Kind { name, width, bytes, last: None };
    vec![
        kind("Gaussian bf16 weights", 2, weights),
        kind("Gaussian fp32 m", 4, first),
        kind("Gaussian fp32 v", 4, second),
    ]
}

fn newest_two(root: &Path) -> Result<[PathBuf; 2], Box<dyn Error>> {
    let mut steps: Vec<PathBuf> = std::fs::read_dir(root)?
        .filter_map(|entry| Some(entry.ok()?.path().join("model.safetensors")))
        .filter(|path| path.is_file())
        .collect();
    steps.sort();
    match &steps[..] {
        [.., last, newest] => Ok([last.clone(), newest.clone()]),
        _ => Err(format!("{} does not hold two steps of the demo", root.display()).into()),
    }
}

fn tensors(file: &SafeTensors<'_>, group: &str) -> Vec<u8> {
    let mut names: Vec<&str> = file.names().into_iter().filter(|name| name.starts_with(group)).collect();
    names.sort_unstable();
    names.iter().flat_map(|name| file.tensor(name).unwrap().data().to_vec()).collect()
}

fn rounded(fp32: &[u8]) -> Vec<u8> {
    let (elements, _) = fp32.as_chunks();
    elements.iter().flat_map(|&b| bf16::from_f32(f32::from_le_bytes(b)).to_le_bytes()).collect()
}

/// Gaussian numbers: splitmix64, then Box and Muller.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> f64 {
        (-2.0 * self.uniform().ln()).sqrt() * (TAU * self.uniform()).cos()
    }

    /// A number above 0 and at most 1.
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) >> 11) as f64 / (1_u64 << 53) as f64 + f64::EPSILON / 4.0
    }
}
