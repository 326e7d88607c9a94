//! A training run: parameters, AdamW moments, the random numbers that select the examples, and the step.

use super::model::{Shape, Size};
use super::text::Corpus;
use crate::adamw;
use crate::rng::Rng;
use ashore::{Checkpoint, Error, ErrorKind, HostTensor, Result, StateDict, Targets};
use std::sync::Arc;

/// A parameter or a moment. Shared, so that a save can keep it; written in place after the save releases it.
type Tensor = Arc<Vec<f32>>;

/// Everything that determines how training continues, and so everything in a checkpoint.
#[derive(Clone)]
pub struct Training {
    pub shape: Shape,
    pub batch: usize,
    pub step: u64,
    rng: Rng,
    names: Vec<(String, Vec<usize>)>,
    pub parameters: Vec<Tensor>,
    pub first: Vec<Tensor>,
    pub second: Vec<Tensor>,
}

/// The result of a forward and backward pass, which changes only the random numbers of the training state.
pub struct Gradients {
    pub loss: f32,
    pub by_tensor: Vec<Vec<f32>>,
}

impl Training {
    pub fn new(size: Size, seed: u64, corpus: &Corpus) -> Self {
        let shape = size.shape(corpus.alphabet.len());
        let parameters: Vec<Tensor> = shape.initial(seed).into_iter().map(Arc::new).collect();
        let zeros = || parameters.iter().map(|p| Arc::new(vec![0.0; p.len()])).collect();
        Self {
            batch: size.batch(),
            step: 0,
            rng: Rng::new(seed ^ 0x5eed),
            names: shape.parameters(),
            first: zeros(),
            second: zeros(),
            parameters,
            shape,
        }
    }

    /// Returns a copy that shares no memory.
    pub fn copied(&self) -> Self {
        let copy = |tensors: &[Tensor]| tensors.iter().map(|t| Arc::new(t.to_vec())).collect();
        Self {
            parameters: copy(&self.parameters),
            first: copy(&self.first),
            second: copy(&self.second),
            ..self.clone()
        }
    }

    pub fn gradients(&self) -> Gradients {
        Gradients { loss: f32::NAN, by_tensor: self.parameters.iter().map(|p| vec![0.0; p.len()]).collect() }
    }

    /// Computes forward and backward over the next examples. Only reads parameters and moments: a save may
    /// still read them.
    pub fn compute(&mut self, corpus: &Corpus, gradients: &mut Gradients, threads: usize) {
        let batch = corpus.draw(&mut self.rng, self.batch, self.shape.context);
        let views: Vec<&[f32]> = self.parameters.iter().map(|p| &p[..]).collect();
        gradients.loss = self.shape.loss(&views, &batch, &mut gradients.by_tensor, threads);
    }

    /// Runs the optimizer, which writes parameters and moments. No save may read them any more.
    pub fn update(&mut self, gradients: &Gradients, threads: usize) -> Result<()> {
        self.step += 1;
        let moments = self.first.iter_mut().zip(&mut self.second);
        for ((parameter, (first, second)), gradient) in
            self.parameters.iter_mut().zip(moments).zip(&gradients.by_tensor)
        {
            let (Some(parameter), Some(first), Some(second)) =
                (Arc::get_mut(parameter), Arc::get_mut(first), Arc::get_mut(second))
            else {
                return Err(
                    Error::new(ErrorKind::Internal, "a save still uses a tensor after the fence").with_step(self.step)
                );
            };
            adamw::update(parameter, first, second, gradient, self.step, threads);
        }
        Ok(())
    }

    /// Returns every tensor with its name and dimensions.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &[usize], &Tensor)> {
        let groups = [("parameters", &self.parameters), ("adamw.first", &self.first), ("adamw.second", &self.second)];
        groups.into_iter().flat_map(|(group, tensors)| {
            let named = self.names.iter().zip(tensors);
            named.map(move |((name, dims), tensor)| (format!("{group}.{name}"), &dims[..], tensor))
        })
    }

    /// Returns how many numbers the optimizer changes.
    pub fn parameters(&self) -> u64 {
        self.parameters.iter().map(|p| p.len() as u64).sum()
    }

    /// Returns the total length of the tensors in bytes.
    pub fn bytes(&self) -> u64 {
        self.tensors().map(|(_, _, tensor)| size_of_val(&tensor[..]) as u64).sum()
    }

    /// Returns the state for a save. Copies no bytes.
    pub fn state(&self) -> Result<StateDict<'static>> {
        let mut state = StateDict::with_capacity(3 * self.names.len());
        for (name, dims, tensor) in self.tensors() {
            state.tensor(name, HostTensor::new(tensor.clone(), dims))?;
        }
        self.describe(&mut state)?;
        Ok(state)
    }

    /// Adds everything but the tensors to `state`.
    pub fn describe(&self, state: &mut StateDict<'_>) -> Result<()> {
        state.value("step", &self.step)?.value("rng", &self.rng)?.value("batch", &self.batch)?;
        state.metadata("model", &self.shape)?;
        Ok(())
    }

    /// Loads the training from a checkpoint, which must have the same model as `self`.
    ///
    /// # Errors
    /// `Invalid` when the checkpoint is of another model; `Corrupt` when its bytes are not those that were
    /// written.
    pub fn resumed(&self, checkpoint: &Checkpoint) -> Result<Self> {
        let shape: Option<Shape> = checkpoint.metadata("model").ok();
        if shape.as_ref() != Some(&self.shape) {
            let why = "the directory has checkpoints of another program: choose another --dir";
            return Err(Error::new(ErrorKind::Invalid, why).with_path(checkpoint.path()));
        }
        let mut resumed = Self {
            step: checkpoint.value("step")?,
            rng: checkpoint.value("rng")?,
            batch: checkpoint.value("batch")?,
            ..self.copied()
        };
        let names: Vec<String> = resumed.tensors().map(|(name, ..)| name).collect();
        let tensors = resumed.parameters.iter_mut().chain(&mut resumed.first).chain(&mut resumed.second);
        let targets = names.into_iter().zip(tensors).fold(Targets::new(), |targets, (name, tensor)| {
            targets.elements(name, Arc::make_mut(tensor).as_mut_slice())
        });
        checkpoint.read_into(targets)?;
        Ok(resumed)
    }

    /// True if both would continue in the same way: every bit of every tensor, the random numbers and the
    /// step.
    pub fn same_bits(&self, other: &Self) -> bool {
        let bits = |t: &Tensor| t.iter().map(|x| x.to_bits()).collect::<Vec<u32>>();
        (self.step, &self.rng, self.batch, &self.shape) == (other.step, &other.rng, other.batch, &other.shape)
            && self.tensors().zip(other.tensors()).all(|(a, b)| a.0 == b.0 && a.1 == b.1 && bits(a.2) == bits(b.2))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn losses(threads: usize, steps: usize) -> Vec<f32> {
        let corpus = Corpus::new();
        let mut training = Training::new(Size::Tiny, 1, &corpus);
        let mut gradients = training.gradients();
        (0..steps)
            .map(|_| {
                training.compute(&corpus, &mut gradients, threads);
                training.update(&gradients, threads).unwrap();
                gradients.loss
            })
            .collect()
    }

    #[test]
    fn the_loss_curve_repeats_bit_for_bit_on_any_number_of_threads() {
        let bits = |threads| losses(threads, 12).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(1), bits(1));
        assert_eq!(bits(1), bits(3));
    }

    #[test]
    fn the_loss_falls() {
        let losses = losses(1, 200);
        let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
        let (begin, end) = (mean(&losses[..10]), mean(&losses[190..]));
        assert!(end < 0.85 * begin, "begin={begin} end={end}");
    }

    #[test]
    fn a_tensor_that_a_save_still_holds_is_not_written() {
        let corpus = Corpus::new();
        let mut training = Training::new(Size::Tiny, 1, &corpus);
        let mut gradients = training.gradients();
        training.compute(&corpus, &mut gradients, 1);
        let state = training.state().unwrap();
        assert_eq!((state.len(), state.bytes()), (21, training.bytes()));
        assert!(training.clone().update(&gradients, 1).is_err());
        drop(state);
        let before = training.copied();
        training.update(&gradients, 1).unwrap();
        assert!(!training.same_bits(&before));
    }
}
