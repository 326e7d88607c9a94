//! Updates of a model that is trained: bf16 weights of fp32 masters, by AdamW.

use crate::fixtures::{MINUTE, random};
use ashore::chain::{Follow, Kind, Published, Publisher, Weights};
use ashore::{Form, HostTensor, StateDict};
use half::bf16;
use std::collections::HashMap;
use std::sync::Arc;

/// Layers of a network that learns a function of its input.
const WIDTHS: [usize; 3] = [128, 768, 128];
const BATCH: usize = 4;

struct Layer {
    master: Vec<f32>,
    mean: Vec<f32>,
    square: Vec<f32>,
    weights: Vec<bf16>,
    gradient: Vec<f32>,
    /// Inputs and outputs.
    shape: (usize, usize),
}

struct Network {
    layers: Vec<Layer>,
    step: i32,
    next: Box<dyn FnMut() -> f32>,
}

impl Network {
    fn new() -> Self {
        let mut bits = random(11);
        let mut next = move || (bits() >> 40) as f32 / (1 << 23) as f32 - 1.0;
        let mut layer = |inputs: usize, outputs: usize| {
            let n = inputs * outputs;
            let scale = (3.0 / inputs as f32).sqrt();
            let master: Vec<f32> = (0..n).map(|_| next() * scale).collect();
            let weights = master.iter().map(|w| bf16::from_f32(*w)).collect();
            let zeros = || vec![0.0; n];
            Layer { master, mean: zeros(), square: zeros(), weights, gradient: zeros(), shape: (inputs, outputs) }
        };
        let layers = vec![layer(WIDTHS[0], WIDTHS[1]), layer(WIDTHS[1], WIDTHS[2])];
        Self { layers, step: 0, next: Box::new(next) }
    }

    /// One step of training, with bf16 weights forward and backward. Returns the loss.
    fn train(&mut self, rate: f32) -> f32 {
        self.layers.iter_mut().for_each(|layer| layer.gradient.fill(0.0));
        let mut loss = 0.0;
        for _ in 0..BATCH {
            let input: Vec<f32> = (0..WIDTHS[0]).map(|_| (self.next)()).collect();
            let hidden: Vec<f32> = self.layers[0].forward(&input).into_iter().map(f32::tanh).collect();
            let output = self.layers[1].forward(&hidden);
            let wanted = input.iter().rev().map(|x| (3.0 * x).sin());
            let error: Vec<f32> = output.iter().zip(wanted).map(|(y, t)| (y - t) / BATCH as f32).collect();
            loss += error.iter().map(|e| e * e).sum::<f32>();
            let back = self.layers[1].backward(&hidden, &error);
            let back: Vec<f32> = back.iter().zip(&hidden).map(|(g, h)| g * (1.0 - h * h)).collect();
            self.layers[0].backward(&input, &back);
        }
        self.step += 1;
        self.layers.iter_mut().for_each(|layer| layer.adamw(rate, self.step));
        loss
    }

    fn state(&self) -> StateDict<'static> {
        let mut state = StateDict::new();
        for (number, layer) in self.layers.iter().enumerate() {
            let weights = HostTensor::new(Arc::new(layer.weights.clone()), [layer.shape.1, layer.shape.0]);
            state.tensor(format!("layers.{number}.weight"), weights).unwrap();
        }
        state
    }
}

impl Layer {
    fn forward(&self, input: &[f32]) -> Vec<f32> {
        let row = |row: &[bf16]| row.iter().zip(input).map(|(w, x)| w.to_f32() * x).sum();
        self.weights.chunks_exact(self.shape.0).map(row).collect()
    }

    fn backward(&mut self, input: &[f32], error: &[f32]) -> Vec<f32> {
        let mut back = vec![0.0; self.shape.0];
        let rows = self.weights.chunks_exact(self.shape.0).zip(self.gradient.chunks_exact_mut(self.shape.0));
        for ((weights, gradient), e) in rows.zip(error) {
            for i in 0..self.shape.0 {
                back[i] += weights[i].to_f32() * e;
                gradient[i] += input[i] * e;
            }
        }
        back
    }

    fn adamw(&mut self, rate: f32, step: i32) {
        let (first, second) = (1.0 - 0.9_f32.powi(step), 1.0 - 0.999_f32.powi(step));
        for i in 0..self.master.len() {
            let g = self.gradient[i];
            self.mean[i] = 0.9 * self.mean[i] + 0.1 * g;
            self.square[i] = 0.999 * self.square[i] + 0.001 * g * g;
            let update = self.mean[i] / first / ((self.square[i] / second).sqrt() + 1e-8);
            self.master[i] -= rate * (update + 0.01 * self.master[i]);
            self.weights[i] = bf16::from_f32(self.master[i]);
        }
    }
}

/// The fewest bytes by which a coder that knows shares alone can say what changed: where, and by how much.
fn entropy(old: &Network, new: &[Vec<bf16>]) -> f64 {
    let bits = |counts: &[f64]| {
        let all: f64 = counts.iter().sum();
        counts.iter().filter(|n| **n > 0.0).map(|n| -n * (n / all).log2()).sum::<f64>()
    };
    let (mut distances, mut same) = (HashMap::<i32, f64>::new(), 0.0);
    for (layer, new) in old.layers.iter().zip(new) {
        for (a, b) in layer.weights.iter().zip(new) {
            let order = |w: &bf16| if w.to_bits() >> 15 == 1 { !w.to_bits() } else { w.to_bits() | 1 << 15 } as i32;
            match order(b) - order(a) {
                0 => same += 1.0,
                distance => *distances.entry(distance).or_default() += 1.0,
            }
        }
    }
    let changed: f64 = distances.values().sum();
    (bits(&[same, changed]) + bits(&distances.into_values().collect::<Vec<_>>())) / 8.0
}

/// The length of the columns of a delta, without header and manifest, which are not of this small model's
/// size.
fn columns(published: &Published) -> f64 {
    let bytes = std::fs::read(published.path.join("delta.safetensors")).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap());
    (bytes.len() as u64 - header) as f64
}

#[test]
fn trained_weights_arrive_bit_for_bit_and_cost_about_their_entropy() {
    let mut network = Network::new();
    let first: f32 = (0..5).map(|_| network.train(1e-3)).sum();
    let last: f32 = (0..15).map(|_| network.train(1e-3)).skip(10).sum();
    assert!(last < first, "it learns: {first} {last}");
    let compressed = cfg!(feature = "zstd").then_some(Form::Zstd);
    let roots: Vec<_> = [Form::Packed, Form::Indices]
        .into_iter()
        .chain(compressed)
        .map(|form| {
            let root = tempfile::tempdir().unwrap();
            let publisher = Publisher::open(root.path()).unwrap().form(form).arena(4 << 20).build().unwrap();
            let follow = Follow::open(root.path()).unwrap().start(Weights::new()).unwrap();
            (form, root, publisher, follow)
        })
        .collect();
    let mut roots = roots;
    for rate in [0.0, 1e-6, 1e-6, 1e-6, 1e-5, 1e-4, 1e-2] {
        let old =
            Network { layers: network.layers.iter().map(Layer::copied).collect(), step: 0, next: Box::new(|| 0.0) };
        if rate > 0.0 {
            network.train(rate);
        }
        let new: Vec<_> = network.layers.iter().map(|layer| layer.weights.clone()).collect();
        let fewest = entropy(&old, &new);
        for (form, _, publisher, follow) in &mut roots {
            let published = publisher.publish(network.state()).unwrap().wait(MINUTE).unwrap();
            follow.advance(MINUTE).unwrap();
            for (number, layer) in network.layers.iter().enumerate() {
                let there: Vec<bf16> = follow.weights().elements(&format!("layers.{number}.weight")).unwrap();
                assert!(there.iter().zip(&layer.weights).all(|(a, b)| a.to_bits() == b.to_bits()));
            }
            let Kind::Delta { changed, .. } = published.kind else { continue };
            let full = network.layers.iter().map(|layer| layer.weights.len() as f64 * 2.0).sum::<f64>();
            let (share, size) = (changed as f64 / full * 2.0, columns(&published) / full);
            eprintln!(
                "rate={rate:e} {form:?}: changed={:.2}% size={:.2}% entropy={:.2}%",
                share * 100.0,
                size * 100.0,
                fewest / full * 100.0
            );
            if rate == 1e-6 && *form != Form::Indices {
                assert!((0.001..0.05).contains(&share), "{share}");
                // Two bytes for each change; compressed, within a fifth of entropy in columns this short.
                let most = if *form == Form::Zstd { 1.2 * fewest / full + 0.0005 } else { 2.0 * share / 2.0 + 0.004 };
                assert!(size <= most, "{form:?}: {size} of {most}");
            }
        }
    }
}

impl Layer {
    fn copied(&self) -> Self {
        let Self { weights, shape, .. } = self;
        let none = Vec::new;
        Self { master: none(), mean: none(), square: none(), gradient: none(), weights: weights.clone(), shape: *shape }
    }
}
