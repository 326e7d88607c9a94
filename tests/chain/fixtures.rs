//! Weights that change as published weights do, and a publisher for them.

use ashore::chain::{Publish, Published, Publisher, PublisherBuilder, Weights};
use ashore::{Dtype, HostTensor, Result, StateDict};
use std::sync::Arc;
use std::time::Duration;

pub const MINUTE: Duration = Duration::from_secs(60);

/// A small model: two bf16 matrices, tied under a third name, and a float.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    pub embedding: Vec<u16>,
    pub layer: Vec<u16>,
    pub scale: Vec<f32>,
}

/// Numbers from a seed.
pub fn random(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    }
}

impl Model {
    pub fn new(seed: u64, elements: usize) -> Self {
        let mut next = random(seed);
        let mut noise = |n| (0..n).map(|_| 0x3c00 | next() as u16 & 0x83ff).collect();
        Self { embedding: noise(elements), layer: noise(elements), scale: vec![1.0; 4] }
    }

    /// Changes one in `share` elements by a unit in the last place.
    pub fn update(&mut self, seed: u64, share: usize) {
        let mut next = random(seed);
        for tensor in [&mut self.embedding, &mut self.layer] {
            for _ in 0..tensor.len() / share {
                let at = next() as usize % tensor.len();
                tensor[at] ^= 1 << (next() % 2);
            }
        }
        self.scale[0] = seed as f32;
    }

    pub fn state(&self) -> StateDict<'static> {
        let mut state = StateDict::new();
        let half = self.embedding.len() / 8;
        let tensor = |v: &Vec<u16>| HostTensor::with_dtype(Arc::new(v.clone()), Dtype::BF16, [half, 8]);
        state.tensor("embedding.weight", tensor(&self.embedding)).unwrap();
        state.tensor("layer.weight", tensor(&self.layer)).unwrap();
        state.tensor("scale", Arc::new(self.scale.clone())).unwrap();
        state.alias("head.weight", "embedding.weight").unwrap();
        state
    }

    pub fn assert_equals(&self, weights: &Weights<'_>) {
        let bytes = |v: &[u16]| bytemuck::cast_slice::<u16, u8>(v).to_vec();
        assert_eq!(weights.bytes("embedding.weight").unwrap(), bytes(&self.embedding));
        assert_eq!(weights.bytes("head.weight").unwrap(), bytes(&self.embedding));
        assert_eq!(weights.bytes("layer.weight").unwrap(), bytes(&self.layer));
        assert_eq!(weights.elements::<f32>("scale").unwrap(), self.scale);
        weights.verify().unwrap();
    }
}

/// Small arenas, because tests run together.
pub fn small(builder: PublisherBuilder) -> Publisher {
    builder.arena(4 << 20).build().unwrap()
}

pub fn publish(publisher: &Publisher, model: &Model) -> Result<Published> {
    publisher.publish(model.state()).and_then(|publish: Publish| publish.wait(MINUTE))
}
