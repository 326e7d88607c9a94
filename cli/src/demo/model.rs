//! A character model: embeddings of the preceding letters, side by side, through hidden layers to the next
//! letter.

use super::arithmetic::{add_scaled, dot, fill_rows, transposed};
use super::text::Batch;
use crate::rng::Rng;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The sizes of a model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// How many preceding letters it sees.
    pub context: usize,
    /// The number of different letters.
    pub vocabulary: usize,
    /// Numbers per letter.
    pub embedding: usize,
    /// Units of each hidden layer.
    pub hidden: Vec<usize>,
}

/// Named sizes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Size {
    /// About 12,000 parameters, for slow machines
    Tiny,
    /// About 2.9 million parameters; 35 MB with the optimizer's moments
    Standard,
}

impl Size {
    pub fn shape(self, vocabulary: usize) -> Shape {
        match self {
            Size::Tiny => Shape { context: 12, vocabulary, embedding: 8, hidden: vec![64, 48] },
            Size::Standard => Shape { context: 32, vocabulary, embedding: 64, hidden: vec![1024, 768] },
        }
    }

    /// Examples per step.
    pub fn batch(self) -> usize {
        match self {
            Size::Tiny => 4,
            Size::Standard => 48,
        }
    }
}

impl Shape {
    /// Name and dimensions of every parameter: the embedding, then weight and bias of each layer.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let mut out = vec![("embedding".to_owned(), vec![self.vocabulary, self.embedding])];
        let mut inputs = self.context * self.embedding;
        let names = (0..self.hidden.len()).map(|i| format!("hidden.{i}")).chain(["output".to_owned()]);
        for (name, units) in names.zip(self.hidden.iter().copied().chain([self.vocabulary])) {
            out.push((format!("{name}.weight"), vec![units, inputs]));
            out.push((format!("{name}.bias"), vec![units]));
            inputs = units;
        }
        out
    }

    /// Returns initial values: uniform weights, with a range that keeps activations where tanh is not
    /// saturated.
    pub fn initial(&self, seed: u64) -> Vec<Vec<f32>> {
        let mut rng = Rng::new(seed);
        let mut draw = |(name, dims): &(String, Vec<usize>)| {
            let width = match dims[..] {
                [_, inputs] if name != "embedding" => (3.0 / inputs as f32).sqrt(),
                [_, _] => 1.0,
                _ => 0.0,
            };
            (0..dims.iter().product()).map(|_| rng.signed_unit() * width).collect()
        };
        self.parameters().iter().map(&mut draw).collect()
    }

    /// Computes the mean cross-entropy of a batch in nats, and writes its gradient to `gradients`, one for
    /// each of `parameters`.
    pub fn loss(&self, parameters: &[&[f32]], batch: &Batch, gradients: &mut [Vec<f32>], threads: usize) -> f32 {
        let (embedding, layers) = (parameters[0], parameters[1..].chunks_exact(2));
        let examples = batch.targets.len();
        let width = self.embedding;

        let mut activations = vec![self.look_up(embedding, batch)];
        for (i, layer) in layers.clone().enumerate() {
            let output = forward(layer[0], layer[1], &activations[i], examples, threads, i < self.hidden.len());
            activations.push(output);
        }
        let (loss, mut upstream) = cross_entropy(&activations[self.hidden.len() + 1], &batch.targets, self.vocabulary);

        for (i, layer) in layers.enumerate().rev() {
            let inputs = activations[i].len() / examples;
            let units = layer[1].len();
            let [weight, bias] = &mut gradients[1 + 2 * i..3 + 2 * i] else { unreachable!("weight and bias") };
            fill_rows(threads, weight, inputs, |unit, row| {
                row.fill(0.0);
                for (x, up) in activations[i].chunks_exact(inputs).zip(upstream.chunks_exact(units)) {
                    add_scaled(row, up[unit], x);
                }
            });
            bias.fill(0.0);
            upstream.chunks_exact(units).for_each(|up| add_scaled(bias, 1.0, up));
            upstream = backward(layer[0], &upstream, inputs, units, threads);
            if i > 0 {
                for (up, y) in upstream.iter_mut().zip(&activations[i]) {
                    *up *= 1.0 - y * y;
                }
            }
        }
        gradients[0].fill(0.0);
        for (&token, up) in batch.contexts.iter().zip(upstream.chunks_exact(width)) {
            add_scaled(&mut gradients[0][token * width..(token + 1) * width], 1.0, up);
        }
        loss
    }

    fn look_up(&self, embedding: &[f32], batch: &Batch) -> Vec<f32> {
        let width = self.embedding;
        batch.contexts.iter().flat_map(|&token| &embedding[token * width..(token + 1) * width]).copied().collect()
    }
}

/// Computes `tanh(weight * x + bias)` for every example, or without the tanh. Unit by unit, so that each row
/// of the weights is loaded once for the whole batch.
fn forward(weight: &[f32], bias: &[f32], x: &[f32], examples: usize, threads: usize, bend: bool) -> Vec<f32> {
    let inputs = x.len() / examples;
    let mut by_unit = vec![0.0; bias.len() * examples];
    fill_rows(threads, &mut by_unit, examples, |unit, row| {
        let weights = &weight[unit * inputs..(unit + 1) * inputs];
        for (out, x) in row.iter_mut().zip(x.chunks_exact(inputs)) {
            let sum = dot(weights, x) + bias[unit];
            *out = if bend { sum.tanh() } else { sum };
        }
    });
    transposed(&by_unit, examples)
}

/// Computes the gradient for the layer below, `upstream * weight`, for every example. Each thread reads the
/// weights once for all of its examples.
fn backward(weight: &[f32], upstream: &[f32], inputs: usize, units: usize, threads: usize) -> Vec<f32> {
    let examples = upstream.len() / units;
    let share = examples.div_ceil(threads.max(1)).max(1);
    let mut out = vec![0.0; examples.div_ceil(share) * share * inputs];
    fill_rows(threads, &mut out, share * inputs, |block, part| {
        for (unit, weights) in weight.chunks_exact(inputs).enumerate() {
            for (i, row) in part.chunks_exact_mut(inputs).enumerate() {
                if let Some(&up) = upstream.get((block * share + i) * units + unit) {
                    add_scaled(row, up, weights);
                }
            }
        }
    });
    out.truncate(examples * inputs);
    out
}

/// Returns the mean cross-entropy, and its gradient with respect to the logits.
fn cross_entropy(logits: &[f32], targets: &[usize], vocabulary: usize) -> (f32, Vec<f32>) {
    let scale = 1.0 / targets.len() as f32;
    let mut gradient = Vec::with_capacity(logits.len());
    let mut loss = 0.0_f64;
    for (row, &target) in logits.chunks_exact(vocabulary).zip(targets) {
        let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let exps: Vec<f32> = row.iter().map(|x| (x - most).exp()).collect();
        let sum: f32 = exps.iter().sum();
        loss += f64::from(sum.ln() + most - row[target]);
        gradient.extend(exps.iter().enumerate().map(|(i, e)| {
            let hit = if i == target { 1.0 } else { 0.0 };
            (e / sum - hit) * scale
        }));
    }
    ((loss / targets.len() as f64) as f32, gradient)
}

#[cfg(test)]
mod tests {
    use super::super::text::Corpus;
    use super::*;

    #[test]
    fn the_backward_pass_agrees_with_differences_of_the_loss() {
        let corpus = Corpus::new();
        let shape = Shape { context: 5, vocabulary: corpus.alphabet.len(), embedding: 4, hidden: vec![9, 7] };
        let batch = corpus.draw(&mut Rng::new(11), 6, shape.context);
        let mut values = shape.initial(5);
        let mut gradients: Vec<Vec<f32>> = values.iter().map(|v| vec![0.0; v.len()]).collect();
        let mut unused = gradients.clone();
        let loss = |values: &[Vec<f32>], gradients: &mut [Vec<f32>]| {
            let views: Vec<&[f32]> = values.iter().map(|v| &v[..]).collect();
            f64::from(shape.loss(&views, &batch, gradients, 2))
        };
        loss(&values, &mut gradients);

        let mut rng = Rng::new(2);
        let mut checked = 0;
        for tensor in 0..values.len() {
            for _ in 0..20 {
                let at = rng.below(values[tensor].len());
                let (there, eps) = (values[tensor][at], 0.02);
                values[tensor][at] = there + eps;
                let above = loss(&values, &mut unused);
                values[tensor][at] = there - eps;
                let below = loss(&values, &mut unused);
                values[tensor][at] = there;
                let numeric = (above - below) / (2.0 * f64::from(eps));
                let analytic = f64::from(gradients[tensor][at]);
                let allowed = 1e-4 + 0.01 * numeric.abs().max(analytic.abs());
                assert!((numeric - analytic).abs() < allowed, "tensor={tensor} at={at} {numeric} {analytic}");
                checked += usize::from(analytic.abs() > 1e-3);
            }
        }
        assert!(checked > 60, "too few gradients were large enough to say anything checked={checked}");
    }

    #[test]
    fn the_standard_model_is_large_enough_for_a_ring() {
        let shape = Size::Standard.shape(42);
        let parameters: usize = shape.parameters().iter().map(|(_, dims)| dims.iter().product::<usize>()).sum();
        assert!((30_000_000..60_000_000).contains(&(parameters * 12)), "{parameters}");
    }
}
