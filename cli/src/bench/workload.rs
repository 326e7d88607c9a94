//! The saved state: tensors that cannot be compressed and contain no zeros.

use crate::rng::Rng;
use ashore::{HostTensor, Result, Source, StateDict};
use half::bf16;
use std::sync::Arc;

/// The name of a tensor, whether its elements have two bytes and not four, and its shape.
pub type Shape = (String, bool, Vec<usize>);

/// The measured workloads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Workload {
    /// 16 tensors of 64 MiB, fp32
    Large,
    /// 20,000 tensors of 16 KiB and 20,000 of 1 KiB, fp32
    #[value(alias = "w1")]
    Small,
    /// 64 tensors of 64 MiB, fp32
    #[value(alias = "w2")]
    Wide,
    /// Llama-3.2-1B under AdamW: bf16 weights, two fp32 moments
    #[value(name = "adam-1b", alias = "w3")]
    Adam1b,
    /// Llama-3-8B with 8 of its 32 layers, under AdamW: bf16 weights, two fp32 moments
    #[value(name = "adam-8b-part", alias = "w4")]
    Adam8bPart,
    /// Llama-3-8B under AdamW: bf16 weights, two fp32 moments
    #[value(name = "adam-8b", alias = "w5")]
    Adam8b,
}

/// The dimensions of a Llama.
struct Llama {
    width: usize,
    /// The width of keys and values.
    narrow: usize,
    hidden: usize,
    layers: usize,
    /// The output layer has its own weights.
    head: bool,
}

impl Workload {
    pub fn name(self) -> &'static str {
        match self {
            Self::Large => "large",
            Self::Small => "small",
            Self::Wide => "wide",
            Self::Adam1b => "adam-1b",
            Self::Adam8bPart => "adam-8b-part",
            Self::Adam8b => "adam-8b",
        }
    }

    /// Returns the total length of the tensors in bytes.
    pub fn bytes(self, scale: f64) -> u64 {
        let shapes = self.shapes(scale).into_iter();
        shapes.map(|(_, half, shape)| shape.iter().product::<usize>() as u64 * if half { 2 } else { 4 }).sum()
    }

    fn llama(self) -> Llama {
        match self {
            Self::Adam8bPart => Llama { layers: 8, ..Self::Adam8b.llama() },
            Self::Adam8b => Llama { width: 4096, narrow: 1024, hidden: 14_336, layers: 32, head: true },
            _ => Llama { width: 2048, narrow: 512, hidden: 8192, layers: 16, head: false },
        }
    }

    /// Returns the tensors; `scale` shortens the first dimension of each.
    pub fn shapes(self, scale: f64) -> Vec<Shape> {
        let scaled = |rows: usize| ((rows as f64 * scale).round() as usize).max(1);
        match self {
            Self::Large | Self::Wide => {
                let count = if self == Self::Large { 16 } else { 64 };
                (0..count).map(|i| (format!("layer.{i:02}.weight"), false, vec![scaled(4096), 4096])).collect()
            }
            Self::Small => {
                let part = |name: &'static str, columns| {
                    (0..scaled(20_000)).map(move |i| (format!("expert.{i:05}.{name}"), false, vec![4, columns]))
                };
                part("weight", 1024).chain(part("bias", 64)).collect()
            }
            Self::Adam1b | Self::Adam8bPart | Self::Adam8b => {
                let Llama { width, narrow, hidden, layers, head } = self.llama();
                let mut weights = vec![("embed_tokens".to_owned(), vec![128_256, width]), ("norm".into(), vec![width])];
                if head {
                    weights.push(("lm_head".into(), vec![128_256, width]));
                }
                for layer in 0..layers {
                    let (wide, narrow, long) = (vec![width, width], vec![narrow, width], vec![hidden, width]);
                    for (name, shape) in [
                        ("self_attn.q_proj", wide.clone()),
                        ("self_attn.k_proj", narrow.clone()),
                        ("self_attn.v_proj", narrow),
                        ("self_attn.o_proj", wide),
                        ("mlp.gate_proj", long.clone()),
                        ("mlp.up_proj", long),
                        ("mlp.down_proj", vec![width, hidden]),
                        ("input_layernorm", vec![width]),
                        ("post_attention_layernorm", vec![width]),
                    ] {
                        weights.push((format!("layers.{layer}.{name}"), shape));
                    }
                }
                let kinds = [("model", true), ("exp_avg", false), ("exp_avg_sq", false)];
                let each = |(name, mut shape): (String, Vec<usize>)| {
                    shape[0] = scaled(shape[0]);
                    kinds.map(|(kind, half)| (format!("{kind}.{name}.weight"), half, shape.clone()))
                };
                weights.into_iter().flat_map(each).collect()
            }
        }
    }
}

/// Tensors of at least this many bytes are split between ranks; each smaller tensor belongs to one rank.
const SPLIT: u64 = 256 << 10;

/// A state in memory, shared with the saves in progress: a whole one, or the share of a rank.
pub struct State {
    tensors: Vec<Tensor>,
    pub bytes: u64,
}

struct Tensor {
    name: String,
    shape: Vec<usize>,
    data: Data,
    /// For the rows of a rank: the shape of the whole tensor, and the first row.
    part_of: Option<(Vec<usize>, usize)>,
}

impl Tensor {
    fn add(&self, dict: &mut StateDict<'static>, source: impl Source + 'static) -> Result<()> {
        match &self.part_of {
            None => dict.tensor(self.name.as_str(), source)?,
            Some((whole, first)) => {
                let mut at = vec![0; whole.len()];
                at[0] = *first;
                dict.tensor_box(self.name.as_str(), whole, at, source)?
            }
        };
        Ok(())
    }
}

#[derive(Clone)]
enum Data {
    Single(Arc<Vec<f32>>),
    Half(Arc<Vec<bf16>>),
}

impl State {
    pub fn new(workload: Workload, scale: f64) -> Self {
        Self::share(workload, scale, 0, 1)
    }

    /// Makes the share of a rank: its rows of every tensor of at least 256 KiB, and the smaller tensors that
    /// are assigned to it.
    pub fn share(workload: Workload, scale: f64, rank: usize, world: usize) -> Self {
        Self::share_of(workload.shapes(scale), rank, world)
    }

    /// Makes a state of these tensors.
    pub fn of(shapes: Vec<Shape>) -> Self {
        Self::share_of(shapes, 0, 1)
    }

    fn share_of(shapes: Vec<Shape>, rank: usize, world: usize) -> Self {
        let (mut rng, mut bytes) = (Rng::new(1 + rank as u64), 0);
        // Random numbers are slow to generate: many tensors share an array of them, each at its own offset.
        let stretch: Vec<f32> = (0..1 << 20).map(|_| rng.signed_unit() * 0.02).collect();
        let mut data = |half, len: usize| {
            let from = rng.below(stretch.len());
            let numbers = stretch[from..].iter().chain(stretch.iter().cycle()).take(len);
            bytes += len as u64 * if half { 2 } else { 4 };
            if half {
                Data::Half(Arc::new(numbers.map(|x| bf16::from_f32(*x)).collect()))
            } else {
                Data::Single(Arc::new(numbers.copied().collect()))
            }
        };
        let (mut tensors, mut loads) = (Vec::new(), vec![0; world]);
        for (name, half, mut shape) in shapes {
            let row = shape[1..].iter().product::<usize>() as u64 * if half { 2 } else { 4 };
            let whole = row * shape[0] as u64;
            let mut part_of = None;
            if world > 1 && whole >= SPLIT && shape[0] >= world {
                let rows = |rank| shape[0] * rank / world..shape[0] * (rank + 1) / world;
                for (rank, load) in loads.iter_mut().enumerate() {
                    *load += rows(rank).len() as u64 * row;
                }
                part_of = Some((shape.clone(), rows(rank).start));
                shape[0] = rows(rank).len();
            } else {
                let least = (0..world).min_by_key(|rank| loads[*rank]).unwrap_or(0);
                loads[least] += whole;
                if least != rank {
                    continue;
                }
            }
            let data = data(half, shape.iter().product());
            tensors.push(Tensor { name, shape, data, part_of });
        }
        Self { tensors, bytes }
    }

    pub fn len(&self) -> usize {
        self.tensors.len()
    }

    pub fn dict(&self) -> Result<StateDict<'static>> {
        let mut dict = StateDict::with_capacity(self.len());
        for tensor in &self.tensors {
            match &tensor.data {
                Data::Single(data) => tensor.add(&mut dict, HostTensor::new(data.clone(), &tensor.shape))?,
                Data::Half(data) => tensor.add(&mut dict, HostTensor::new(data.clone(), &tensor.shape))?,
            }
        }
        Ok(dict)
    }

    /// Returns the name of each tensor and its bytes.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.tensors.iter().map(|Tensor { name, data, .. }| {
            let bytes: &[u8] = match data {
                Data::Single(data) => bytemuck::cast_slice(data),
                Data::Half(data) => bytemuck::cast_slice(data),
            };
            (name.as_str(), bytes)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workloads_have_the_size_that_they_say() {
        let sizes = |workload: Workload| (workload.shapes(1.0).len(), workload.bytes(1.0));
        assert_eq!(sizes(Workload::Large), (16, 1 << 30));
        assert_eq!(sizes(Workload::Small), (40_000, 20_000 * (17 << 10)));
        assert_eq!(sizes(Workload::Wide), (64, 4 << 30));
        assert_eq!(sizes(Workload::Adam1b), (438, 1_235_814_400 * 10));
        assert_eq!(sizes(Workload::Adam8bPart), (225, 2_795_573_248 * 10));
        assert_eq!(sizes(Workload::Adam8b), (873, 8_030_261_248 * 10));
    }

    #[test]
    fn the_shares_of_ranks_are_the_whole_state() {
        for (workload, scale) in [(Workload::Large, 0.01), (Workload::Small, 0.001), (Workload::Adam1b, 0.001)] {
            let shares: Vec<State> = (0..3).map(|rank| State::share(workload, scale, rank, 3)).collect();
            let whole = workload.bytes(scale);
            assert_eq!(shares.iter().map(|share| share.bytes).sum::<u64>(), whole);
            for share in &shares {
                assert_eq!(share.dict().unwrap().bytes(), share.bytes);
                assert!(share.bytes * 4 > whole, "{} of {whole}", share.bytes);
            }
        }
    }

    #[test]
    fn a_scaled_state_has_as_many_tensors_and_fewer_bytes() {
        let state = State::new(Workload::Adam1b, 0.001);
        assert_eq!((state.len(), state.dict().unwrap().len()), (438, 438));
        assert_eq!(state.bytes, state.tensors().map(|(_, bytes)| bytes.len() as u64).sum::<u64>());
        assert_eq!(state.bytes, state.dict().unwrap().bytes());
    }
}
